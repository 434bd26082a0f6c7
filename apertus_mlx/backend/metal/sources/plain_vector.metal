// What a matrix is multiplied by: the vector as it is.
//
// Constants: T.

namespace apertus {

struct PlainVector {
  const device T* x;

  float value(int column) { return float(x[column]); }
  float factor() { return 1.0f; }
};

}  // namespace apertus
