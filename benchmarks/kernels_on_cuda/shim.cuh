// Stands in for <metal_stdlib> under NVRTC with --device-as-default-execution-space: a thread is a
// thread, a threadgroup a block, a simdgroup a warp.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
using uint = unsigned int;
using bfloat16_t = __nv_bfloat16;
using float16_t = __half;
__device__ __forceinline__ uint metal_thread() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}
namespace metal {
constexpr uint WARP = 0xffffffffu;
__device__ __forceinline__ float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
__device__ __forceinline__ float rint(float a) { return ::rintf(a); }
template <typename T>
__device__ __forceinline__ T min(T a, T b) {
  return b < a ? b : a;
}
template <typename T>
__device__ __forceinline__ T max(T a, T b) {
  return a < b ? b : a;
}
__device__ __forceinline__ float simd_sum(float v) {
  for (int other = 16; other; other >>= 1) v += __shfl_xor_sync(WARP, v, other);
  return v;
}
template <typename T>
__device__ __forceinline__ T simd_max(T v) {
  for (int other = 16; other; other >>= 1) v = max(v, __shfl_xor_sync(WARP, v, other));
  return v;
}
template <typename T>
__device__ __forceinline__ T simd_min(T v) {
  for (int other = 16; other; other >>= 1) v = min(v, __shfl_xor_sync(WARP, v, other));
  return v;
}
namespace precise {
__device__ __forceinline__ float rsqrt(float a) { return __frsqrt_rn(a); }
__device__ __forceinline__ float cos(float a) { return ::cosf(a); }
__device__ __forceinline__ float sin(float a) { return ::sinf(a); }
__device__ __forceinline__ float exp(float a) { return ::expf(a); }
}  // namespace precise
enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };
__device__ __forceinline__ void threadgroup_barrier(mem_flags) { __syncthreads(); }
__device__ __forceinline__ void simdgroup_barrier(mem_flags) { __syncwarp(); }
}  // namespace metal
template <typename T>
__device__ __forceinline__ T as_type(uint v);
template <>
__device__ __forceinline__ float as_type<float>(uint v) {
  return __uint_as_float(v);
}
// CUDA finds the address space by itself.
#define device
#define constant
#define thread
#define threadgroup
