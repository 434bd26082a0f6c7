// The largest logit of each threadgroup, so that nobody has to scan them all for the best token.
//
// Constants: T, ROWS, ROWS_EACH, SIMDGROUPS.

namespace apertus {

// Stores logits, and the largest of the threadgroup's with its row. Compares them as rounded to T;
// of equals the lowest row wins, NaN never does. Needs all threads of the threadgroup.
inline void store_peaks(
    const thread float* result,
    int first,
    uint lane,
    uint simdgroup,
    uint tile_index,
    threadgroup float* bests,
    threadgroup uint* tokens,
    device T* logits,
    device float* peaks,
    device uint* peak_tokens) {
  float best = as_type<float>(0xff800000u);  // minus infinity
  int token = first;
  for (int r = 0; r < ROWS_EACH; r++) {
    if (first + r < ROWS) {
      const T logit = static_cast<T>(result[r]);
      if (lane == 0) {
        logits[first + r] = logit;
      }
      if (float(logit) > best) {
        best = float(logit);
        token = first + r;
      }
    }
  }
  if (lane == 0) {
    bests[simdgroup] = best;
    tokens[simdgroup] = uint(token);
  }
  metal::threadgroup_barrier(metal::mem_flags::mem_threadgroup);
  if (simdgroup == 0 && lane == 0) {
    for (int s = 1; s < SIMDGROUPS; s++) {
      if (bests[s] > best) {
        best = bests[s];
        token = int(tokens[s]);
      }
    }
    peaks[tile_index] = best;
    peak_tokens[tile_index] = uint(token);
  }
}

}  // namespace apertus
