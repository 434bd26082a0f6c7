// One launch of a kernel: what MLX's dispatch of `grid` threads in groups of `threadgroup` does.
#pragma once

#include "runtime/fibers.h"
#include "shim/vectors.h"

namespace runtime {

// Metal's attributes of a thread, by their names in Metal.
struct Position {
  uint3 dispatch_threads_per_threadgroup;
  uint3 grid_origin;
  uint3 grid_size;
  uint3 thread_position_in_grid;
  uint3 thread_position_in_threadgroup;
  uint3 threadgroup_position_in_grid;
  uint3 threadgroups_per_grid;
  uint3 threads_per_grid;
  uint3 threads_per_threadgroup;
  uint dispatch_simdgroups_per_threadgroup;
  uint simdgroup_index_in_threadgroup;
  uint simdgroups_per_threadgroup;
  uint thread_execution_width;
  uint thread_index_in_simdgroup;
  uint thread_index_in_threadgroup;
  uint threads_per_simdgroup;
};

// Of thread number `thread` in the current threadgroup.
Position position(int thread);

// The arguments of the kernel, in its order.
void* const* buffers();

}  // namespace runtime
