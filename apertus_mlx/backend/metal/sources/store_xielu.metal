// xIELU of each row's sum, before its only rounding.
//
// Constants: T, ROWS, ROWS_EACH.

namespace apertus {

// exp(x) - 1 - x for x <= 0, without the cancellation near 0: Metal has no expm1.
inline float exp_excess(float x) {
  if (x < -1.0f) {
    return metal::precise::exp(x) - (1.0f + x);
  }
  // x^2 (1/2! + x/3! + ... + x^10/12!); the next term is below 2e-10.
  float p = 1.0f / 479001600.0f;
  p = metal::fma(p, x, 1.0f / 39916800.0f);
  p = metal::fma(p, x, 1.0f / 3628800.0f);
  p = metal::fma(p, x, 1.0f / 362880.0f);
  p = metal::fma(p, x, 1.0f / 40320.0f);
  p = metal::fma(p, x, 1.0f / 5040.0f);
  p = metal::fma(p, x, 1.0f / 720.0f);
  p = metal::fma(p, x, 1.0f / 120.0f);
  p = metal::fma(p, x, 1.0f / 24.0f);
  p = metal::fma(p, x, 1.0f / 6.0f);
  p = metal::fma(p, x, 0.5f);
  return p * x * x;
}

// slopes: alpha_p, alpha_n, beta, eps, as they stand in the formula.
// x > 0: alpha_p x^2 + beta x;  x <= 0: alpha_n (expm1(min(x, eps)) - x) + beta x.
inline float xielu(float x, const device float* slopes) {
  const float linear = slopes[2] * x;
  if (x > 0.0f) {
    return metal::fma(slopes[0] * x, x, linear);
  }
  const float eps = slopes[3];
  // expm1(m) - x = (expm1(m) - m) + (m - x) with m = min(x, eps).
  const float step = x > eps ? eps - x : 0.0f;
  return metal::fma(slopes[1], exp_excess(metal::min(x, eps)) + step, linear);
}

inline void store_xielu(
    const thread float* result, int first, uint lane, const device float* slopes, device T* y) {
  for (int r = 0; r < ROWS_EACH; r++) {
    if (lane == 0 && first + r < ROWS) {
      y[first + r] = static_cast<T>(xielu(result[r], slopes));
    }
  }
}

}  // namespace apertus
