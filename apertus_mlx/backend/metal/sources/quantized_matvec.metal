// Rows of a quantized matrix times one vector. Codes of BITS bits are packed densely into 32-bit
// words, lowest bits first.
//
// A simdgroup computes ROWS_EACH rows; its threads take 32 columns at a time, which lie in one group
// and are BITS aligned words. Products and sums are float32, rounded once, when they are stored.
//
// Constants: T, BITS, GROUP_SIZE, COLUMNS, ROWS, SIMDGROUPS, ROWS_EACH.

namespace apertus {

// The dot product of 32 codes, which are exactly BITS words whatever the width, and 32 values.
inline float codes_dot(const device uint* words, const thread float* values) {
  uint held[BITS];
  for (int i = 0; i < BITS; i++) {
    held[i] = words[i];
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 32; i++) {
    // Known at compile time once unrolled: no shift is computed and `held` stays in registers.
    const int shift = i * BITS % 32;
    uint value = held[i * BITS / 32] >> shift;
    if (shift + BITS > 32) {
      value |= held[i * BITS / 32 + 1] << (32 - shift);
    }
    sum = metal::fma(values[i], float(value & ((1u << BITS) - 1u)), sum);
  }
  return sum;
}

// `result[r]` = row `first + r` times `vector`, the same in all threads of the simdgroup. Rows past
// the end repeat the last one.
template <typename Vector>
inline void multiply_rows(
    thread Vector& vector,
    const device uint* words,
    const device T* scales,
    const device T* biases,
    int first,
    uint lane,
    thread float* result) {
  constexpr int chunks = COLUMNS / 32;
  constexpr bool all_tiles_full = ROWS % (SIMDGROUPS * ROWS_EACH) == 0;
#pragma unroll
  for (int r = 0; r < ROWS_EACH; r++) {
    result[r] = 0.0f;
  }
  for (int chunk = int(lane); chunk < chunks; chunk += 32) {
    float values[32];
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < 32; i++) {
      values[i] = vector.value(chunk * 32 + i);
      sum += values[i];
    }
#pragma unroll
    for (int r = 0; r < ROWS_EACH; r++) {
      const int row = all_tiles_full ? first + r : metal::min(first + r, ROWS - 1);
      const int group = row * (COLUMNS / GROUP_SIZE) + chunk * 32 / GROUP_SIZE;
      const float dot = codes_dot(words + (row * chunks + chunk) * BITS, values);
      result[r] = metal::fma(float(scales[group]), dot, result[r]);
      result[r] = metal::fma(float(biases[group]), sum, result[r]);
    }
  }
  const float factor = vector.factor();
#pragma unroll
  for (int r = 0; r < ROWS_EACH; r++) {
    result[r] = metal::simd_sum(result[r]) * factor;
  }
}

}  // namespace apertus
