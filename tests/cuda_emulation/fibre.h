// Fibres: stacks that take turns on one OS thread, made known to the address and the thread sanitizer.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

// Present only where a sanitizer's runtime is, so one object file serves every kind of build.
extern "C" {
[[gnu::weak]] void __sanitizer_start_switch_fiber(void** fake_stack, const void* bottom, size_t bytes);
[[gnu::weak]] void __sanitizer_finish_switch_fiber(void* fake_stack, const void** bottom, size_t* bytes);
[[gnu::weak]] void* __tsan_get_current_fiber();
[[gnu::weak]] void* __tsan_create_fiber(unsigned flags);
[[gnu::weak]] void __tsan_destroy_fiber(void* fibre);
[[gnu::weak]] void __tsan_switch_to_fiber(void* fibre, unsigned flags);
[[gnu::weak]] void __tsan_acquire(void* address);
[[gnu::weak]] void __tsan_release(void* address);

void rd_emulation_switch(void** save_stack_pointer, void* stack_pointer);
}

#ifndef __x86_64__
#  error "the switch below is written for x86-64"
#endif

namespace emulation {

inline bool sanitized() { return __sanitizer_start_switch_fiber || __tsan_create_fiber; }
inline bool watches_races() { return __tsan_create_fiber != nullptr; }
inline void acquire(void* address) {
  if (watches_races()) __tsan_acquire(address);
}
inline void release(void* address) {
  if (watches_races()) __tsan_release(address);
}

// Where the scheduler itself runs, and its stack while a fibre is running.
struct Home {
  void* stack_pointer = nullptr;
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;
  void* race_context = nullptr;
};
inline Home home;

class Fibre {
 public:
  // `entry` never returns.
  explicit Fibre(void (*entry)()) {
    bytes_ = sanitized() ? 512 << 10 : 64 << 10;
    stack_ = static_cast<char*>(
        mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (stack_ == MAP_FAILED) throw std::bad_alloc();
    mprotect(stack_, 4096, PROT_NONE);  // a stack that overflows must not reach its neighbour
    void** top = reinterpret_cast<void**>(stack_ + bytes_) - 2;
    *--top = nullptr;  // entry's return address; leaves the stack aligned as after a call
    *--top = reinterpret_cast<void*>(entry);
    stack_pointer_ = top - 6;  // the registers that the switch restores; fresh pages are zero
    if (watches_races()) race_context_ = __tsan_create_fiber(0);
  }
  Fibre(const Fibre&) = delete;
  ~Fibre() {
    if (race_context_) __tsan_destroy_fiber(race_context_);
    munmap(stack_, bytes_);
  }

  void resume() {
    if (watches_races()) {
      home.race_context = __tsan_get_current_fiber();
      __tsan_switch_to_fiber(race_context_, kNoOrder);
    }
    if (__sanitizer_start_switch_fiber) __sanitizer_start_switch_fiber(&home.fake_stack, stack_, bytes_);
    rd_emulation_switch(&home.stack_pointer, stack_pointer_);
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(home.fake_stack, nullptr, nullptr);
  }

  void go_home() {
    if (watches_races()) __tsan_switch_to_fiber(home.race_context, kNoOrder);
    if (__sanitizer_start_switch_fiber) {
      __sanitizer_start_switch_fiber(&fake_stack_, home.stack, home.stack_bytes);
    }
    rd_emulation_switch(&stack_pointer_, home.stack_pointer);
    arrived();
  }

  // First thing on the fibre after each switch to it.
  void arrived() {
    if (__sanitizer_finish_switch_fiber) {
      __sanitizer_finish_switch_fiber(fake_stack_, &home.stack, &home.stack_bytes);
    }
  }

 private:
  static constexpr unsigned kNoOrder = 1;  // __tsan_switch_to_fiber_no_sync

  char* stack_;
  size_t bytes_;
  void* stack_pointer_;
  void* fake_stack_ = nullptr;
  void* race_context_ = nullptr;
};

}  // namespace emulation
