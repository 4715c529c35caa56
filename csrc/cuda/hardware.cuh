// What only a GPU has, in one place: shared memory, the fast exponential, and what came with Hopper. The
// tests put another file in the place of this one to run the kernels on a CPU (tests/cuda_emulation).
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace rd::cuda {

// Where torch's tensors must be for these kernels.
constexpr const char* kDeviceType = "cuda";

// The block's shared memory, as much as the launch asked for; aligned to 16 bytes, as bulk copies need it.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char bytes[];
  return bytes;
}

// 2^x to 2 ulp; results under 2^-126 are 0.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
#  define RD_HOPPER 0
#else
#  define RD_HOPPER 1
#endif

// Clusters: blocks that run at the same time and see each other's shared memory. A launch without a cluster
// size makes clusters of one block; before Hopper there are no others.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank = 0;
#if RD_HOPPER
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
  return rank;
}

__device__ __forceinline__ unsigned cluster_size() {
  unsigned size = 1;
#if RD_HOPPER
  asm volatile("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
#endif
  return size;
}

// A barrier for every thread of the cluster; what they wrote to shared memory is seen by all.
__device__ __forceinline__ void cluster_sync() {
#if RD_HOPPER
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#else
  __syncthreads();
#endif
}

// `value`, an address in this block's shared memory, read in the block of that rank. Between two
// cluster_sync().
__device__ __forceinline__ float cluster_read(const float* value, unsigned rank) {
#if RD_HOPPER
  uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(value)), there;
  float result;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(result) : "r"(there) : "memory");
  return result;
#else
  return *value;
#endif
}

// Bulk copies, global to shared memory, by the copy engine. One thread calls begin() for a barrier that it
// has initialised; after __syncthreads() everyone who reads the copy awaits it first. Each barrier serves one
// copy.
struct CopyBarrier {
  uint64_t state;
};

__device__ __forceinline__ void init(CopyBarrier* barrier) {
#if RD_HOPPER
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(address) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// `bytes`: a multiple of 16, and both addresses too.
__device__ __forceinline__ void begin_copy(void* to, const void* from, uint32_t bytes, CopyBarrier* barrier) {
#if RD_HOPPER
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(address), "r"(bytes)
               : "memory");
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
          static_cast<uint32_t>(__cvta_generic_to_shared(to))),
      "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(address)
      : "memory");
#endif
}

__device__ __forceinline__ void await_copy(CopyBarrier* barrier) {
#if RD_HOPPER
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(barrier));
  uint32_t done = 0;
  while (done == 0) {
    asm volatile(
        "{\n.reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], 0;\n"
        "selp.u32 %0, 1, 0, done;\n}"
        : "=r"(done)
        : "r"(address)
        : "memory");
  }
#endif
}

// Programmatic dependent launch: a kernel may be started while the one before it still runs. It waits here
// before it touches memory; without the launch attribute this costs nothing.
__device__ __forceinline__ void wait_for_previous_kernel() {
#if RD_HOPPER
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

__device__ __forceinline__ void let_next_kernel_start() {
#if RD_HOPPER
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

}  // namespace rd::cuda
