// Adds the residual to sums before their only rounding.
//
// Constants: T, ROWS, ROWS_EACH.

namespace apertus {

inline void store_residual(
    const thread float* result, int first, uint lane, const device T* residual, device T* y) {
  for (int r = 0; r < ROWS_EACH; r++) {
    if (lane == 0 && first + r < ROWS) {
      y[first + r] = static_cast<T>(float(residual[first + r]) + result[r]);
    }
  }
}

}  // namespace apertus
