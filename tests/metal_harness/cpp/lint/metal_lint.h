// Declares what a Metal kernel may use, for the lint: nothing is defined and nothing else exists.
//
// The address spaces are real here: a pointer that crosses them does not compile, as in Metal.
#pragma once

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define INFINITY (__builtin_inff())

typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef unsigned long size_t;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef _Float16 half;
typedef __bf16 bfloat;
typedef half float16_t;
typedef bfloat bfloat16_t;

namespace metal {
template <class T, int N>
using vec = T __attribute__((ext_vector_type(N)));
}  // namespace metal

#define LINT_VECTORS(T)              \
  typedef metal::vec<T, 2> T##2;     \
  typedef metal::vec<T, 3> T##3;     \
  typedef metal::vec<T, 4> T##4;
LINT_VECTORS(float)
LINT_VECTORS(half)
LINT_VECTORS(bfloat)
LINT_VECTORS(int)
LINT_VECTORS(uint)
LINT_VECTORS(short)
LINT_VECTORS(ushort)
LINT_VECTORS(char)
LINT_VECTORS(uchar)
#undef LINT_VECTORS

// Plain C++ builds no vector from several values: what Metal spells as a constructor is a function.
template <class Vector, class... Values>
constexpr Vector lint_vector(Values...);
#define float2(...) lint_vector<float2>(__VA_ARGS__)
#define float3(...) lint_vector<float3>(__VA_ARGS__)
#define float4(...) lint_vector<float4>(__VA_ARGS__)
#define half2(...) lint_vector<half2>(__VA_ARGS__)
#define half4(...) lint_vector<half4>(__VA_ARGS__)
#define bfloat2(...) lint_vector<bfloat2>(__VA_ARGS__)
#define bfloat4(...) lint_vector<bfloat4>(__VA_ARGS__)
#define int2(...) lint_vector<int2>(__VA_ARGS__)
#define int4(...) lint_vector<int4>(__VA_ARGS__)
#define uint2(...) lint_vector<uint2>(__VA_ARGS__)
#define uint3(...) lint_vector<uint3>(__VA_ARGS__)
#define uint4(...) lint_vector<uint4>(__VA_ARGS__)

template <class To, class From>
To as_type(From);

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
mem_flags operator|(mem_flags, mem_flags);
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

#define LINT_REDUCTION(name) \
  template <class T>         \
  T name(T);
LINT_REDUCTION(simd_sum)
LINT_REDUCTION(simd_product)
LINT_REDUCTION(simd_max)
LINT_REDUCTION(simd_min)
LINT_REDUCTION(simd_or)
LINT_REDUCTION(simd_and)
LINT_REDUCTION(simd_xor)
LINT_REDUCTION(simd_broadcast_first)
LINT_REDUCTION(simd_prefix_inclusive_sum)
LINT_REDUCTION(simd_prefix_exclusive_sum)
#undef LINT_REDUCTION
bool simd_any(bool);
bool simd_all(bool);

#define LINT_SHUFFLE(name) \
  template <class T>       \
  T name(T, ushort);
LINT_SHUFFLE(simd_shuffle)
LINT_SHUFFLE(simd_broadcast)
LINT_SHUFFLE(simd_shuffle_xor)
LINT_SHUFFLE(simd_shuffle_down)
LINT_SHUFFLE(simd_shuffle_up)
#undef LINT_SHUFFLE

#define LINT_UNARY(name) \
  float name(float);     \
  half name(half);       \
  bfloat name(bfloat);
#define LINT_TRANSCENDENTALS \
  LINT_UNARY(exp)            \
  LINT_UNARY(exp2)           \
  LINT_UNARY(log)            \
  LINT_UNARY(log2)           \
  LINT_UNARY(sqrt)           \
  LINT_UNARY(rsqrt)          \
  LINT_UNARY(sin)            \
  LINT_UNARY(cos)            \
  LINT_UNARY(tanh)           \
  template <class T>         \
  T pow(T, T);
LINT_TRANSCENDENTALS
LINT_UNARY(floor)
LINT_UNARY(ceil)
LINT_UNARY(trunc)
LINT_UNARY(rint)
LINT_UNARY(round)
LINT_UNARY(fabs)
LINT_UNARY(abs)
namespace precise {
LINT_TRANSCENDENTALS
}
namespace fast {
LINT_TRANSCENDENTALS
}
#undef LINT_TRANSCENDENTALS
#undef LINT_UNARY

int abs(int);
template <class T>
T fma(T, T, T);
template <class T>
T min(T, T);
template <class T>
T max(T, T);
template <class T>
T clamp(T, T, T);
template <class T>
T select(T, T, bool);
template <class T>
bool isnan(T);
template <class T>
bool isinf(T);
template <class T>
bool isfinite(T);
uint popcount(uint);
uint clz(uint);
uint ctz(uint);
uint extract_bits(uint, uint, uint);
template <class T, int N>
T dot(vec<T, N>, vec<T, N>);

template <class T>
struct numeric_limits {
  static constexpr T max();
  static constexpr T lowest();
  static constexpr T infinity();
};

template <class T, class U>
struct is_same {
  constant static constexpr bool value = false;
};
template <class T>
struct is_same<T, T> {
  constant static constexpr bool value = true;
};
template <bool Condition, class T = void>
struct enable_if {};
template <class T>
struct enable_if<true, T> {
  typedef T type;
};
template <bool Condition, class T = void>
using enable_if_t = typename enable_if<Condition, T>::type;

}  // namespace metal

using namespace metal;
