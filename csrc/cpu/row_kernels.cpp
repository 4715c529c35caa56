// Cross-entropy of rows and its gradient, written once and compiled for several instruction sets: the build
// defines RD_ISA (the namespace) and sets the flags. The loops are plain C++ that the compiler vectorises.
//
// Everything here has internal linkage and no header that defines functions is included; otherwise the linker
// might keep this unit's copy of a shared inline function for machines that cannot run it.
//
// NaN and infinity must come out as in the textbook formula: of what -ffast-math stands for, only
// -fno-math-errno and -fno-trapping-math are wanted.
#ifdef __FAST_MATH__
#  error "row_kernels.cpp: NaN and infinity must be kept; compile without -ffast-math"
#endif

#include "cpu/row_kernels.h"

// The attribute lets GCC call the vector exp of glibc's libmvec (AVX-512, AVX2 or SSE) inside a vectorised
// loop; Clang does so by -fveclib=libmvec. Where there is no libmvec this is the scalar expf.
// Largest error over all floats in [-87, 0], in units of the last place: 2.64 (AVX2), 2.94 (SSE).
extern "C" {
#if defined(RD_HAVE_LIBMVEC) && !defined(__clang__)
__attribute__((simd("notinbranch"), const))
#endif
float expf(float) noexcept;
double exp(double) noexcept;
double expm1(double) noexcept;
double log(double) noexcept;
}

namespace rd::cpu::RD_ISA {
namespace {

// A block of float32 and its bookkeeping stay in the first-level cache, so a row is read from memory once
// although a block is walked twice.
constexpr int64_t kBlock = 2048;
constexpr float kInfinity = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");

// exp(x) counts as 0 below this (exp(-87) = 1.6e-38, beside a row's sum of at least 1): results stay normal
// numbers and libmvec stays on its fast path, -inf included.
constexpr float kSmallestExponent = -87.0f;

int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

struct BFloat16 {
  uint16_t bits;
};

float to_float(float value) { return value; }

float to_float(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof result);
  return result;
}

void put(float value, float& out) { out = value; }

// Rounds to nearest even; NaN stays NaN.
void put(float value, BFloat16& out) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t quiet = (bits >> 16) | 0x40u;
  out.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);
}

// Kernels compute on float32: where the logits are, or in a buffer for bfloat16. These four hide which.
float* working_copy(float* values, float*) { return values; }
float* working_copy(BFloat16*, float* buffer) { return buffer; }
const float* load(const float* values, float*, int64_t) { return values; }
void store(const float*, float*, int64_t) {}

const float* load(const BFloat16* values, float* buffer, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) buffer[j] = to_float(values[j]);
  return buffer;
}

void store(const float* results, BFloat16* out, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) put(results[j], out[j]);
}

float exp_nonpositive(float x) {
  const float e = expf(x < kSmallestExponent ? kSmallestExponent : x);
  return x < kSmallestExponent ? 0.0f : e;
}

// NaN is never larger: it is passed over here and shows in the sum of exponentials. Not a reduction of
// OpenMP, because that may start from the lowest finite number, which is above -inf.
float maximum(const float* z, int64_t count, float start) {
  constexpr int64_t kLanes = 32;  // several vectors, so that a step does not wait for the last one
  float lanes[kLanes];
  for (float& lane : lanes) lane = start;
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] = z[j + k] > lanes[k] ? z[j + k] : lanes[k];
  }
  for (; j < count; ++j) lanes[0] = z[j] > lanes[0] ? z[j] : lanes[0];
  float largest = start;
  for (const float lane : lanes) largest = lane > largest ? lane : largest;
  return largest;
}

// Sums are kept in double: float32 would lose small terms beside the 1 of the largest logit, and so the whole
// loss of a row that is nearly certain.
double sum_of_exponentials(const float* z, int64_t count, float shift) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) sum += exp_nonpositive(z[j] - shift);
  return sum;
}

// The same, and z replaced by the exponentials.
double exponentiate(float* z, int64_t count, float shift) {
  double sum = 0.0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j) {
    z[j] = exp_nonpositive(z[j] - shift);
    sum += z[j];
  }
  return sum;
}

// sum_j w_j (origin - z_j); w null: ones.
double weighted_sum(const float* z, const float* w, int64_t count, float origin) {
  double sum = 0.0;
  if (w == nullptr) {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) sum += origin - z[j];
  } else {
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < count; ++j) sum += w[j] * (origin - z[j]);
  }
  return sum;
}

template <class Element>
bool has_nan(const Element* z, int64_t count) {
  for (int64_t j = 0; j < count; ++j)
    if (to_float(z[j]) != to_float(z[j])) return true;
  return false;
}

// Subtracting the maximum of a block that is all -inf would make NaN of it.
float shift_for(float largest) { return largest == -kInfinity ? 0.0f : largest; }

// NaN for a row that is all -inf, as for one with NaN or +inf.
double log_of_sum(double sum, float largest) { return largest == -kInfinity ? kNaN : log(sum); }

template <class Element>
Element* row_of(void* data, int64_t stride, int64_t i) {
  return static_cast<Element*>(data) + i * stride;
}

template <class Element>
void fill_zero(Element* out, int64_t count) {
  __builtin_memset(out, 0, static_cast<uint64_t>(count) * sizeof(Element));
}

// kMiss stands for every row that counts.
Outcome outcome_by_label(const Rows& rows, int64_t i) {
  const int64_t label = rows.labels[i];
  if (label == rows.ignore_index) return kIgnored;
  return label < 0 || label >= rows.vocabulary ? kBadLabel : kMiss;
}

void write_uncounted(const RowResults& results, int64_t i, Outcome outcome) {
  results.outcome[i] = outcome;
  const float value = outcome == kIgnored ? 0.0f : kNaN;
  results.loss[i] = results.normaliser.maximum[i] = results.normaliser.log_sum[i] = value;
}

template <class Element>
void forward(const Rows& rows, const Target& target, const RowResults& results, int64_t begin, int64_t end) {
  float buffer[kBlock];
  const int64_t vocabulary = rows.vocabulary;
  const float* w = target.class_weight;
  for (int64_t i = begin; i < end; ++i) {
    if (const Outcome outcome = outcome_by_label(rows, i); outcome != kMiss) {
      write_uncounted(results, i, outcome);
      continue;
    }
    const Element* logits = row_of<Element>(rows.logits, rows.stride, i);
    const int64_t label = rows.labels[i];
    const float z_label = to_float(logits[label]);
    // Smoothing sums logits relative to one of them, so that a large common offset costs no precision.
    const float origin = z_label - z_label == 0.0f ? z_label : 0.0f;
    float largest = -kInfinity;
    double sum = 0.0;  // of exp(z - largest), so far
    double smooth_sum = 0.0;
    for (int64_t start = 0; start < vocabulary; start += kBlock) {
      const int64_t count = smaller(kBlock, vocabulary - start);
      const float* z = load(logits + start, buffer, count);
      const float before = largest;
      largest = maximum(z, count, before);
      const float shift = shift_for(largest);
      if (largest > before) sum *= exp_nonpositive(before - shift);
      sum += sum_of_exponentials(z, count, shift);
      if (target.smoothing > 0) smooth_sum += weighted_sum(z, w ? w + start : nullptr, count, origin);
    }
    const double log_sum = log_of_sum(sum, largest);
    // Not (largest + log_sum) - z_label: a small loss would inherit the rounding of a large maximum.
    double loss = log_sum + (static_cast<double>(largest) - z_label);
    if (w != nullptr) loss *= w[label];
    if (target.smoothing > 0) {
      const double lse = log_sum + (static_cast<double>(largest) - origin);
      const double smooth = target.class_weight_sum * lse + smooth_sum;
      loss = (1 - target.smoothing) * loss + target.smoothing / static_cast<double>(vocabulary) * smooth;
    }
    results.loss[i] = static_cast<float>(loss);
    results.normaliser.maximum[i] = largest;
    results.normaliser.log_sum[i] = static_cast<float>(log_sum);
    // NaN counts as larger than the label's logit. The sum is NaN for +inf, too.
    const bool nan = sum != sum && has_nan(logits, vocabulary);
    results.outcome[i] = z_label >= largest && !nan ? kHit : kMiss;
  }
}

// Rows are walked backwards: the forward pass left the last ones in the cache.
template <class Element>
void backward(const Rows& rows, const Target& target, const RowGradient& gradient, int64_t begin,
              int64_t end) {
  float buffer[kBlock];
  const int64_t vocabulary = rows.vocabulary;
  const float* w = target.class_weight;
  const double smooth = target.smoothing / static_cast<double>(vocabulary);
  for (int64_t i = end; i-- > begin;) {
    const Element* logits = row_of<Element>(rows.logits, rows.stride, i);
    Element* out = row_of<Element>(gradient.out, gradient.out_stride, i);
    float scale = gradient.grad_out ? gradient.grad_out[i * gradient.grad_out_stride] : 1.0f;
    if (gradient.row_scale) scale *= gradient.row_scale[i];
    // A factor of 0 wins over NaN logits.
    if (outcome_by_label(rows, i) != kMiss || scale == 0.0f) {
      fill_zero(out, vocabulary);
      continue;
    }
    // dz_j = scale ((hard + soft) p_j - hard [j = label] - smooth w_j), p_j = exp(z_j - largest)
    // exp(-log_sum)
    const int64_t label = rows.labels[i];
    const float largest = gradient.normaliser.maximum[i];
    const double log_sum = gradient.normaliser.log_sum[i];
    const double w_label = w ? w[label] : 1.0;
    const double hard = (1 - target.smoothing) * w_label;
    const double soft = smooth * target.class_weight_sum;
    // p - 1 at the label without cancellation; taken now, as `out` may be the logits.
    const double log_p = (static_cast<double>(to_float(logits[label])) - largest) - log_sum;
    const double at_label = scale * (hard * expm1(log_p) + soft * exp(log_p) - smooth * w_label);
    const float factor = static_cast<float>(scale * (hard + soft) * exp(-log_sum));
    const float offset = static_cast<float>(scale * smooth);
    for (int64_t start = 0; start < vocabulary; start += kBlock) {
      const int64_t count = smaller(kBlock, vocabulary - start);
      const float* z = load(logits + start, buffer, count);
      float* g = working_copy(out + start, buffer);
      if (smooth == 0) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) g[j] = factor * exp_nonpositive(z[j] - largest);
      } else if (w == nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) g[j] = factor * exp_nonpositive(z[j] - largest) - offset;
      } else {
        const float* w_block = w + start;
#pragma omp simd
        for (int64_t j = 0; j < count; ++j) {
          g[j] = factor * exp_nonpositive(z[j] - largest) - offset * w_block[j];
        }
      }
      store(g, out + start, count);
    }
    put(static_cast<float>(at_label), out[label]);
  }
}

// After the first walk the row is in the second-level cache. Each exponential is computed once and kept where
// the row was; a bfloat16 row would round it, so that has `scratch` [V].
template <class Element>
void softmax_minus_onehot(const Rows& rows, const RowResults& results, float* scratch, int64_t begin,
                          int64_t end) {
  const int64_t vocabulary = rows.vocabulary;
  for (int64_t i = begin; i < end; ++i) {
    Element* logits = row_of<Element>(rows.logits, rows.stride, i);
    if (const Outcome outcome = outcome_by_label(rows, i); outcome != kMiss) {
      write_uncounted(results, i, outcome);
      fill_zero(logits, vocabulary);
      continue;
    }
    float* row = working_copy(logits, scratch);
    const float largest = maximum(load(logits, row, vocabulary), vocabulary, -kInfinity);
    const int64_t label = rows.labels[i];
    const float z_label = row[label];
    bool nan = largest == kInfinity && has_nan(row, vocabulary);
    const float shift = shift_for(largest);
    const double sum = exponentiate(row, vocabulary, shift);
    nan |= largest != kInfinity && sum != sum;
    const double log_sum = log_of_sum(sum, largest);
    const double loss = log_sum + (static_cast<double>(largest) - z_label);
    const float factor = static_cast<float>(1 / sum);
#pragma omp simd
    for (int64_t j = 0; j < vocabulary; ++j) row[j] *= factor;
    row[label] = static_cast<float>(expm1(-loss));
    store(row, logits, vocabulary);
    results.loss[i] = static_cast<float>(loss);
    results.normaliser.maximum[i] = largest;
    results.normaliser.log_sum[i] = static_cast<float>(log_sum);
    results.outcome[i] = z_label >= largest && !nan ? kHit : kMiss;
  }
}

void exponentials(const float* x, float* out, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) out[j] = exp_nonpositive(x[j]);
}

}  // namespace

#define RD_TEXT_OF(name) #name
#define RD_TEXT(name) RD_TEXT_OF(name)

extern const RowKernels kKernels = {
    RD_TEXT(RD_ISA),
    {forward<float>, forward<BFloat16>},
    {backward<float>, backward<BFloat16>},
    {softmax_minus_onehot<float>, softmax_minus_onehot<BFloat16>},
    exponentials,
};

}  // namespace rd::cpu::RD_ISA
