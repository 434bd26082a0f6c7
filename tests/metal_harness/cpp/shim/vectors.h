// Metal's small vectors: members x, y, z, w and operator[]; no swizzles.
#pragma once

#include "shim/types16.h"

namespace metal {

template <class T, int N>
struct vec;

#define HARNESS_ELEMENTS(N)                  \
  T& operator[](int i) {                     \
    return (&x)[i];                          \
  }                                          \
  const T& operator[](int i) const {         \
    return (&x)[i];                          \
  }                                          \
  vec() = default;                           \
  template <class U>                         \
  explicit vec(vec<U, N> other) {            \
    for (int i = 0; i < N; i++) {            \
      (*this)[i] = T(other[i]);              \
    }                                        \
  }

template <class T>
struct alignas(2 * sizeof(T)) vec<T, 2> {
  T x, y;
  HARNESS_ELEMENTS(2)
  vec(T all) : x(all), y(all) {}
  vec(T a, T b) : x(a), y(b) {}
};

// Three elements take the room of four, as in Metal.
template <class T>
struct alignas(4 * sizeof(T)) vec<T, 3> {
  T x, y, z;
  HARNESS_ELEMENTS(3)
  vec(T all) : x(all), y(all), z(all) {}
  vec(T a, T b, T c) : x(a), y(b), z(c) {}
};

template <class T>
struct alignas(4 * sizeof(T)) vec<T, 4> {
  T x, y, z, w;
  HARNESS_ELEMENTS(4)
  vec(T all) : x(all), y(all), z(all), w(all) {}
  vec(T a, T b, T c, T d) : x(a), y(b), z(c), w(d) {}
};
#undef HARNESS_ELEMENTS

#define HARNESS_ELEMENTWISE(op)                                      \
  template <class T, int N>                                          \
  inline vec<T, N> operator op(vec<T, N> a, vec<T, N> b) {           \
    for (int i = 0; i < N; i++) {                                    \
      a[i] = a[i] op b[i];                                           \
    }                                                                \
    return a;                                                        \
  }                                                                  \
  template <class T, int N>                                          \
  inline vec<T, N> operator op(vec<T, N> a, T b) {                   \
    return a op vec<T, N>(b);                                        \
  }                                                                  \
  template <class T, int N>                                          \
  inline vec<T, N> operator op(T a, vec<T, N> b) {                   \
    return vec<T, N>(a) op b;                                        \
  }                                                                  \
  template <class T, int N>                                          \
  inline vec<T, N>& operator op##=(vec<T, N>& a, vec<T, N> b) {      \
    a = a op b;                                                      \
    return a;                                                        \
  }
HARNESS_ELEMENTWISE(+)
HARNESS_ELEMENTWISE(-)
HARNESS_ELEMENTWISE(*)
HARNESS_ELEMENTWISE(/)
#undef HARNESS_ELEMENTWISE

template <class T, int N>
inline T dot(vec<T, N> a, vec<T, N> b) {
  T sum = a[0] * b[0];
  for (int i = 1; i < N; i++) {
    sum += a[i] * b[i];
  }
  return sum;
}

}  // namespace metal

#define HARNESS_VECTORS(T)           \
  typedef metal::vec<T, 2> T##2;     \
  typedef metal::vec<T, 3> T##3;     \
  typedef metal::vec<T, 4> T##4;
HARNESS_VECTORS(float)
HARNESS_VECTORS(half)
HARNESS_VECTORS(bfloat)
HARNESS_VECTORS(int)
HARNESS_VECTORS(uint)
HARNESS_VECTORS(short)
HARNESS_VECTORS(ushort)
HARNESS_VECTORS(char)
HARNESS_VECTORS(uchar)
#undef HARNESS_VECTORS
