// RMSNorm and rotary embedding of one position's queries and keys; values are copied. One simdgroup
// per head. Rounds where `mx.fast.rms_norm` and `mx.fast.rope` do.
//
// Constants: T, HEADS, KV_HEADS, HEAD_DIM, EPS.

namespace apertus {

// position / wavelength, less whole turns. A float32 quotient of 50,000 radians is off by 0.002:
// its remainder is kept, and the turns are taken off with 2 pi to 48 bits.
inline float rotary_angle(int position, float wavelength) {
  const float high = float(position) / wavelength;
  const float low = metal::fma(-high, wavelength, float(position)) / wavelength;
  const float turns = metal::rint(high * 0.15915494f);
  float angle = metal::fma(-turns, 6.2831855f, high);
  angle = metal::fma(turns, 1.7484556e-7f, angle);
  return angle + low;
}

inline float weighted(float scaled, T weight) {
  return float(static_cast<T>(float(weight) * float(static_cast<T>(scaled))));
}

// Head `head` of queries, keys and values in that order, from `input` to `output`, both its own.
inline void qk_norm_rope(
    const device T* input,
    const device T* q_norm,
    const device T* k_norm,
    const device float* wavelengths,
    int position,
    int head,
    uint lane,
    device T* output) {
  constexpr int half_dim = HEAD_DIM / 2;
  constexpr int each = (half_dim + 31) / 32;
  float low[each];
  float high[each];
  float squares = 0.0f;
  for (int i = 0; i < each; i++) {
    const int pair = int(lane) + i * 32;
    low[i] = pair < half_dim ? float(input[pair]) : 0.0f;
    high[i] = pair < half_dim ? float(input[pair + half_dim]) : 0.0f;
    squares = metal::fma(low[i], low[i], squares);
    squares = metal::fma(high[i], high[i], squares);
  }
  squares = metal::simd_sum(squares);
  const bool rotates = head < HEADS + KV_HEADS;
  const device T* weight = head < HEADS ? q_norm : k_norm;
  const float factor = metal::precise::rsqrt(squares / float(HEAD_DIM) + EPS);
  for (int i = 0; i < each; i++) {
    const int pair = int(lane) + i * 32;
    if (pair >= half_dim) {
      continue;
    }
    if (rotates) {
      const float a = weighted(low[i] * factor, weight[pair]);
      const float b = weighted(high[i] * factor, weight[pair + half_dim]);
      const float angle = rotary_angle(position, wavelengths[pair]);
      const float cosine = metal::precise::cos(angle);
      const float sine = metal::precise::sin(angle);
      low[i] = metal::fma(a, cosine, -b * sine);
      high[i] = metal::fma(a, sine, b * cosine);
    }
    output[pair] = static_cast<T>(low[i]);
    output[pair + half_dim] = static_cast<T>(high[i]);
  }
}

}  // namespace apertus
