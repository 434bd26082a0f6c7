// Memory that faults as soon as a kernel leaves it.
//
// The last byte lies at most 15 bytes before a page that is not mapped, and such a page lies before
// the first.  What is mapped but not the buffer's own is poisoned and looked at afterwards.  Inputs
// are mapped read-only.
#pragma once

#include <stddef.h>

// The same fields are in run.py.
struct Buffer {
  unsigned char* data;
  size_t bytes;
  unsigned char* pages;
  size_t page_bytes;
};

// `contents` is null for memory that the kernel writes.  Zero on success.
extern "C" int harness_allocate(Buffer* buffer, size_t bytes, const void* contents, int poison);

// The byte offset from the buffer of a write beside it, or `PTRDIFF_MIN` if there was none.
extern "C" ptrdiff_t harness_written_beside(const Buffer* buffer, int poison);

extern "C" void harness_release(const Buffer* buffer);
