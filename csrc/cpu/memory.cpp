#include "cpu/memory.h"

#include <cstdint>

#ifdef __linux__
#  include <sys/mman.h>
#  include <unistd.h>
#endif

namespace rd::cpu {

void prefer_huge_pages(void* start, std::size_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr std::size_t kSmallest = 32u << 20;  // glibc's largest threshold for mmap
  if (bytes < kSmallest) return;
  const std::uintptr_t page = static_cast<std::uintptr_t>(sysconf(_SC_PAGESIZE));
  const std::uintptr_t address = reinterpret_cast<std::uintptr_t>(start);
  const std::uintptr_t begin = (address + page - 1) & ~(page - 1), end = (address + bytes) & ~(page - 1);
  (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)start, (void)bytes;
#endif
}

}  // namespace rd::cpu
