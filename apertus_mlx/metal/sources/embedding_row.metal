// One row of a quantized table: scale * code + bias, computed in float32 and rounded once. Codes of
// BITS bits are packed densely into 32-bit words, lowest bits first.
//
// Constants: T, BITS, GROUP_SIZE, COLUMNS.

namespace apertus {

// Code `index` of a row in memory; a row fills its words.
inline float code_at(const device uint* row, int index) {
  const int bit = index * BITS;
  const int shift = bit % 32;
  uint value = row[bit / 32] >> shift;
  if (shift + BITS > 32) {
    value |= row[bit / 32 + 1] << (32 - shift);
  }
  return float(value & ((1u << BITS) - 1u));
}

inline void embedding_value(
    int token,
    const device uint* words,
    const device T* scales,
    const device T* biases,
    int column,
    device T* row) {
  const int group = token * (COLUMNS / GROUP_SIZE) + column / GROUP_SIZE;
  const float code = code_at(words + token * (COLUMNS / 32 * BITS), column);
  row[column] = static_cast<T>(metal::fma(float(scales[group]), code, float(biases[group])));
}

}  // namespace apertus
