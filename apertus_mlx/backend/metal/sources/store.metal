// Stores sums as they are.
//
// Constants: T, ROWS, ROWS_EACH.

namespace apertus {

inline void store(const thread float* result, int first, uint lane, device T* y) {
  for (int r = 0; r < ROWS_EACH; r++) {
    if (lane == 0 && first + r < ROWS) {
      y[first + r] = static_cast<T>(result[r]);
    }
  }
}

}  // namespace apertus
