#include "runtime/threadgroup_memory.h"

#include <stdint.h>
#include <string.h>

#include <vector>

#include "runtime/buffers.h"
#include "runtime/fibers.h"

namespace runtime {
namespace {

constexpr size_t kLimit = 32 * 1024;
// An address this close to a variable is meant to be in it.
constexpr ptrdiff_t kNear = 4096;

struct Variable {
  const char* name;
  Buffer buffer;
};

struct Memory {
  std::vector<Variable> variables;
  size_t bytes;
  int poison;
};

Memory memory;

}  // namespace

void* threadgroup_memory(const char* name, size_t bytes) {
  for (const Variable& variable : memory.variables) {
    if (!strcmp(variable.name, name)) {
      return variable.buffer.data;
    }
  }
  memory.bytes += bytes;
  if (memory.bytes > kLimit) {
    fail("%zu bytes of threadgroup memory; Metal has %zu", memory.bytes, kLimit);
  }
  Buffer buffer;
  if (harness_allocate(&buffer, bytes, nullptr, memory.poison)) {
    fail("no memory for threadgroup variable %s", name);
  }
  memory.variables.push_back({name, buffer});
  return buffer.data;
}

void prepare_threadgroup_memory(int poison) {
  memory.poison = poison;
}

void release_threadgroup_memory() {
  for (const Variable& variable : memory.variables) {
    harness_release(&variable.buffer);
  }
  memory.variables.clear();
  memory.bytes = 0;
}

void poison_threadgroup_memory() {
  for (const Variable& variable : memory.variables) {
    memset(variable.buffer.data, memory.poison, variable.buffer.bytes);
  }
}

void check_threadgroup_memory() {
  for (const Variable& variable : memory.variables) {
    const ptrdiff_t offset = harness_written_beside(&variable.buffer, memory.poison);
    if (offset != PTRDIFF_MIN) {
      fail("writes beside threadgroup variable %s (%zu bytes) at byte %td", variable.name,
           variable.buffer.bytes, offset);
    }
  }
}

const char* threadgroup_variable_near(const void* address) {
  for (const Variable& variable : memory.variables) {
    const ptrdiff_t offset = static_cast<const unsigned char*>(address) - variable.buffer.data;
    if (offset > -kNear && offset < ptrdiff_t(variable.buffer.bytes) + kNear) {
      return variable.name;
    }
  }
  return nullptr;
}

}  // namespace runtime
