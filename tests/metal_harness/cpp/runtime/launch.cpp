#include "runtime/launch.h"

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <sys/time.h>

#include <algorithm>
#include <vector>

#include "runtime/threadgroup_memory.h"

// The same fields, in the same order, are in run.py.
struct Request {
  void* const* buffers;
  uint32_t grid[3];
  uint32_t threadgroup[3];
  int32_t order;
  uint32_t seed;
  int32_t reduces_pairwise;
  int32_t poison;
  double cpu_limit_s;
};

namespace runtime {
namespace {

constexpr uint kLanes = 32;

struct Launch {
  Request request;
  uint3 grid;
  uint3 threadgroup;
  uint3 groups;
  // The current threadgroup; at the grid's edge it is smaller.
  uint3 group;
  uint3 group_threads;
  // The threadgroups as the schedule arranges them.
  std::vector<int> order;
};

Launch launch;
volatile sig_atomic_t is_running = 0;
pthread_t runner;

uint volume(uint3 extent) {
  return extent.x * extent.y * extent.z;
}

uint groups_for(uint threads, uint group) {
  return (threads + group - 1) / group;
}

uint simdgroups_for(uint threads) {
  return groups_for(threads, kLanes);
}

uint3 unravel(uint index, uint3 extent) {
  return uint3(index % extent.x, index / extent.x % extent.y, index / (extent.x * extent.y));
}

void run_all_threadgroups() {
  const Request& request = launch.request;
  launch.grid = uint3(request.grid[0], request.grid[1], request.grid[2]);
  for (int i = 0; i < 3; i++) {
    launch.threadgroup[i] = std::min(request.threadgroup[i], request.grid[i]);
    launch.groups[i] = groups_for(launch.grid[i], launch.threadgroup[i]);
  }
  const Schedule schedule = {Order(request.order), request.seed, request.reduces_pairwise != 0};
  prepare_threadgroup_memory(request.poison);
  prepare(schedule, int(volume(launch.threadgroup)));
  std::vector<int>& order = launch.order;
  order.resize(volume(launch.groups));
  arrange(order.data(), int(order.size()));
  for (int index : order) {
    launch.group = unravel(uint(index), launch.groups);
    for (int i = 0; i < 3; i++) {
      const uint begin = launch.group[i] * launch.threadgroup[i];
      launch.group_threads[i] = std::min(launch.threadgroup[i], launch.grid[i] - begin);
    }
    poison_threadgroup_memory();
    run_threadgroup(int(volume(launch.group_threads)));
  }
  check_threadgroup_memory();
}

// ------------------------------------------------------------------------- faults as messages

void on_fault(int signal_number, siginfo_t* info, void*) {
  if (!is_running && signal_number == SIGVTALRM) {
    // The launch was quicker than the signal.
    return;
  }
  if (!is_running) {
    signal(signal_number, SIG_DFL);
    raise(signal_number);
    return;
  }
  if (signal_number == SIGVTALRM) {
    if (!pthread_equal(pthread_self(), runner)) {
      pthread_kill(runner, signal_number);
      return;
    }
    snprintf(message(), kMessageBytes, "does not end: still running after %g s of processor time",
             launch.request.cpu_limit_s);
  } else if (signal_number == SIGSEGV || signal_number == SIGBUS) {
    const char* variable = threadgroup_variable_near(info->si_addr);
    if (variable) {
      snprintf(message(), kMessageBytes, "bad memory access beside threadgroup variable %s",
               variable);
    } else {
      snprintf(message(), kMessageBytes, "bad memory access at %p by thread %d", info->si_addr,
               current_thread());
    }
  } else {
    snprintf(message(), kMessageBytes,
             "undefined behaviour (misaligned access, shift, overflow, conversion or array bound) "
             "in thread %d",
             current_thread());
  }
  abandon();
}

constexpr int kSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP, SIGFPE, SIGVTALRM};
constexpr int kSignalCount = sizeof kSignals / sizeof *kSignals;

// Zero lifts the limit.
void limit_processor_time(double seconds) {
  itimerval timer = {};
  timer.it_value.tv_sec = time_t(seconds);
  timer.it_value.tv_usec = suseconds_t(1e6 * (seconds - double(timer.it_value.tv_sec)));
  setitimer(ITIMER_VIRTUAL, &timer, nullptr);
}

bool run_and_catch_faults() {
  static char stack_bytes[64 * 1024];
  stack_t stack = {};
  stack.ss_sp = stack_bytes;
  stack.ss_size = sizeof stack_bytes;
  stack_t previous_stack;
  sigaltstack(&stack, &previous_stack);
  struct sigaction action = {};
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  struct sigaction previous[kSignalCount];
  for (int i = 0; i < kSignalCount; i++) {
    sigaction(kSignals[i], &action, &previous[i]);
  }
  runner = pthread_self();
  is_running = 1;
  limit_processor_time(launch.request.cpu_limit_s);
  const bool survived = survives(run_all_threadgroups);
  limit_processor_time(0);
  is_running = 0;
  for (int i = 0; i < kSignalCount; i++) {
    sigaction(kSignals[i], &previous[i], nullptr);
  }
  sigaltstack(&previous_stack, nullptr);
  release_stacks();
  release_threadgroup_memory();
  return survived;
}

}  // namespace

Position position(int thread) {
  const uint index = uint(thread);
  Position position = {};
  position.dispatch_threads_per_threadgroup = launch.threadgroup;
  position.grid_origin = uint3(0u);
  position.grid_size = launch.grid;
  position.threads_per_grid = launch.grid;
  position.threadgroups_per_grid = launch.groups;
  position.threadgroup_position_in_grid = launch.group;
  position.threads_per_threadgroup = launch.group_threads;
  position.thread_position_in_threadgroup = unravel(index, launch.group_threads);
  position.thread_position_in_grid =
      launch.group * launch.threadgroup + position.thread_position_in_threadgroup;
  position.dispatch_simdgroups_per_threadgroup = simdgroups_for(volume(launch.threadgroup));
  position.simdgroups_per_threadgroup = simdgroups_for(volume(launch.group_threads));
  position.simdgroup_index_in_threadgroup = index / kLanes;
  position.thread_execution_width = kLanes;
  position.threads_per_simdgroup = kLanes;
  position.thread_index_in_simdgroup = index % kLanes;
  position.thread_index_in_threadgroup = index;
  return position;
}

void* const* buffers() {
  return launch.request.buffers;
}

}  // namespace runtime

// Null if the kernel ran to its end, else what went wrong.
extern "C" const char* harness_launch(const Request* request) {
  runtime::launch.request = *request;
  return runtime::run_and_catch_faults() ? nullptr : runtime::message();
}
