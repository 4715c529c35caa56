// Stands in for the CUDA toolkit's header: what the kernels and their launchers use, played on the CPU.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>  // spells an attribute __noinline__: before the macro below
#include <tuple>
#include <type_traits>
#include <utility>

#include "emulator.h"

#define __grid_constant__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __noinline__ __attribute__((noinline))

// Vector types, aligned as on the device.
#define RD_VECTOR_2(name, T)           \
  struct alignas(2 * sizeof(T)) name { \
    T x, y;                            \
  };                                   \
  inline name make_##name(T x, T y) { return {x, y}; }
#define RD_VECTOR_4(name, T)                                \
  struct alignas(sizeof(T) < 4 ? 4 * sizeof(T) : 16) name { \
    T x, y, z, w;                                           \
  };                                                        \
  inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
RD_VECTOR_2(int2, int)
RD_VECTOR_2(uint2, unsigned)
RD_VECTOR_2(float2, float)
RD_VECTOR_2(double2, double)
RD_VECTOR_2(longlong2, long long)
RD_VECTOR_4(int4, int)
RD_VECTOR_4(uint4, unsigned)
RD_VECTOR_4(float4, float)
RD_VECTOR_4(uchar4, unsigned char)
#undef RD_VECTOR_2
#undef RD_VECTOR_4

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

// The scheduler sets them when it resumes a thread.
extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// --- Barriers and warp collectives

inline void __syncthreads() { emulation::block_barrier(emulation::Kind::kSyncThreads, 0); }
inline int __syncthreads_or(int p) { return emulation::block_barrier(emulation::Kind::kSyncThreadsOr, p); }
inline int __syncthreads_and(int p) { return emulation::block_barrier(emulation::Kind::kSyncThreadsAnd, p); }
inline int __syncthreads_count(int p) {
  return emulation::block_barrier(emulation::Kind::kSyncThreadsCount, p);
}

inline void __syncwarp(unsigned mask = 0xffffffff) {
  emulation::warp_collective(emulation::Kind::kSyncWarp, mask, 0, 0, 32);
}

namespace emulation {

template <class T>
T shuffle(Kind kind, unsigned mask, T value, unsigned argument, int width) {
  static_assert(std::is_arithmetic_v<T>);
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(T));
  bits = warp_collective(kind, mask, bits, argument, static_cast<unsigned>(width));
  __builtin_memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  return emulation::shuffle(emulation::Kind::kShuffle, mask, value, static_cast<unsigned>(lane), width);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
  return emulation::shuffle(emulation::Kind::kShuffleXor, mask, value, static_cast<unsigned>(lanes), width);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulation::shuffle(emulation::Kind::kShuffleUp, mask, value, delta, width);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  return emulation::shuffle(emulation::Kind::kShuffleDown, mask, value, delta, width);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return static_cast<unsigned>(
      emulation::warp_collective(emulation::Kind::kBallot, mask, predicate != 0, 0, 32));
}
inline int __any_sync(unsigned mask, int predicate) {
  return static_cast<int>(emulation::warp_collective(emulation::Kind::kAny, mask, predicate != 0, 0, 32));
}
inline int __all_sync(unsigned mask, int predicate) {
  return static_cast<int>(emulation::warp_collective(emulation::Kind::kAll, mask, predicate != 0, 0, 32));
}

// --- Memory

inline void __threadfence() { emulation::fence(); }
inline void __threadfence_block() {}

namespace emulation {

template <class T>
void check_aligned(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    fail("misaligned access of " + std::to_string(sizeof(T)) + " bytes");
  }
}

// Relaxed, as on the device: the order of other accesses is a matter of fences.
template <class T, class Operation>
T atomic(T* address, Operation operation) {
  check_aligned(address);
  pause();
  T old = __atomic_load_n(address, __ATOMIC_RELAXED);
  __atomic_store_n(address, operation(old), __ATOMIC_RELAXED);
  record_atomic(address);
  return old;
}

}  // namespace emulation

#define RD_ATOMICS(T)                                                                        \
  inline T atomicAdd(T* address, T value) {                                                  \
    return emulation::atomic(address, [=](T old) { return static_cast<T>(old + value); });   \
  }                                                                                          \
  inline T atomicExch(T* address, T value) {                                                 \
    return emulation::atomic(address, [=](T) { return value; });                             \
  }                                                                                          \
  inline T atomicMax(T* address, T value) {                                                  \
    return emulation::atomic(address, [=](T old) { return old > value ? old : value; });     \
  }                                                                                          \
  inline T atomicMin(T* address, T value) {                                                  \
    return emulation::atomic(address, [=](T old) { return old < value ? old : value; });     \
  }                                                                                          \
  inline T atomicCAS(T* address, T expected, T value) {                                      \
    return emulation::atomic(address, [=](T old) { return old == expected ? value : old; }); \
  }
RD_ATOMICS(int)
RD_ATOMICS(unsigned)
RD_ATOMICS(unsigned long long)
#undef RD_ATOMICS
inline unsigned atomicInc(unsigned* address, unsigned limit) {
  return emulation::atomic(address, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}
inline unsigned atomicOr(unsigned* address, unsigned bits) {
  return emulation::atomic(address, [=](unsigned old) { return old | bits; });
}

#define RD_LOAD(name)                  \
  template <class T>                   \
  T name(const T* address) {           \
    emulation::check_aligned(address); \
    return *address;                   \
  }
#define RD_STORE(name)                 \
  template <class T>                   \
  void name(T* address, T value) {     \
    emulation::check_aligned(address); \
    *address = value;                  \
  }
RD_LOAD(__ldg)
RD_LOAD(__ldcs)
RD_LOAD(__ldcg)
RD_LOAD(__ldca)
RD_LOAD(__ldlu)
RD_STORE(__stcs)
RD_STORE(__stcg)
RD_STORE(__stwb)
RD_STORE(__stwt)
#undef RD_LOAD
#undef RD_STORE

// --- Arithmetic

namespace emulation {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace emulation

inline unsigned __float_as_uint(float x) { return emulation::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return emulation::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return emulation::bit_cast<float>(x); }
inline float __int_as_float(int x) { return emulation::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return emulation::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return emulation::bit_cast<double>(x); }

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }

// The device's min and max take two integers of any types: the usual conversions decide.
template <class A, class B, class = std::enable_if_t<std::is_integral_v<A> && std::is_integral_v<B>>>
constexpr auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B, class = std::enable_if_t<std::is_integral_v<A> && std::is_integral_v<B>>>
constexpr auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
inline float min(float a, float b) { return fminf(a, b); }
inline float max(float a, float b) { return fmaxf(a, b); }
inline double min(double a, double b) { return fmin(a, b); }
inline double max(double a, double b) { return fmax(a, b); }

#include "runtime_api.h"
