// Variables in threadgroup memory: each has guarded pages of its own.
#pragma once

#include <stddef.h>

namespace runtime {

// The variable of this name: the same for all threads of a threadgroup.
void* threadgroup_memory(const char* name, size_t bytes);

// Variables will be filled with `poison`.
void prepare_threadgroup_memory(int poison);

// Gives all variables back.
void release_threadgroup_memory();

// Fills the variables again, as another threadgroup begins.
void poison_threadgroup_memory();

// Ends the launch if something was written beside a variable.
void check_threadgroup_memory();

// The variable next to which `address` lies, or null.
const char* threadgroup_variable_near(const void* address);

template <class Variable>
inline Variable& threadgroup_variable(const char* name) {
  return *static_cast<Variable*>(threadgroup_memory(name, sizeof(Variable)));
}

}  // namespace runtime
