// The threads of one threadgroup as fibers on one thread of the host.
//
// A fiber runs until it meets others (`meet`) or returns; who runs next is the schedule's choice.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace runtime {

constexpr size_t kPublishedBytes = 16;

enum class Scope { simdgroup, threadgroup };

// Where a thread stands; threads may meet only at equal places.
struct Place {
  const char* operation;
  const char* file;
  int line;
};

// Ends the launch with this message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Suspends the calling thread until every thread of its group that has not returned is at `place`.
// `value` is what it shows to its simdgroup there.
void meet(Scope scope, Place place, const void* value, size_t bytes);

// Of the calling thread's last meeting: who was there (a bit per lane), and what they showed.
uint32_t active_lanes();
const void* published(int lane);

// The calling thread's lane in its simdgroup.
int lane();

// Whether reductions combine pairwise rather than in lane order.
bool reduces_pairwise();

enum class Order { forward, reverse, random };

struct Schedule {
  Order order;
  uint32_t seed;
  bool reduces_pairwise;
};

// Makes room for threadgroups of up to `threads`.
void prepare(const Schedule& schedule, int threads);

// Gives back what `prepare` took: a process may hold few mappings, and loads many kernels.
void release_stacks();

// Runs one threadgroup to its end.
void run_threadgroup(int threads);

// The thread that runs, or ran last.
int current_thread();

// Shuffles `items` if the order is random, and puts them in order otherwise.
void arrange(int* items, int count);

// Ends the launch with the message that is already in `message()`; safe in a signal handler.
[[noreturn]] void abandon();
char* message();
constexpr size_t kMessageBytes = 512;

// Calls `body`; false if the launch was ended before `body` returned.
bool survives(void (*body)());

}  // namespace runtime

// The kernel's thread number `thread` of the current threadgroup; the translation writes it.
extern "C" void harness_run_thread(int thread);
