// What the threads of a simdgroup or threadgroup do together.
//
// Each call suspends its thread until the others are at the same call.  A call under divergence,
// which some hardware permits, is an error here.
#pragma once

#include "runtime/fibers.h"
#include "shim/types16.h"

// The place of the caller: two threads meet only at the same one.
#define HARNESS_PLACE const char* file = __builtin_FILE(), int line = __builtin_LINE()

namespace harness {

constexpr int kLanes = 32;

// What `lane` brought to the meeting that the calling thread has just left.
template <class T>
inline T from_lane(int lane) {
  T value;
  __builtin_memcpy(&value, runtime::published(lane), sizeof value);
  return value;
}

template <class T>
inline void meet(T value, const char* operation, const char* file, int line) {
  static_assert(sizeof(T) <= runtime::kPublishedBytes, "a collective carries at most 16 bytes");
  runtime::meet(runtime::Scope::simdgroup, {operation, file, line}, &value, sizeof value);
}

inline bool is_active(int lane) {
  return runtime::active_lanes() >> lane & 1u;
}

// Hardware combines in an order of its own; in lane order and pairwise are the two extremes.
template <class T, class Combine>
inline T reduce(T value, Combine combine, const char* operation, const char* file, int line) {
  meet(value, operation, file, line);
  T values[kLanes];
  int count = 0;
  for (int lane = 0; lane < kLanes; lane++) {
    if (is_active(lane)) {
      values[count++] = from_lane<T>(lane);
    }
  }
  if (runtime::reduces_pairwise()) {
    while (count > 1) {
      const int kept = (count + 1) / 2;
      for (int i = 0; i < count / 2; i++) {
        values[i] = combine(values[i], values[i + kept]);
      }
      count = kept;
    }
  }
  for (int i = 1; i < count; i++) {
    values[0] = combine(values[0], values[i]);
  }
  return values[0];
}

template <class T>
inline T shuffle(T value, int source, const char* operation, const char* file, int line) {
  meet(value, operation, file, line);
  if (source < 0 || source >= kLanes || !is_active(source)) {
    runtime::fail("%s at %s:%d reads lane %d, which is not there", operation, file, line, source);
  }
  return from_lane<T>(source);
}

template <class T>
inline T running_sum(T value, int end, const char* operation, const char* file, int line) {
  meet(value, operation, file, line);
  T sum = T(0);
  for (int lane = 0; lane < end; lane++) {
    if (is_active(lane)) {
      sum += from_lane<T>(lane);
    }
  }
  return sum;
}

}  // namespace harness

namespace metal {

enum class mem_flags { mem_none = 0, mem_device = 1, mem_threadgroup = 2 };

inline mem_flags operator|(mem_flags a, mem_flags b) {
  return mem_flags(int(a) | int(b));
}

inline void threadgroup_barrier(mem_flags flags, HARNESS_PLACE) {
  if (flags == mem_flags::mem_none) {
    runtime::fail("threadgroup_barrier at %s:%d orders no memory (mem_none)", file, line);
  }
  runtime::meet(runtime::Scope::threadgroup, {"threadgroup_barrier", file, line}, nullptr, 0);
}

inline void simdgroup_barrier(mem_flags, HARNESS_PLACE) {
  harness::meet(0, "simdgroup_barrier", file, line);
}

#define HARNESS_REDUCTION(name, combined)                                                    \
  template <class T>                                                                         \
  inline T name(T value, HARNESS_PLACE) {                                                    \
    const auto combine = [](T a, T b) -> T { return combined; };                             \
    return harness::reduce(value, combine, #name, file, line);                               \
  }
HARNESS_REDUCTION(simd_sum, T(a + b))
HARNESS_REDUCTION(simd_product, T(a * b))
HARNESS_REDUCTION(simd_max, a < b ? b : a)
HARNESS_REDUCTION(simd_min, b < a ? b : a)
HARNESS_REDUCTION(simd_or, T(a | b))
HARNESS_REDUCTION(simd_and, T(a & b))
HARNESS_REDUCTION(simd_xor, T(a ^ b))
#undef HARNESS_REDUCTION

inline bool simd_any(bool value, HARNESS_PLACE) {
  const auto either = [](bool a, bool b) { return a || b; };
  return harness::reduce(value, either, "simd_any", file, line);
}

inline bool simd_all(bool value, HARNESS_PLACE) {
  const auto both = [](bool a, bool b) { return a && b; };
  return harness::reduce(value, both, "simd_all", file, line);
}

template <class T>
inline T simd_shuffle(T value, ushort lane, HARNESS_PLACE) {
  return harness::shuffle(value, lane, "simd_shuffle", file, line);
}

template <class T>
inline T simd_broadcast(T value, ushort lane, HARNESS_PLACE) {
  return harness::shuffle(value, lane, "simd_broadcast", file, line);
}

template <class T>
inline T simd_broadcast_first(T value, HARNESS_PLACE) {
  harness::meet(value, "simd_broadcast_first", file, line);
  return harness::from_lane<T>(__builtin_ctz(runtime::active_lanes()));
}

template <class T>
inline T simd_shuffle_xor(T value, ushort mask, HARNESS_PLACE) {
  return harness::shuffle(value, runtime::lane() ^ mask, "simd_shuffle_xor", file, line);
}

// Lanes whose source would lie beyond the simdgroup keep their own value.
template <class T>
inline T simd_shuffle_down(T value, ushort delta, HARNESS_PLACE) {
  const int source = runtime::lane() + delta;
  const int inside = source < harness::kLanes ? source : runtime::lane();
  return harness::shuffle(value, inside, "simd_shuffle_down", file, line);
}

template <class T>
inline T simd_shuffle_up(T value, ushort delta, HARNESS_PLACE) {
  const int source = runtime::lane() - delta;
  const int inside = source >= 0 ? source : runtime::lane();
  return harness::shuffle(value, inside, "simd_shuffle_up", file, line);
}

template <class T>
inline T simd_prefix_inclusive_sum(T value, HARNESS_PLACE) {
  const int end = runtime::lane() + 1;
  return harness::running_sum(value, end, "simd_prefix_inclusive_sum", file, line);
}

template <class T>
inline T simd_prefix_exclusive_sum(T value, HARNESS_PLACE) {
  const int end = runtime::lane();
  return harness::running_sum(value, end, "simd_prefix_exclusive_sum", file, line);
}

}  // namespace metal
