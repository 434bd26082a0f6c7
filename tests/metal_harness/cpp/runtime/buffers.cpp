#include "runtime/buffers.h"

#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

namespace {

constexpr size_t kAlignment = 16;

size_t round_up(size_t value, size_t step) {
  return (value + step - 1) / step * step;
}

size_t page() {
  return size_t(sysconf(_SC_PAGESIZE));
}

}  // namespace

int harness_allocate(Buffer* buffer, size_t bytes, const void* contents, int poison) {
  const size_t guard = page();
  const size_t aligned = round_up(bytes, kAlignment);
  const size_t body = round_up(aligned, guard);
  void* map = mmap(nullptr, body + 2 * guard, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                   -1, 0);
  if (map == MAP_FAILED) {
    return 1;
  }
  unsigned char* first = static_cast<unsigned char*>(map);
  *buffer = {first + guard + body - aligned, bytes, first + guard, body};
  memset(buffer->pages, poison, body);
  if (contents) {
    memcpy(buffer->data, contents, bytes);
  }
  return mprotect(first, guard, PROT_NONE) | mprotect(first + guard + body, guard, PROT_NONE) |
         (contents ? mprotect(buffer->pages, body, PROT_READ) : 0);
}

ptrdiff_t harness_written_beside(const Buffer* buffer, int poison) {
  for (size_t i = 0; i < buffer->page_bytes; i++) {
    const ptrdiff_t offset = buffer->pages + i - buffer->data;
    const bool inside = offset >= 0 && size_t(offset) < buffer->bytes;
    if (!inside && buffer->pages[i] != poison) {
      return offset;
    }
  }
  return PTRDIFF_MIN;
}

void harness_release(const Buffer* buffer) {
  munmap(buffer->pages - page(), buffer->page_bytes + 2 * page());
}
