// h = x + r and n = RMSNorm(h), one threadgroup per row.
//
// Rounds where `mx.fast.rms_norm` does: h, then h over its root mean square, then times the weight.
//
// Constants: T, COLUMNS, THREADS, EPS.

namespace apertus {

// `residual`, `update`, `sum` and `normed` begin at the row.
inline void add_rms_norm(
    const device T* residual,
    const device T* update,
    const device T* weight,
    device T* sum,
    device T* normed,
    uint thread_index,
    uint simdgroup,
    uint lane,
    threadgroup float* squares) {
  constexpr int each = (COLUMNS + THREADS - 1) / THREADS;
  float values[each];
  float total = 0.0f;
  for (int i = 0; i < each; i++) {
    const int column = int(thread_index) + i * THREADS;
    values[i] = 0.0f;
    if (column < COLUMNS) {
      const T added = static_cast<T>(float(residual[column]) + float(update[column]));
      sum[column] = added;
      values[i] = float(added);
    }
    total = metal::fma(values[i], values[i], total);
  }
  total = metal::simd_sum(total);
  if (lane == 0) {
    squares[simdgroup] = total;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  // Every simdgroup adds up the same numbers in the same order.
  total = metal::simd_sum(lane < uint(THREADS / 32) ? squares[lane] : 0.0f);
  const float factor = metal::precise::rsqrt(total / float(COLUMNS) + EPS);
  for (int i = 0; i < each; i++) {
    const int column = int(thread_index) + i * THREADS;
    if (column < COLUMNS) {
      const T scaled = static_cast<T>(values[i] * factor);
      normed[column] = static_cast<T>(float(weight[column]) * float(scaled));
    }
  }
}

}  // namespace apertus
