// RMSNorm and rotary embedding of one position's queries and keys; values are copied. One simdgroup
// per head. Rounds where `mx.fast.rms_norm` and `mx.fast.rope` do.
//
// Constants: T, HEADS, KV_HEADS, HEAD_DIM, EPS.

namespace apertus {

constexpr constant int HALF_DIM = HEAD_DIM / 2;
// Pairs of a head that a thread holds at most.
constexpr constant int PAIRS_EACH = (HALF_DIM + 31) / 32;

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

// Normalizes and rotates a query or a key head in place; a value head stays. A thread holds the
// pairs lane, lane + 32, ... of the head; all of its simdgroup take part.
inline void norm_and_rotate(
    thread float* low,
    thread float* high,
    const device T* q_norm,
    const device T* k_norm,
    const device float* wavelengths,
    int position,
    int head,
    uint lane) {
  float squares = 0.0f;
  for (int i = 0; i < PAIRS_EACH; i++) {
    squares = metal::fma(low[i], low[i], squares);
    squares = metal::fma(high[i], high[i], squares);
  }
  squares = metal::simd_sum(squares);
  if (head >= HEADS + KV_HEADS) {
    return;
  }
  const device T* weight = head < HEADS ? q_norm : k_norm;
  const float factor = metal::precise::rsqrt(squares / float(HEAD_DIM) + EPS);
  for (int i = 0; i < PAIRS_EACH; i++) {
    const int pair = int(lane) + i * 32;
    if (pair < HALF_DIM) {
      const float a = weighted(low[i] * factor, weight[pair]);
      const float b = weighted(high[i] * factor, weight[pair + HALF_DIM]);
      const float angle = rotary_angle(position, wavelengths[pair]);
      const float cosine = metal::precise::cos(angle);
      const float sine = metal::precise::sin(angle);
      low[i] = metal::fma(a, cosine, -b * sine);
      high[i] = metal::fma(a, sine, b * cosine);
    }
  }
}

// Head `head` of queries, keys and values in that order, from `input` to `output`, both its own.
// Input is `const device T*`, or `const threadgroup float*`.
template <typename Input>
inline void qk_norm_rope(
    Input input,
    const device T* q_norm,
    const device T* k_norm,
    const device float* wavelengths,
    int position,
    int head,
    uint lane,
    device T* output) {
  float low[PAIRS_EACH];
  float high[PAIRS_EACH];
  for (int i = 0; i < PAIRS_EACH; i++) {
    const int pair = int(lane) + i * 32;
    low[i] = pair < HALF_DIM ? float(input[pair]) : 0.0f;
    high[i] = pair < HALF_DIM ? float(input[pair + HALF_DIM]) : 0.0f;
  }
  norm_and_rotate(low, high, q_norm, k_norm, wavelengths, position, head, lane);
  for (int i = 0; i < PAIRS_EACH; i++) {
    const int pair = int(lane) + i * 32;
    if (pair < HALF_DIM) {
      output[pair] = static_cast<T>(low[i]);
      output[pair + HALF_DIM] = static_cast<T>(high[i]);
    }
  }
}

}  // namespace apertus
