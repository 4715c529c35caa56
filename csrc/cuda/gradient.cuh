// Writing a row's gradient, by as many threads as there are, with loads and stores 16 bytes wide.
#pragma once

#include "cuda/rows.cuh"

namespace rd::cuda {

// What one thread writes of a row: every `team`-th piece of [begin, end), counted from `thread`, and perhaps
// an edge.
struct Part {
  int thread, team, begin, end;
  bool edges;
};

// dz_j = factor p_j - offset w_j - [j = label] at_label, p_j = exp((z_j - maximum) - log_sum).
struct Slope {
  float maximum, log_sum, factor, at_label, offset;
  int label;

  __device__ __forceinline__ float operator()(float z) const {
    return factor * exp2_approximate(((z - maximum) - log_sum) * kLog2E);
  }
};

// Written once and not read here again: let it not push the logits out of the cache.
__device__ __forceinline__ void store(uint4* to, const uint4& bits) { __stcs(to, bits); }

template <class T>
__device__ __forceinline__ void write_zeros(const Row<T>& out, const Part& part) {
  if (const int column = part.edges ? out.edge(part.thread) : -1; column >= 0) {
    out.begin[column] = Element<T>::store(0.0f);
  }
  for (int piece = part.begin + part.thread; piece < part.end; piece += part.team) {
    store(out.body() + piece, make_uint4(0, 0, 0, 0));
  }
}

// One piece: logits in, gradient out.
template <class T, bool kSmooth>
__device__ __forceinline__ uint4 gradient_of(const uint4& bits, int column, const Slope& slope,
                                             const float* w) {
  float z[kWide<T>];
  unpack<T>(bits, z);
#pragma unroll
  for (int e = 0; e < kWide<T>; ++e) {
    z[e] = slope(z[e]);
    if constexpr (kSmooth) z[e] -= slope.offset * (w ? w[column + e] : 1.0f);
  }
  if (static_cast<unsigned>(slope.label - column) < kWide<T>) {
#pragma unroll
    for (int e = 0; e < kWide<T>; ++e) {
      if (column + e == slope.label) z[e] -= slope.at_label;
    }
  }
  return pack<T>(z);
}

template <class T, bool kSmooth>
__device__ __forceinline__ void write_edge(const T* logits, const Row<T>& out, const Part& part,
                                           const Slope& slope, const float* w) {
  const int column = part.edges ? out.edge(part.thread) : -1;
  if (column < 0) return;
  float value = slope(Element<T>::load(logits[column]));
  if constexpr (kSmooth) value -= slope.offset * (w ? w[column] : 1.0f);
  if (column == slope.label) value -= slope.at_label;
  out.begin[column] = Element<T>::store(value);
}

// A piece of logits that are not aligned as the gradient is: of the two aligned pieces that it lies across,
// shifted. The second is read as a whole, so the last piece of a row, beyond which nothing may be read, is
// not for this.
__device__ __forceinline__ uint4 shifted_piece(const void* wanted) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(wanted);
  const uint4* two = reinterpret_cast<const uint4*>(address / 16 * 16);
  const uint4 low = __ldg(two), high = __ldg(two + 1);
  const int bits = static_cast<int>(address % 4) * 8;
  const auto shifted = [bits](uint32_t a, uint32_t b, uint32_t c, uint32_t d, uint32_t e) {
    const auto word = [bits](uint32_t first, uint32_t second) {
      return static_cast<uint32_t>((static_cast<uint64_t>(second) << 32 | first) >> bits);
    };
    return make_uint4(word(a, b), word(b, c), word(c, d), word(d, e));
  };
  switch (address % 16 / 4) {  // the same for the whole row
    case 0:
      return shifted(low.x, low.y, low.z, low.w, high.x);
    case 1:
      return shifted(low.y, low.z, low.w, high.x, high.y);
    case 2:
      return shifted(low.z, low.w, high.x, high.y, high.z);
    default:
      return shifted(low.w, high.x, high.y, high.z, high.w);
  }
}

template <class T, bool kSmooth>
__device__ __forceinline__ void write_gradient(const T* logits, const Row<T>& out, const Part& part,
                                               const Slope& slope, const float* w) {
  constexpr int kUnroll = 4;
  write_edge<T, kSmooth>(logits, out, part, slope, w);
  const T* body = logits + out.before;
  if (reinterpret_cast<uintptr_t>(body) % 16 != 0) {
    int piece = part.begin + part.thread;
    for (; piece < part.end && piece < out.pieces - 1; piece += part.team) {
      const uint4 bits = shifted_piece(body + piece * kWide<T>);
      store(out.body() + piece, gradient_of<T, kSmooth>(bits, out.column(piece), slope, w));
    }
    if (piece < part.end) {
      T last[kWide<T>];
      for (int e = 0; e < kWide<T>; ++e) last[e] = body[piece * kWide<T> + e];
      store(out.body() + piece, gradient_of<T, kSmooth>(bits_as<uint4>(last), out.column(piece), slope, w));
    }
    return;
  }
  const uint4* pieces = reinterpret_cast<const uint4*>(body);
  for (int first = part.begin + part.thread; first < part.end; first += kUnroll * part.team) {
    uint4 bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (const int piece = first + u * part.team; piece < part.end) bits[u] = __ldcs(pieces + piece);
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      if (const int piece = first + u * part.team; piece < part.end) {
        store(out.body() + piece, gradient_of<T, kSmooth>(bits[u], out.column(piece), slope, w));
      }
    }
  }
}

}  // namespace rd::cuda
