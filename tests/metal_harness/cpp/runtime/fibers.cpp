#include "runtime/fibers.h"

#include <setjmp.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <vector>

namespace runtime {
namespace {

constexpr int kLanes = 32;
constexpr size_t kStackBytes = 128 * 1024;

enum class State { ready, in_simdgroup, in_threadgroup, returned };

struct alignas(16) Published {
  unsigned char bytes[kPublishedBytes];
};

struct Fiber {
  void* stack_pointer;
  char* stack_top;
  State state;
  Place place;
  // Meetings of its simdgroup so far.  Two slots are enough: nobody is two meetings ahead.
  unsigned meetings;
  Published published[2];
  uint32_t active[2];
};

struct Machine {
  std::vector<Fiber> fibers;
  Schedule schedule;
  uint64_t random;
  int current;
  void* scheduler_stack_pointer;
  sigjmp_buf escape;
  char message[kMessageBytes];
};

Machine machine;

size_t page() {
  return size_t(sysconf(_SC_PAGESIZE));
}

Fiber& me() {
  return machine.fibers[machine.current];
}

bool same_place(const Place& a, const Place& b) {
  return a.line == b.line && !strcmp(a.file, b.file) && !strcmp(a.operation, b.operation);
}

// ------------------------------------------------------------------------- switching stacks

// Saves the registers that a function must preserve, then continues where `load` left off.
extern "C" void harness_switch(void** save, void* load);

#define HARNESS_STRING_(x) #x
#define HARNESS_STRING(x) HARNESS_STRING_(x)
#define HARNESS_SWITCH HARNESS_STRING(__USER_LABEL_PREFIX__) "harness_switch"

#if defined(__x86_64__)
__asm__(".text\n"
        ".p2align 4\n"
        ".globl " HARNESS_SWITCH "\n"
        HARNESS_SWITCH ":\n"
        "  pushq %rbp\n"
        "  pushq %rbx\n"
        "  pushq %r12\n"
        "  pushq %r13\n"
        "  pushq %r14\n"
        "  pushq %r15\n"
        "  movq %rsp, (%rdi)\n"
        "  movq %rsi, %rsp\n"
        "  popq %r15\n"
        "  popq %r14\n"
        "  popq %r13\n"
        "  popq %r12\n"
        "  popq %rbx\n"
        "  popq %rbp\n"
        "  retq\n");

// A stack on which `harness_switch` returns into `start`.
void* fresh_stack(char* top, void (*start)()) {
  void** stack = reinterpret_cast<void**>(top);
  *--stack = nullptr;
  *--stack = reinterpret_cast<void*>(start);
  for (int saved_register = 0; saved_register < 6; saved_register++) {
    *--stack = nullptr;
  }
  return stack;
}
#elif defined(__aarch64__)
__asm__(".text\n"
        ".p2align 4\n"
        ".globl " HARNESS_SWITCH "\n"
        HARNESS_SWITCH ":\n"
        "  sub sp, sp, #160\n"
        "  stp x19, x20, [sp]\n"
        "  stp x21, x22, [sp, #16]\n"
        "  stp x23, x24, [sp, #32]\n"
        "  stp x25, x26, [sp, #48]\n"
        "  stp x27, x28, [sp, #64]\n"
        "  stp x29, x30, [sp, #80]\n"
        "  stp d8, d9, [sp, #96]\n"
        "  stp d10, d11, [sp, #112]\n"
        "  stp d12, d13, [sp, #128]\n"
        "  stp d14, d15, [sp, #144]\n"
        "  mov x9, sp\n"
        "  str x9, [x0]\n"
        "  mov sp, x1\n"
        "  ldp x19, x20, [sp]\n"
        "  ldp x21, x22, [sp, #16]\n"
        "  ldp x23, x24, [sp, #32]\n"
        "  ldp x25, x26, [sp, #48]\n"
        "  ldp x27, x28, [sp, #64]\n"
        "  ldp x29, x30, [sp, #80]\n"
        "  ldp d8, d9, [sp, #96]\n"
        "  ldp d10, d11, [sp, #112]\n"
        "  ldp d12, d13, [sp, #128]\n"
        "  ldp d14, d15, [sp, #144]\n"
        "  add sp, sp, #160\n"
        "  ret\n");

void* fresh_stack(char* top, void (*start)()) {
  constexpr size_t frame_bytes = 160;
  constexpr size_t return_address = 88;
  char* stack = top - frame_bytes;
  memset(stack, 0, frame_bytes);
  memcpy(stack + return_address, &start, sizeof start);
  return stack;
}
#else
#error "The harness switches stacks on x86-64 and arm64 only"
#endif

void pause() {
  harness_switch(&me().stack_pointer, machine.scheduler_stack_pointer);
}

void resume(int thread) {
  machine.current = thread;
  harness_switch(&machine.scheduler_stack_pointer, machine.fibers[thread].stack_pointer);
}

void run_fiber() {
  harness_run_thread(machine.current);
  me().state = State::returned;
  pause();
  __builtin_trap();
}

// ---------------------------------------------------------------------- meeting and parting

// Lets a simdgroup go on whose threads all wait or have returned; false if none waits for it.
bool release_simdgroup(int begin, int end) {
  int first = -1;
  int elsewhere = -1;
  uint32_t active = 0;
  for (int i = begin; i < end; i++) {
    const Fiber& fiber = machine.fibers[i];
    if (fiber.state == State::in_simdgroup) {
      first = first < 0 ? i : first;
      active |= 1u << (i - begin);
    } else if (fiber.state != State::returned) {
      elsewhere = i;
    }
  }
  if (first < 0) {
    return false;
  }
  const Place& place = machine.fibers[first].place;
  for (int i = begin; i < end; i++) {
    Fiber& fiber = machine.fibers[i];
    if (fiber.state != State::returned && !same_place(fiber.place, place)) {
      elsewhere = i;
    }
  }
  if (elsewhere >= 0) {
    const Place& other = machine.fibers[elsewhere].place;
    fail("divergent collective: thread %d is in %s at %s:%d, thread %d in %s at %s:%d", first,
         place.operation, place.file, place.line, elsewhere, other.operation, other.file,
         other.line);
  }
  for (int i = begin; i < end; i++) {
    Fiber& fiber = machine.fibers[i];
    if (fiber.state == State::in_simdgroup) {
      fiber.state = State::ready;
      fiber.active[fiber.meetings & 1] = active;
      fiber.meetings++;
    }
  }
  return true;
}

// Lets the threadgroup go on; every thread waits for it or has returned.
void release_threadgroup(int threads) {
  int first = -1;
  int waiting = 0;
  for (int i = 0; i < threads; i++) {
    if (machine.fibers[i].state == State::in_threadgroup) {
      first = first < 0 ? i : first;
      waiting++;
    }
  }
  const Place& place = machine.fibers[first].place;
  if (waiting != threads) {
    fail("%s at %s:%d is reached by %d of %d threads, the others have returned", place.operation,
         place.file, place.line, waiting, threads);
  }
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = machine.fibers[i];
    if (!same_place(fiber.place, place)) {
      fail("divergent threadgroup_barrier: thread %d is at %s:%d, thread %d at %s:%d", first,
           place.file, place.line, i, fiber.place.file, fiber.place.line);
    }
    fiber.state = State::ready;
  }
}

uint64_t draw() {
  machine.random ^= machine.random << 13;
  machine.random ^= machine.random >> 7;
  machine.random ^= machine.random << 17;
  return machine.random;
}

// Runs every ready thread of a simdgroup until it waits, or lets them all go on; false if neither
// was possible.
bool step_simdgroup(int begin, int end) {
  int threads[kLanes];
  const int count = end - begin;
  arrange(threads, count);
  bool ran = false;
  for (int i = 0; i < count; i++) {
    const int thread = begin + threads[i];
    if (machine.fibers[thread].state == State::ready) {
      resume(thread);
      ran = true;
    }
  }
  return ran || release_simdgroup(begin, end);
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(machine.message, kMessageBytes, format, arguments);
  va_end(arguments);
  abandon();
}

void abandon() {
  siglongjmp(machine.escape, 1);
}

char* message() {
  return machine.message;
}

bool survives(void (*body)()) {
  if (sigsetjmp(machine.escape, 1)) {
    return false;
  }
  body();
  return true;
}

void meet(Scope scope, Place place, const void* value, size_t bytes) {
  Fiber& fiber = me();
  fiber.place = place;
  if (scope == Scope::threadgroup) {
    fiber.state = State::in_threadgroup;
  } else {
    fiber.state = State::in_simdgroup;
    memcpy(fiber.published[fiber.meetings & 1].bytes, value, bytes);
  }
  pause();
}

uint32_t active_lanes() {
  return me().active[(me().meetings - 1) & 1];
}

const void* published(int lane) {
  const int thread = machine.current / kLanes * kLanes + lane;
  return machine.fibers[thread].published[(me().meetings - 1) & 1].bytes;
}

int lane() {
  return machine.current % kLanes;
}

bool reduces_pairwise() {
  return machine.schedule.reduces_pairwise;
}

int current_thread() {
  return machine.current;
}

void arrange(int* items, int count) {
  const bool reverse = machine.schedule.order == Order::reverse;
  for (int i = 0; i < count; i++) {
    items[i] = reverse ? count - 1 - i : i;
  }
  if (machine.schedule.order == Order::random) {
    for (int i = count - 1; i > 0; i--) {
      std::swap(items[i], items[draw() % uint64_t(i + 1)]);
    }
  }
}

void prepare(const Schedule& schedule, int threads) {
  machine.schedule = schedule;
  machine.random = (schedule.seed + 1) * 0x9E3779B97F4A7C15ull;
  while (machine.fibers.size() < size_t(threads)) {
    // The page below each stack is not mapped: a kernel that overflows it is caught.
    char* map = static_cast<char*>(mmap(nullptr, page() + kStackBytes, PROT_READ | PROT_WRITE,
                                        MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (map == MAP_FAILED || mprotect(map, page(), PROT_NONE)) {
      fail("no memory for the stacks of %d threads", threads);
    }
    Fiber fiber = {};
    fiber.stack_top = map + page() + kStackBytes;
    machine.fibers.push_back(fiber);
  }
}

void release_stacks() {
  for (const Fiber& fiber : machine.fibers) {
    munmap(fiber.stack_top - kStackBytes - page(), page() + kStackBytes);
  }
  machine.fibers.clear();
}

void run_threadgroup(int threads) {
  for (int i = 0; i < threads; i++) {
    Fiber& fiber = machine.fibers[i];
    fiber.state = State::ready;
    fiber.meetings = 0;
    fiber.stack_pointer = fresh_stack(fiber.stack_top, run_fiber);
  }
  const int simdgroups = (threads + kLanes - 1) / kLanes;
  // In a fixed order each simdgroup runs as far ahead of the others as it can; a random order
  // mixes their steps.
  const bool runs_ahead = machine.schedule.order != Order::random;
  for (;;) {
    int order[kLanes];
    arrange(order, simdgroups);
    bool moved = false;
    for (int i = 0; i < simdgroups; i++) {
      const int begin = order[i] * kLanes;
      const int end = std::min(begin + kLanes, threads);
      while (step_simdgroup(begin, end)) {
        moved = true;
        if (!runs_ahead) {
          break;
        }
      }
    }
    bool returned = true;
    for (int i = 0; i < threads; i++) {
      returned = returned && machine.fibers[i].state == State::returned;
    }
    if (returned) {
      return;
    }
    if (!moved) {
      release_threadgroup(threads);
    }
  }
}

}  // namespace runtime
