// Metal's math functions, computed with the host's: 16-bit arguments go through float and round.
//
// Metal has neither expm1, log1p, erf nor double; the translation forbids those words.
#pragma once

#include "runtime/fibers.h"
#include "shim/types16.h"

namespace metal {

template <class T>
using if_floating =
    std::enable_if_t<std::is_same<T, float>::value || harness::is_float16<T>::value, T>;

#define HARNESS_UNARY(name)                                    \
  template <class T>                                           \
  inline if_floating<T> name(T x) {                            \
    return T(__builtin_##name##f(float(x)));                   \
  }
#define HARNESS_TRANSCENDENTALS                                \
  HARNESS_UNARY(exp)                                           \
  HARNESS_UNARY(exp2)                                          \
  HARNESS_UNARY(log)                                           \
  HARNESS_UNARY(log2)                                          \
  HARNESS_UNARY(sqrt)                                          \
  HARNESS_UNARY(sin)                                           \
  HARNESS_UNARY(cos)                                           \
  HARNESS_UNARY(tanh)                                          \
  template <class T>                                           \
  inline if_floating<T> rsqrt(T x) {                           \
    return T(1.0f / __builtin_sqrtf(float(x)));                \
  }                                                            \
  template <class T>                                           \
  inline if_floating<T> pow(T x, T y) {                        \
    return T(__builtin_powf(float(x), float(y)));              \
  }

HARNESS_TRANSCENDENTALS
HARNESS_UNARY(floor)
HARNESS_UNARY(ceil)
HARNESS_UNARY(trunc)
HARNESS_UNARY(rint)
HARNESS_UNARY(round)
HARNESS_UNARY(fabs)

namespace precise {
HARNESS_TRANSCENDENTALS
}
namespace fast {
HARNESS_TRANSCENDENTALS
}
#undef HARNESS_TRANSCENDENTALS
#undef HARNESS_UNARY

template <class T>
inline if_floating<T> abs(T x) {
  return T(__builtin_fabsf(float(x)));
}

inline int abs(int x) {
  return x < 0 ? -x : x;
}

template <class T>
inline if_floating<T> fma(T a, T b, T c) {
  return T(__builtin_fmaf(float(a), float(b), float(c)));
}

template <class T>
inline T min(T a, T b) {
  return b < a ? b : a;
}

template <class T>
inline T max(T a, T b) {
  return a < b ? b : a;
}

template <class T>
inline T clamp(T x, T low, T high) {
  return min(max(x, low), high);
}

template <class T>
inline T select(T if_false, T if_true, bool condition) {
  return condition ? if_true : if_false;
}

template <class T>
inline bool isnan(T x) {
  return __builtin_isnan(float(x));
}

template <class T>
inline bool isinf(T x) {
  return __builtin_isinf(float(x));
}

template <class T>
inline bool isfinite(T x) {
  return __builtin_isfinite(float(x));
}

inline uint popcount(uint x) {
  return uint(__builtin_popcount(x));
}

inline uint clz(uint x) {
  return x ? uint(__builtin_clz(x)) : 32u;
}

inline uint ctz(uint x) {
  return x ? uint(__builtin_ctz(x)) : 32u;
}

inline uint extract_bits(uint x, uint offset, uint bits) {
  if (offset + bits > 32u) {
    runtime::fail("extract_bits: offset %u + bits %u exceeds 32, which is undefined", offset, bits);
  }
  return bits == 32u ? x : (x >> offset) & ((1u << bits) - 1u);
}

template <class T>
struct numeric_limits;

template <>
struct numeric_limits<float> {
  static constexpr float max() {
    return 3.40282347e38f;
  }
  static constexpr float lowest() {
    return -max();
  }
  static constexpr float infinity() {
    return __builtin_inff();
  }
};

template <>
struct numeric_limits<half> {
  static half max() {
    return half(65504.0f);
  }
  static half lowest() {
    return half(-65504.0f);
  }
  static half infinity() {
    return half(__builtin_inff());
  }
};

template <>
struct numeric_limits<bfloat> {
  static bfloat max() {
    return bfloat(as_type<float>(0x7f7f0000u));
  }
  static bfloat lowest() {
    return -max();
  }
  static bfloat infinity() {
    return bfloat(__builtin_inff());
  }
};

template <>
struct numeric_limits<int> {
  static constexpr int max() {
    return 0x7fffffff;
  }
  static constexpr int lowest() {
    return -0x7fffffff - 1;
  }
};

template <>
struct numeric_limits<uint> {
  static constexpr uint max() {
    return 0xffffffffu;
  }
  static constexpr uint lowest() {
    return 0u;
  }
};

using std::enable_if_t;
using std::is_same;

}  // namespace metal

#ifndef INFINITY
#define INFINITY (__builtin_inff())
#endif
