// The inner loops over logits, written once and compiled for several instruction sets: the build defines
// RD_ISA (the namespace) and sets the flags, the vectors below are as wide as those allow.
//
// Everything here has internal linkage and no header that defines functions is included; otherwise the linker
// might keep this unit's copy of a shared inline function for machines that cannot run it. (The intrinsics
// are always inlined.)
//
// NaN and infinity must come out as in the textbook formula.
#ifdef __FAST_MATH__
#  error "row_kernels.cpp: NaN and infinity must be kept; compile without -ffast-math"
#endif

#include "cpu/row_kernels.h"

#ifdef __SSE2__
#  include <immintrin.h>
#endif

// GCC notes that it passes vectors differently than it once did (none leaves this file), and takes the
// undefined vectors inside its own intrinsics for mistakes.
#if defined(__GNUC__) && !defined(__clang__)
#  pragma GCC diagnostic ignored "-Wpsabi"
#  pragma GCC diagnostic ignored "-Wuninitialized"
#  pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#define RD_INLINE inline __attribute__((always_inline))

namespace rd::cpu::RD_ISA {
namespace {

// RD_MM(max_ps) is the intrinsic of that name for vectors of this width.
#if defined(__AVX512F__)
#  define RD_MM(operation) _mm512_##operation
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
#  define RD_MM(operation) _mm256_##operation
constexpr int kVectorBytes = 32;
#else
#  define RD_MM(operation) _mm_##operation
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / 4;

typedef float Floats __attribute__((vector_size(kVectorBytes)));
typedef int32_t Ints __attribute__((vector_size(kVectorBytes)));
typedef uint32_t Words __attribute__((vector_size(kVectorBytes)));

struct BFloat16 {
  uint16_t bits;
};

// Work is done in chunks of a few vectors, step by step in all of them, so that no step waits for the last.
constexpr int kVectors = 4;
constexpr int64_t kChunk = kVectors * kLanes;
struct Chunk {
  Floats v[kVectors];
};

// A block stays in the first-level cache, so logits are read from memory once although they are walked twice.
constexpr int64_t kBlock = 2048;
static_assert(kBlock % kChunk == 0);

constexpr float kInfinity = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");
constexpr int32_t kHighHalf = static_cast<int32_t>(0xffff0000);

// exp(-y) is taken as exp(-87) = 1.6e-38 beyond this, which keeps results normal numbers. Beside a sum of at
// least 1 that is nothing, and the gradient makes it the 0 that belongs to -inf.
constexpr float kLargestExponent = 87.0f;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

RD_INLINE Floats all(float value) { return value - Floats{}; }

RD_INLINE Ints bits_of(Floats value) { return reinterpret_cast<Ints>(value); }
RD_INLINE Floats of_bits(Ints bits) { return reinterpret_cast<Floats>(bits); }

// b where either is NaN. (Compilers do not see that x86 has an instruction for just that.)
RD_INLINE Floats larger(Floats a, Floats b) {
#ifdef __SSE2__
  return RD_MM(max_ps)(a, b);
#else
  return a > b ? a : b;
#endif
}

RD_INLINE Floats lesser(Floats a, Floats b) {
#ifdef __SSE2__
  return RD_MM(min_ps)(a, b);
#else
  return a < b ? a : b;
#endif
}

// memcpy, since logits need not be aligned.
template <class Element>
RD_INLINE Floats load(const Element* z) {
  Floats result;
  __builtin_memcpy(&result, z, sizeof result);
  return result;
}

template <bool kStream, class Element>
RD_INLINE void store(Floats value, Element* out) {
#ifdef __SSE2__
  if (kStream) return RD_MM(stream_ps)(reinterpret_cast<float*>(out), value);
#endif
  __builtin_memcpy(out, &value, sizeof value);
}

RD_INLINE Chunk load_chunk(const float* z) {
  Chunk chunk;
  for (int k = 0; k < kVectors; ++k) chunk.v[k] = load(z + k * kLanes);
  return chunk;
}

template <bool kStream>
RD_INLINE void store_chunk(const Chunk& chunk, float* out) {
  for (int k = 0; k < kVectors; ++k) store<kStream>(chunk.v[k], out + k * kLanes);
}

// Of two neighbours the first goes to one vector and the second to the next: no bits change lanes.
RD_INLINE Chunk load_chunk(const BFloat16* z) {
  Chunk chunk;
  for (int k = 0; k < kVectors; k += 2) {
    const Ints pairs = bits_of(load(z + k * kLanes));
    chunk.v[k] = of_bits(pairs << 16);
    chunk.v[k + 1] = of_bits(pairs & kHighHalf);
  }
  return chunk;
}

// To nearest even, in the upper halves; the lower ones are to be dropped. A NaN may become 0.
RD_INLINE Ints round_to_bfloat16(Floats value) {
  const Ints bits = bits_of(value);
  return bits + 0x7fff + ((bits >> 16) & 1);
}

template <bool kStream>
RD_INLINE void store_chunk(const Chunk& chunk, BFloat16* out) {
  for (int k = 0; k < kVectors; k += 2) {
    const Words low = reinterpret_cast<Words>(round_to_bfloat16(chunk.v[k])) >> 16;
    const Words high = reinterpret_cast<Words>(round_to_bfloat16(chunk.v[k + 1]) & kHighHalf);
    store<kStream>(reinterpret_cast<Floats>(low | high), out + k * kLanes);
  }
}

// Class weights in the lanes of their logits.
RD_INLINE Chunk load_weights(const float* w, const float*) { return load_chunk(w); }
RD_INLINE Chunk load_weights(const float* w, const BFloat16*) {
  Chunk chunk;
  for (int k = 0; k < kVectors; k += 2) {
    for (int lane = 0; lane < kLanes; ++lane) {
      chunk.v[k][lane] = w[k * kLanes + 2 * lane];
      chunk.v[k + 1][lane] = w[k * kLanes + 2 * lane + 1];
    }
  }
  return chunk;
}

float minus_infinity(const float*) { return -kInfinity; }
BFloat16 minus_infinity(const BFloat16*) { return {0xff80}; }
float nan(const float*) { return kNaN; }
BFloat16 nan(const BFloat16*) { return {0x7fc0}; }

// Fewer than kChunk elements; what follows them is `fill`.
template <class Element>
struct Tail {
  Element elements[kChunk];

  Tail(const Element* z, int64_t count, Element fill) {
    for (Element& element : elements) element = fill;
    __builtin_memcpy(elements, z, static_cast<uint64_t>(count) * sizeof(Element));
  }
};

template <class Element>
void store_tail(const Chunk& chunk, Element* out, int64_t count) {
  Element buffer[kChunk];
  store_chunk<false>(chunk, buffer);
  __builtin_memcpy(out, buffer, static_cast<uint64_t>(count) * sizeof(Element));
}

// No further than exponentials_within goes; NaN stays NaN.
RD_INLINE void limit(Chunk& y) {
  for (Floats& v : y.v) v = lesser(all(kLargestExponent), v);
}

// y becomes exp(-y) for 0 <= y <= kLargestExponent; exactly 1 at 0, some number at NaN. By -y = n log(2) + r,
// |r| <= log(2)/2, exp(-y) = 2^n exp(r). log(2) is split so that n times its first part is exact; the
// polynomial is the minimax one of degree 6 with its first two coefficients held at 1 (relative error 2e-9,
// by Lawson's algorithm).
RD_INLINE void exponentials_within(Chunk& y) {
  constexpr float kLog2E = 1.44269504f, kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  constexpr float kLog2High = 0.693359375f, kLog2Low = -2.12194440e-4f;
  constexpr float kCoefficients[] = {0.0013836794532835484f,
                                     0.008374856784939766f,
                                     0.0416682288050651550f,
                                     0.1666641980409622200f,
                                     0.499999910593032840f,
                                     1.0f,
                                     1.0f};
  Floats n[kVectors], p[kVectors];
  Ints exponent[kVectors];
  for (int k = 0; k < kVectors; ++k) n[k] = kRound - y.v[k] * kLog2E;
  for (int k = 0; k < kVectors; ++k) exponent[k] = bits_of(n[k]) << 23;
  for (int k = 0; k < kVectors; ++k) n[k] -= kRound;
  for (int k = 0; k < kVectors; ++k) y.v[k] = -y.v[k] - n[k] * kLog2High;
  for (int k = 0; k < kVectors; ++k) y.v[k] -= n[k] * kLog2Low;
  for (Floats& v : p) v = all(kCoefficients[0]);
  for (int degree = 1; degree < 7; ++degree) {
    for (int k = 0; k < kVectors; ++k) p[k] = p[k] * y.v[k] + kCoefficients[degree];
  }
  for (int k = 0; k < kVectors; ++k) y.v[k] = of_bits(bits_of(p[k]) + exponent[k]);
}

// The same for any y >= 0.
RD_INLINE void exponentials(Chunk& y) {
  limit(y);
  exponentials_within(y);
}

// NaN is never larger: it is passed over here and shows in the sum of exponentials. With details, logits that
// are not <= the label's are counted on the way, where there is more time than in that sum.
template <bool kDetails, class Element>
float maximum(const Element* z, int64_t count, float start, float z_label, int64_t& above) {
  Ints not_below = {};
  Chunk largest;
  for (Floats& v : largest.v) v = all(start);
  const auto take = [&](const Chunk& chunk) __attribute__((always_inline)) {
    for (int k = 0; k < kVectors; ++k) largest.v[k] = larger(chunk.v[k], largest.v[k]);
    for (int k = 0; k < kVectors; ++k) not_below -= kDetails ? ~(chunk.v[k] <= z_label) : Ints{};
  };
  int64_t j = 0;
  for (; j + kChunk <= count; j += kChunk) take(load_chunk(z + j));
  if (j < count) take(load_chunk(Tail<Element>(z + j, count - j, minus_infinity(z)).elements));
  for (const Floats& v : largest.v) {
    for (int lane = 0; lane < kLanes; ++lane) start = v[lane] > start ? v[lane] : start;
  }
  for (int lane = 0; lane < kLanes; ++lane) above += not_below[lane];
  return start;
}

float sum_of(const Chunk& chunk) {
  const Floats sums = (chunk.v[0] + chunk.v[1]) + (chunk.v[2] + chunk.v[3]);
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += sums[lane];
  return sum;
}

// Adds sum_j exp(z_j - shift) of at most kBlock logits, taken in float32, and the details, to `total`. Small
// terms would be lost beside the 1 of the largest logit, and with them the whole loss of a row that is nearly
// certain; where the block holds that logit (kSeparate) each 1 is counted apart.
template <bool kSeparate, bool kDetails, class Element>
void add_exponentials(const Element* z, int64_t count, float shift, Scan& total) {
  Chunk sums = {}, distances = {};  // with details the distances are weighted by their exponentials
  Ints ones = {};
  const auto add = [&](Chunk x) __attribute__((always_inline)) {
    Ints is_one[kVectors];
    for (Floats& v : x.v) v = shift - v;
    for (int k = 0; k < kVectors; ++k) is_one[k] = x.v[k] == 0.0f;
    if (!kDetails) {
      for (int k = 0; k < kVectors; ++k) distances.v[k] += x.v[k];
    }
    limit(x);
    const Chunk distance = x;
    exponentials_within(x);
    if (kDetails) {
      for (int k = 0; k < kVectors; ++k) distances.v[k] += distance.v[k] * x.v[k];
    }
    for (int k = 0; k < kVectors; ++k)
      sums.v[k] += kSeparate ? of_bits(~is_one[k] & bits_of(x.v[k])) : x.v[k];
    for (int k = 0; k < kVectors; ++k) ones -= kSeparate ? is_one[k] : Ints{};
  };
  int64_t j = 0;
  for (; j + kChunk <= count; j += kChunk) {
    // The next block, of this row or of the one behind it: its maximum then need not wait for memory.
    for (int64_t k = 0; k < kChunk; k += 64 / static_cast<int64_t>(sizeof(Element))) {
      __builtin_prefetch(z + j + kBlock + k);
    }
    add(load_chunk(z + j));
  }
  if (j < count) add(load_chunk(Tail<Element>(z + j, count - j, minus_infinity(z)).elements));
  // Distances are not negative, so their sum, weighted or not, is NaN where one of them is, and only there.
  const float distance = sum_of(distances);
  total.spread += distance;
  total.sum += distance != distance ? kNaN : static_cast<double>(sum_of(sums));
  for (int lane = 0; lane < kLanes; ++lane) total.sum += ones[lane];
}

template <bool kDetails, class Element>
Scan scan(const void* logits, int64_t count, float z_label) {
  const Element* z = static_cast<const Element*>(logits);
  Scan result = {-kInfinity, 0.0, 0.0, 0};
  for (int64_t start = 0; start < count; start += kBlock) {
    const int64_t size = smaller(kBlock, count - start);
    const float before = result.largest;
    result.largest = maximum<kDetails>(z + start, size, before, z_label, result.above);
    // Subtracting the maximum of a block that is all -inf would make NaN of it.
    const float shift = result.largest == -kInfinity ? 0.0f : result.largest;
    if (result.largest > before) {
      const float rise = shift - before;
      Chunk rescale = {};
      rescale.v[0] = all(rise);
      exponentials(rescale);
      if (kDetails) {
        // Each distance grows by the rise.
        result.spread = rise < kLargestExponent ? rescale.v[0][0] * (result.spread + rise * result.sum) : 0;
      }
      result.sum *= rescale.v[0][0];
      add_exponentials<true, kDetails>(z + start, size, shift, result);
    } else {
      add_exponentials<false, kDetails>(z + start, size, shift, result);
    }
  }
  return result;
}

// `out` may be `z`.
template <bool kStream, class Element>
void gradient_of(const Element* z, Element* out, int64_t count, const Gradient& gradient) {
  const float largest = gradient.largest, factor = gradient.factor, offset = gradient.offset;
  const float* w = gradient.w;
  const auto scaled_exponentials = [=](Chunk x) __attribute__((always_inline)) {
    Ints is_zero[kVectors];
    for (Floats& v : x.v) v = largest - v;
    for (int k = 0; k < kVectors; ++k) is_zero[k] = x.v[k] > kLargestExponent;
    exponentials(x);
    for (int k = 0; k < kVectors; ++k) x.v[k] = of_bits(~is_zero[k] & bits_of(x.v[k])) * factor;
    return x;
  };
  const auto subtract = [=](Chunk& x, const float* weights) __attribute__((always_inline)) {
    Chunk weight;
    for (Floats& v : weight.v) v = all(1.0f);
    if (weights != nullptr) weight = load_weights(weights, z);
    for (int k = 0; k < kVectors; ++k) x.v[k] -= offset * weight.v[k];
  };
  const auto some = [&](int64_t j, int64_t size) {
    Chunk x = scaled_exponentials(load_chunk(Tail<Element>(z + j, size, minus_infinity(z)).elements));
    if (offset != 0) subtract(x, w ? Tail<float>(w + j, size, 0.0f).elements : nullptr);
    store_tail(x, out + j, size);
  };
  if (factor != factor) {  // the row holds NaN or +inf, or its weight is NaN
    for (int64_t j = 0; j < count; ++j) out[j] = nan(z);
    return;
  }
  int64_t j = 0;
  if (kStream) {  // streamed vectors must be aligned, and only whole cache lines pay
    const uint64_t misalignment = reinterpret_cast<uintptr_t>(out) % 64;
    j = smaller(static_cast<int64_t>((64 - misalignment) % 64 / sizeof(Element)), count);
    for (int64_t i = 0; i < j; i += kChunk) some(i, smaller(kChunk, j - i));
  }
  for (; j + kChunk <= count; j += kChunk) {
    Chunk x = scaled_exponentials(load_chunk(z + j));
    if (offset != 0) subtract(x, w ? w + j : nullptr);
    store_chunk<kStream>(x, out + j);
  }
  if (j < count) some(j, count - j);
}

template <class Element>
void gradient(const void* z, void* out, int64_t count, const Gradient& gradient) {
  const auto function = gradient.stream ? gradient_of<true, Element> : gradient_of<false, Element>;
  function(static_cast<const Element*>(z), static_cast<Element*>(out), count, gradient);
#ifdef __SSE2__
  if (gradient.stream) _mm_sfence();  // other threads see streamed stores in order only behind a fence
#endif
}

template <class Element>
double smoothing_sum(const void* logits, const float* w, int64_t count, float origin) {
  const Element* z = static_cast<const Element*>(logits);
  double sum = 0;
  const auto add = [&](Chunk x, const float* weights) __attribute__((always_inline)) {
    for (Floats& v : x.v) v = origin - v;
    if (weights != nullptr) {
      const Chunk weight = load_weights(weights, z);
      for (int k = 0; k < kVectors; ++k) x.v[k] *= weight.v[k];
    }
    sum += sum_of(x);
  };
  int64_t j = 0;
  for (; j + kChunk <= count; j += kChunk) add(load_chunk(z + j), w ? w + j : nullptr);
  for (; j < count; ++j) {
    Chunk x = load_chunk(Tail<Element>(z + j, 1, Element{}).elements);
    sum += (origin - x.v[0][0]) * (w ? w[j] : 1.0f);
  }
  return sum;
}

void exponentials(const float* x, float* out, int64_t count) {
  for (int64_t j = 0; j < count; j += kChunk) {
    const int64_t size = smaller(kChunk, count - j);
    Chunk chunk = load_chunk(Tail<float>(x + j, size, 0.0f).elements);
    for (Floats& v : chunk.v) v = -v;
    exponentials(chunk);
    store_tail(chunk, out + j, size);
  }
}

}  // namespace

#define RD_TEXT_OF(name) #name
#define RD_TEXT(name) RD_TEXT_OF(name)

extern const RowKernels kKernels = {
    RD_TEXT(RD_ISA),
    {scan<false, float>, scan<false, BFloat16>},
    {scan<true, float>, scan<true, BFloat16>},
    {gradient<float>, gradient<BFloat16>},
    {smoothing_sum<float>, smoothing_sum<BFloat16>},
    exponentials,
};

}  // namespace rd::cpu::RD_ISA
