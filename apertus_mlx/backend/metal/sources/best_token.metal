// The token of the largest of COUNT peaks, in one threadgroup.
//
// Constants: COUNT, THREADS.

namespace apertus {

// Peaks stand in the order of their tokens: the first of equal peaks has the lowest token. Every
// simdgroup is full.
inline void best_token(
    const device float* peaks,
    const device uint* peak_tokens,
    device uint* token,
    uint thread_index,
    uint simdgroup,
    uint lane,
    threadgroup float* bests,
    threadgroup uint* indices) {
  constexpr int simdgroups = THREADS / 32;
  const float lowest = as_type<float>(0xff800000u);  // minus infinity
  float best = lowest;
  uint index = COUNT;
  for (uint i = thread_index; i < uint(COUNT); i += THREADS) {
    if (peaks[i] > best) {
      best = peaks[i];
      index = i;
    }
  }
  float top = metal::simd_max(best);
  index = metal::simd_min(best == top ? index : uint(COUNT));
  if (lane == 0) {
    bests[simdgroup] = top;
    indices[simdgroup] = index;
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  if (simdgroup == 0) {
    best = lane < uint(simdgroups) ? bests[lane] : lowest;
    index = lane < uint(simdgroups) ? indices[lane] : uint(COUNT);
    top = metal::simd_max(best);
    index = metal::simd_min(best == top ? index : uint(COUNT));
    if (lane == 0) {
      // Nothing above minus infinity: the lowest token.
      token[0] = peak_tokens[index < uint(COUNT) ? index : 0u];
    }
  }
}

}  // namespace apertus
