// What a matrix is multiplied by: the vector after RMSNorm.
//
// Its root mean square multiplies the sums afterwards, so that one pass over the vector finds both.
//
// Constants: T, COLUMNS, EPS.

namespace apertus {

struct NormedVector {
  const device T* x;
  const device T* weight;
  float squares;

  float value(int column) {
    const float v = float(x[column]);
    squares = metal::fma(v, v, squares);
    return v * float(weight[column]);
  }
  float factor() {
    return metal::precise::rsqrt(metal::simd_sum(squares) / float(COLUMNS) + EPS);
  }
};

}  // namespace apertus
