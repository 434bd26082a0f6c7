// half and bfloat with Metal's rounding: each operation rounds its result to the type.
//
// half op half is half, bfloat op bfloat is bfloat, an integer becomes the 16-bit type first, and
// with a float everything becomes float.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <type_traits>

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;

template <class To, class From>
inline To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type keeps the size");
  To to;
  __builtin_memcpy(&to, &from, sizeof to);
  return to;
}

namespace harness {

// Eight exponent bits: the upper half of a float.
struct BrainFormat {
  static float widen(uint16_t bits) {
    return as_type<float>(uint32_t(bits) << 16);
  }

  static uint16_t round(float value) {
    const uint32_t bits = as_type<uint32_t>(value);
    const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
    if (is_nan) {
      return uint16_t((bits >> 16) | 0x40u);
    }
    const uint32_t half_to_even = 0x7fffu + ((bits >> 16) & 1u);
    return uint16_t((bits + half_to_even) >> 16);
  }
};

// IEEE binary16.
struct HalfFormat {
  static float widen(uint16_t bits) {
    return float(as_type<_Float16>(bits));
  }

  static uint16_t round(float value) {
    return as_type<uint16_t>(_Float16(value));
  }
};

template <class Format>
struct Float16 {
  uint16_t bits;

  Float16() = default;

  template <class Number, class = std::enable_if_t<std::is_arithmetic<Number>::value>>
  Float16(Number value) : bits(Format::round(float(value))) {}

  template <class Other, class = std::enable_if_t<!std::is_same<Format, Other>::value>>
  explicit Float16(Float16<Other> value) : bits(Format::round(float(value))) {}

  operator float() const {
    return Format::widen(bits);
  }

  Float16 operator-() const {
    Float16 negative;
    negative.bits = bits ^ 0x8000u;
    return negative;
  }
};

template <class T>
struct is_float16 : std::false_type {};
template <class Format>
struct is_float16<Float16<Format>> : std::true_type {};

template <class T>
using if_integer = std::enable_if_t<std::is_integral<T>::value>;
template <class T>
using if_number = std::enable_if_t<std::is_arithmetic<T>::value>;

#define HARNESS_ARITHMETIC(op)                                     \
  template <class F>                                               \
  inline Float16<F> operator op(Float16<F> a, Float16<F> b) {      \
    return Float16<F>(float(a) op float(b));                       \
  }                                                                \
  template <class F, class I, class = if_integer<I>>               \
  inline Float16<F> operator op(Float16<F> a, I b) {               \
    return Float16<F>(float(a) op float(Float16<F>(b)));           \
  }                                                                \
  template <class F, class I, class = if_integer<I>>               \
  inline Float16<F> operator op(I a, Float16<F> b) {               \
    return Float16<F>(float(Float16<F>(a)) op float(b));           \
  }                                                                \
  template <class F>                                               \
  inline float operator op(Float16<F> a, float b) {                \
    return float(a) op b;                                          \
  }                                                                \
  template <class F>                                               \
  inline float operator op(float a, Float16<F> b) {                \
    return a op float(b);                                          \
  }                                                                \
  template <class F, class U>                                      \
  inline Float16<F>& operator op##=(Float16<F>& a, U b) {          \
    a = Float16<F>(float(a op b));                                 \
    return a;                                                      \
  }
HARNESS_ARITHMETIC(+)
HARNESS_ARITHMETIC(-)
HARNESS_ARITHMETIC(*)
HARNESS_ARITHMETIC(/)
#undef HARNESS_ARITHMETIC

#define HARNESS_COMPARISON(op)                                     \
  template <class F>                                               \
  inline bool operator op(Float16<F> a, Float16<F> b) {            \
    return float(a) op float(b);                                   \
  }                                                                \
  template <class F, class N, class = if_number<N>>                \
  inline bool operator op(Float16<F> a, N b) {                     \
    return float(a) op float(b);                                   \
  }
HARNESS_COMPARISON(<)
HARNESS_COMPARISON(>)
HARNESS_COMPARISON(<=)
HARNESS_COMPARISON(>=)
HARNESS_COMPARISON(==)
HARNESS_COMPARISON(!=)
#undef HARNESS_COMPARISON

}  // namespace harness

typedef harness::Float16<harness::HalfFormat> half;
typedef harness::Float16<harness::BrainFormat> bfloat;
typedef half float16_t;
typedef bfloat bfloat16_t;

static_assert(sizeof(half) == 2 && std::is_trivially_copyable<half>::value, "16 bits, no more");
