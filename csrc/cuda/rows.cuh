// A row of logits as 16-byte pieces, whatever its alignment, and the softmax of the part a thread has seen.
// Letters: N rows, V vocabulary.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/types.h"
#include "cuda/hardware.cuh"

namespace rd::cuda {

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kHighest = 3.4028234663852886e38f;

template <class T>
constexpr int kWide = 16 / sizeof(T);  // elements in a piece

// How elements become float32, one or two at a time, and back: to nearest even.
template <class T>
struct Element;

template <>
struct Element<float> {
  static __device__ __forceinline__ float load(float x) { return x; }
  static __device__ __forceinline__ float store(float x) { return x; }
};

template <>
struct Element<__nv_bfloat16> {
  static constexpr uint32_t kMinusInfinities = 0xff80ff80u;
  static __device__ __forceinline__ float load(__nv_bfloat16 x) { return __bfloat162float(x); }
  static __device__ __forceinline__ __nv_bfloat16 store(float x) { return __float2bfloat16_rn(x); }
  static __device__ __forceinline__ float2 load(__nv_bfloat162 x) { return __bfloat1622float2(x); }
  static __device__ __forceinline__ __nv_bfloat162 store(float2 x) { return __float22bfloat162_rn(x); }
  using Pair = __nv_bfloat162;
};

template <>
struct Element<__half> {
  static constexpr uint32_t kMinusInfinities = 0xfc00fc00u;
  static __device__ __forceinline__ float load(__half x) { return __half2float(x); }
  static __device__ __forceinline__ __half store(float x) { return __float2half_rn(x); }
  static __device__ __forceinline__ float2 load(__half2 x) { return __half22float2(x); }
  static __device__ __forceinline__ __half2 store(float2 x) { return __float22half2_rn(x); }
  using Pair = __half2;
};

template <class To, class From>
__device__ __forceinline__ To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class T>
__device__ __forceinline__ uint4 minus_infinities() {
  uint32_t word;
  if constexpr (sizeof(T) == 4) {
    word = 0xff800000u;
  } else {
    word = Element<T>::kMinusInfinities;
  }
  return make_uint4(word, word, word, word);
}

template <class T>
__device__ __forceinline__ void unpack(const uint4& piece, float (&z)[kWide<T>]) {
  const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if constexpr (sizeof(T) == 4) {
      z[e] = bits_as<float>(words[e]);
    } else {
      const float2 pair = Element<T>::load(bits_as<typename Element<T>::Pair>(words[e]));
      z[2 * e] = pair.x, z[2 * e + 1] = pair.y;
    }
  }
}

template <class T>
__device__ __forceinline__ uint4 pack(const float (&z)[kWide<T>]) {
  uint32_t words[4];
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if constexpr (sizeof(T) == 4) {
      words[e] = bits_as<uint32_t>(z[e]);
    } else {
      words[e] = bits_as<uint32_t>(Element<T>::store(make_float2(z[2 * e], z[2 * e + 1])));
    }
  }
  return make_uint4(words[0], words[1], words[2], words[3]);
}

// Whole pieces begin at multiples of 16 bytes. The elements before the first and after the last of them, the
// edges, are fewer than 2 kWide: one for each of a team's first threads.
template <class T>
struct Row {
  using Bits = std::conditional_t<std::is_const_v<T>, const uint4, uint4>;
  T* begin;
  int size, before, pieces;

  __device__ __forceinline__ Row(T* begin_, int64_t size_) : begin(begin_), size(static_cast<int>(size_)) {
    const int missing = static_cast<int>((0 - reinterpret_cast<uintptr_t>(begin)) % 16 / sizeof(T));
    before = missing < size ? missing : size;
    pieces = (size - before) / kWide<T>;
  }
  __device__ __forceinline__ Bits* body() const { return reinterpret_cast<Bits*>(begin + before); }
  __device__ __forceinline__ int column(int piece) const { return before + piece * kWide<T>; }
  // The column of the edge that this thread of the team has to see to, or -1.
  __device__ __forceinline__ int edge(int thread) const {
    const int column = thread < before ? thread : thread + pieces * kWide<T>;
    return thread < 2 * kWide<T> && column < size ? column : -1;
  }
};

// kMiss stands for every row that counts.
__device__ __forceinline__ Outcome outcome_by_label(const Rows& rows, int64_t label) {
  if (label == rows.ignore_index) return kIgnored;
  return label < 0 || label >= rows.vocabulary ? kBadLabel : kMiss;
}

template <class T>
__device__ __forceinline__ T* row_of(void* base, int64_t stride, int64_t i) {
  return static_cast<T*>(base) + i * stride;
}

// x 2^x is 0 where 2^x is, at -inf too.
__device__ __forceinline__ float times_exponential(float x, float power) { return fmaxf(x, -128.0f) * power; }

// The largest logit so far and sum_j exp(z_j - maximum). The maximum stays within the finite numbers, so that
// a logit of -inf adds exp(-inf) = 0 and one of +inf adds exp(inf) = inf, where infinite differences would
// give NaN: only a NaN does. With kDetails also what rd::Details is made of.
template <bool kDetails>
struct Softmax {
  float maximum = -kHighest;
  float total = 0;
  float spread = 0;  // sum_j x_j exp(z_j - maximum), x_j = log2(e) (z_j - maximum)
  float above = 0;   // how many logits are not <= the label's

  template <int kPieces, int kElements>
  __device__ __forceinline__ void absorb(const float (&z)[kPieces][kElements], float z_label) {
    float highest = maximum;
#pragma unroll
    for (int u = 0; u < kPieces; ++u) {
#pragma unroll
      for (int e = 0; e < kElements; ++e) highest = fmaxf(highest, z[u][e]);
    }
    highest = fminf(highest, kHighest);
    float sum[kPieces] = {}, spreads[kPieces] = {};  // a chain of additions for each piece
    int larger = 0;
#pragma unroll
    for (int e = 0; e < kElements; ++e) {
#pragma unroll
      for (int u = 0; u < kPieces; ++u) {
        const float x = (z[u][e] - highest) * kLog2E, power = exp2_approximate(x);
        sum[u] += power;
        if constexpr (kDetails) {
          spreads[u] += times_exponential(x, power);
          larger += !(z[u][e] <= z_label);
        }
      }
    }
    rescale(highest);
#pragma unroll
    for (int u = 0; u < kPieces; ++u) total += sum[u], spread += spreads[u];
    above += larger;
  }

  __device__ __forceinline__ void absorb(float z, float z_label) {
    const float one[1][1] = {{z}};
    absorb(one, z_label);
  }

  // The sums relative to a larger maximum.
  __device__ __forceinline__ void rescale(float highest) {
    const float x = (maximum - highest) * kLog2E, power = exp2_approximate(x);
    if constexpr (kDetails) spread = spread * power + times_exponential(x, power) * total;
    total *= power;
    maximum = highest;
  }

  __device__ __forceinline__ void join(Softmax other) {
    const float highest = fmaxf(maximum, other.maximum);
    rescale(highest);
    other.rescale(highest);
    total += other.total, spread += other.spread, above += other.above;
  }

  // That of another thread: read(member) for each member.
  template <class Read>
  __device__ __forceinline__ Softmax other(const Read& read) const {
    Softmax there;
    there.maximum = read(maximum), there.total = read(total);
    if constexpr (kDetails) there.spread = read(spread), there.above = read(above);
    return there;
  }

  // What is saved of a row: its largest logit, infinite ones included, and log sum_j exp(z_j - maximum); as
  // in torch's cross_entropy NaN for a row that holds NaN or +inf or nothing but -inf.
  __device__ __forceinline__ float saved_maximum() const {
    return total == 0 ? -INFINITY : total == INFINITY ? INFINITY : maximum;
  }
  __device__ __forceinline__ float log_total() const {
    return total > 0 && total < INFINITY ? logf(total) : NAN;
  }
  // log total - sum_j p_j (z_j - maximum): neither part is negative.
  __device__ __forceinline__ float entropy() const { return log_total() - spread / total / kLog2E; }
};

template <bool kDetails>
__device__ __forceinline__ void write_uncounted(const RowResults& results, int64_t i, Outcome outcome) {
  const float nothing = outcome == kIgnored ? 0.0f : NAN;
  results.loss[i] = results.normaliser.maximum[i] = results.normaliser.log_sum[i] = nothing;
  results.outcome[i] = outcome;
  if constexpr (kDetails) results.details.entropy[i] = results.details.above[i] = nothing;
}

// A row with a NaN is no hit, whatever its label's logit. No logit is <= a label's that is NaN; what filled
// pieces up was counted then, too.
template <bool kDetails>
__device__ __forceinline__ void write_counted(const RowResults& results, const Rows& rows, int64_t i,
                                              const Softmax<kDetails>& seen, float loss, float z_label) {
  const float maximum = seen.saved_maximum();
  results.loss[i] = loss;
  results.normaliser.maximum[i] = maximum;
  results.normaliser.log_sum[i] = seen.log_total();
  results.outcome[i] = z_label >= maximum && seen.total == seen.total ? kHit : kMiss;
  if constexpr (kDetails) {
    results.details.entropy[i] = seen.entropy();
    results.details.above[i] = z_label == z_label ? seen.above : static_cast<float>(rows.vocabulary);
  }
}

// What a block needs to join its threads' softmaxes; `smooth` is summed along.
template <int kWarps, bool kDetails>
struct SoftmaxSlots {
  Softmax<kDetails> seen[kWarps];
  float smooth[kWarps];
};

// Over a warp; right in its first lane. (The sums of two lanes are rounded differently in either.)
template <bool kDetails>
__device__ __forceinline__ void join_warp(Softmax<kDetails>& seen, float& smooth) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    seen.join(seen.other([lanes](float mine) { return __shfl_xor_sync(~0u, mine, lanes); }));
    smooth += __shfl_xor_sync(~0u, smooth, lanes);
  }
}

// Joins what the threads of a block, or of a cluster of blocks, have seen of a row, always in the same order.
// The result is right in the first thread of every block, with kForAll in every thread.
template <int kThreads, bool kForAll, bool kDetails>
__device__ __forceinline__ void join_blocks(Softmax<kDetails>& seen, float& smooth,
                                            SoftmaxSlots<kThreads / 32, kDetails>& slots) {
  constexpr int kWarps = kThreads / 32;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, blocks = static_cast<int>(cluster_size());
  join_warp(seen, smooth);
  if (lane == 0) slots.seen[warp] = seen, slots.smooth[warp] = smooth;
  blocks > 1 ? cluster_sync() : __syncthreads();
  if (kForAll || warp == 0) {
    seen = Softmax<kDetails>();
    smooth = 0;
    for (int slot = lane; slot < blocks * kWarps; slot += 32) {
      const int rank = slot / kWarps, other = slot % kWarps;
      if (blocks > 1) {
        const auto there = [rank](const float& member) { return cluster_read(&member, rank); };
        seen.join(slots.seen[other].other(there));
        smooth += cluster_read(&slots.smooth[other], rank);
      } else {
        seen.join(slots.seen[other]);
        smooth += slots.smooth[other];
      }
    }
    join_warp(seen, smooth);
    if constexpr (kForAll) {
      seen = seen.other([](float mine) { return __shfl_sync(~0u, mine, 0); });
    }
  }
  if (blocks > 1) cluster_sync();  // no block may end while another reads its slots
}

}  // namespace rd::cuda
