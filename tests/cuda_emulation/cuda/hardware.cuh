// Stands in for csrc/cuda/hardware.cuh: the same functions, played by the scheduler. A kernel sees a Hopper.
#pragma once

#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>

#define RD_HOPPER 1

namespace rd::cuda {

constexpr const char* kDeviceType = "cpu";

inline unsigned char* shared_memory() { return emulation::shared_memory(); }

inline float exp2_approximate(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline unsigned cluster_rank() { return emulation::cluster_rank(); }
inline unsigned cluster_size() { return emulation::cluster_size(); }
inline void cluster_sync() { emulation::cluster_barrier(); }
inline float cluster_read(const float* value, unsigned rank) {
  return *emulation::cluster_address(value, rank);
}

struct CopyBarrier {
  uint64_t state;
};

inline void init(CopyBarrier* barrier) {
  barrier->state = 1;  // an access that the sanitizers see, like the one below
  emulation::init_copy_barrier(barrier);
}

inline void begin_copy(void* to, const void* from, uint32_t bytes, CopyBarrier* barrier) {
  emulation::begin_copy(to, from, bytes, barrier);
}

inline void await_copy(CopyBarrier* barrier) {
  if (barrier->state != 1) emulation::fail("await_copy of a barrier that nobody has initialised");
  emulation::await_copy(barrier);
}

inline void wait_for_previous_kernel() {}
inline void let_next_kernel_start() {}

}  // namespace rd::cuda
