#include "cpu/memory.h"

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <mutex>
#include <new>

#ifdef __linux__
#  include <sys/mman.h>
#endif

namespace rd::cpu {
namespace {

constexpr std::size_t kHugePage = 2u << 20;

struct Pages {
  void* data;
  std::size_t capacity;
};

Pages map(std::size_t capacity) {
  void* data = nullptr;
  if (posix_memalign(&data, kHugePage, capacity) != 0) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
  (void)madvise(data, capacity, MADV_HUGEPAGE);  // only advice: small pages do, too
#endif
  return {data, capacity};
}

class Cache {
 public:
  // The smallest that fits and wastes less than a quarter; {nullptr, 0} if there is none.
  Pages take(std::size_t capacity) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = waiting_.end();
    for (auto it = waiting_.begin(); it != waiting_.end(); ++it) {
      const bool fits = it->capacity >= capacity && it->capacity - capacity <= capacity / 4;
      if (fits && (best == waiting_.end() || it->capacity < best->capacity)) best = it;
    }
    if (best == waiting_.end()) return {nullptr, 0};
    const Pages pages = *best;
    waiting_.erase(best);
    held_ -= pages.capacity;
    return pages;
  }

  void keep(Pages pages) {
    const std::lock_guard<std::mutex> lock(mutex_);
#ifdef MADV_FREE
    if (pages.capacity <= limit_) (void)madvise(pages.data, pages.capacity, MADV_FREE);
#endif
    waiting_.push_back(pages);
    held_ += pages.capacity;
    trim(limit_);
  }

  std::size_t held() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return held_;
  }

  void set_limit(std::size_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    trim(limit_);
  }

  void empty() {
    const std::lock_guard<std::mutex> lock(mutex_);
    trim(0);
  }

 private:
  void trim(std::size_t bytes) {
    while (held_ > bytes) {
      held_ -= waiting_.front().capacity;
      std::free(waiting_.front().data);
      waiting_.pop_front();
    }
  }

  std::mutex mutex_;
  std::deque<Pages> waiting_;  // the oldest first
  std::size_t held_ = 0, limit_ = std::size_t{1} << 30;
};

// Never destroyed: tensors may outlive every static object.
Cache& cache() {
  static Cache* const instance = new Cache;
  return *instance;
}

}  // namespace

Block::Block(std::size_t bytes) : bytes_(bytes), capacity_((bytes + kHugePage - 1) / kHugePage * kHugePage) {
  Pages pages = cache().take(capacity_);
  fresh_ = pages.data == nullptr;
  if (fresh_) pages = map(capacity_);
  data_ = pages.data;
  capacity_ = pages.capacity;
}

Block::~Block() { cache().keep({data_, capacity_}); }

std::size_t cached_bytes() { return cache().held(); }

void empty_cache() { cache().empty(); }

void set_cache_limit(std::size_t bytes) { cache().set_limit(bytes); }

}  // namespace rd::cpu
