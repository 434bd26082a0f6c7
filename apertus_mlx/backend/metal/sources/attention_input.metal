// From the residual stream to queries, and to the row that goes to the cache: RMSNorm, projection,
// QK-norm and rotary embedding. One threadgroup per head, whose rows are the rows of the head.
//
// Constants: those of quantized_matvec and qk_norm_rope.

namespace apertus {

// `values` has room for a head. It is not rounded before the norm, as it would be in memory.
inline void attention_input(
    thread NormedVector& vector,
    const device uint* words,
    const device T* scales,
    const device T* biases,
    const device T* q_norm,
    const device T* k_norm,
    const device float* wavelengths,
    int position,
    int head,
    uint simdgroup,
    uint lane,
    threadgroup float* values,
    device T* output) {
  const int row = int(simdgroup) * ROWS_EACH;
  float result[ROWS_EACH];
  multiply_rows(vector, words, scales, biases, head * HEAD_DIM + row, lane, result);
  for (int r = 0; r < ROWS_EACH; r++) {
    if (lane == 0) {
      values[row + r] = result[r];
    }
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  if (simdgroup == 0) {
    const threadgroup float* input = values;
    qk_norm_rope(input, q_norm, k_norm, wavelengths, position, head, lane, output);
  }
}

}  // namespace apertus
