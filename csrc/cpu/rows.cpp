#include "cpu/rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"
#include "cpu/row_kernels.h"

namespace rd::cpu {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Rows are worked on in segments, so that a few long ones keep many threads busy. The length is fixed: the
// results must not depend on the number of threads.
constexpr int64_t kSegment = 1 << 14;

// Logits more than 87 below the largest have a probability of 0 here. Each adds at most 87 exp(-87)
// = 1.43e-36 to a scan's spread, as do up to 63 of -inf that fill up its last vectors. Where no more than
// that may be from others, which is this for every logit, the entropy is exactly 0.
constexpr double kSpreadOfZero = 64 * 1.5e-36;

// What finishing a row costs besides its segments, in logits.
constexpr int64_t kRowCost = 128;

int64_t segments_of(const Rows& rows) { return (rows.vocabulary + kSegment - 1) / kSegment; }

char* address(const Rows& rows, void* base, int64_t stride, int64_t i, int64_t j) {
  const int64_t size = rows.dtype == DType::kFloat32 ? 4 : 2;
  return static_cast<char*>(base) + (i * stride + j) * size;
}

const char* logits_at(const Rows& rows, int64_t i, int64_t j) {
  return address(rows, rows.logits, rows.stride, i, j);
}

float logit(const Rows& rows, int64_t i, int64_t j) {
  uint32_t bits = 0;
  if (rows.dtype == DType::kFloat32) {
    std::memcpy(&bits, logits_at(rows, i, j), 4);
  } else {
    uint16_t half;
    std::memcpy(&half, logits_at(rows, i, j), 2);
    bits = static_cast<uint32_t>(half) << 16;
  }
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

void put(const Rows& rows, float value, char* out) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (rows.dtype == DType::kFloat32) {
    std::memcpy(out, &bits, 4);
  } else {  // to nearest even; NaN stays NaN
    const uint32_t rounded = std::isnan(value) ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u);
    const uint16_t half = static_cast<uint16_t>(rounded >> 16);
    std::memcpy(out, &half, 2);
  }
}

bool has_nan(const Rows& rows, int64_t i) {
  for (int64_t j = 0; j < rows.vocabulary; ++j)
    if (std::isnan(logit(rows, i, j))) return true;
  return false;
}

// kMiss stands for every row that counts.
Outcome outcome_by_label(const Rows& rows, int64_t i) {
  const int64_t label = rows.labels[i];
  if (label == rows.ignore_index) return kIgnored;
  return label < 0 || label >= rows.vocabulary ? kBadLabel : kMiss;
}

// The class weights' sum is only wanted for smoothing.
Target with_weight_sum(Target target, int64_t vocabulary) {
  target.class_weight_sum = static_cast<double>(vocabulary);
  if (target.class_weight != nullptr && target.smoothing > 0) {
    target.class_weight_sum = 0;
    for (int64_t j = 0; j < vocabulary; ++j) target.class_weight_sum += target.class_weight[j];
  }
  return target;
}

// What the scan's sums are relative to a shift that is not below its largest logit.
Scan relative_to(double shift, Scan scan) {
  const double factor = std::exp(scan.largest - shift);  // 0 for a scan of -inf alone, or of nothing
  scan.spread = factor == 0 ? 0 : factor * (scan.spread + (shift - scan.largest) * scan.sum);
  scan.sum *= factor;
  return scan;
}

// Of a segment, and joined to those before it of a whole row. `smooth` is sum_j w_j (origin - z_j).
struct Summary {
  Scan scan = {-kInfinity, 0, 0, 0};
  double smooth = 0;

  void join(const Summary& next) {
    const float largest = std::max(scan.largest, next.scan.largest);
    // Subtracting a maximum of -inf would make NaN of it.
    const double shift = largest == -kInfinity ? 0 : largest;
    const Scan one = relative_to(shift, scan), other = relative_to(shift, next.scan);
    scan = {largest, one.sum + other.sum, one.spread + other.spread, one.above + other.above};
    smooth += next.smooth;
  }
};

// Smoothing sums logits relative to one of them, so that a large common offset costs no precision.
float origin_of(float z_label) { return std::isfinite(z_label) ? z_label : 0.0f; }

Summary summary_of_segment(const Rows& rows, const Target& target, bool details, int64_t i, int64_t begin) {
  const RowKernels& kernel = kernels();
  const int type = static_cast<int>(rows.dtype);
  const int64_t count = std::min(kSegment, rows.vocabulary - begin);
  const char* z = logits_at(rows, i, begin);
  const float z_label = details || target.smoothing > 0 ? logit(rows, i, rows.labels[i]) : 0.0f;
  Summary summary{(details ? kernel.scan_with_details : kernel.scan)[type](z, count, z_label)};
  if (target.smoothing > 0) {
    const float* w = target.class_weight ? target.class_weight + begin : nullptr;
    summary.smooth = kernel.smoothing_sum[type](z, w, count, origin_of(z_label));
  }
  return summary;
}

bool wants_details(const RowResults& results) { return results.details.entropy != nullptr; }

void write_uncounted(const RowResults& results, int64_t i, Outcome outcome) {
  results.outcome[i] = outcome;
  const float value = outcome == kIgnored ? 0.0f : kNaN;
  results.loss[i] = results.normaliser.maximum[i] = results.normaliser.log_sum[i] = value;
  if (wants_details(results)) results.details.entropy[i] = results.details.above[i] = value;
}

void write_counted(const Rows& rows, const Target& target, const Summary& summary, int64_t i,
                   const RowResults& results) {
  const auto [largest, sum, spread, above] = summary.scan;
  const int64_t label = rows.labels[i];
  const float z_label = logit(rows, i, label);
  // NaN for a row that is all -inf, as for one with NaN or +inf.
  const double log_sum = largest == -kInfinity ? kNaN : std::log(sum);
  // Not (largest + log_sum) - z_label: a small loss would inherit the rounding of a large maximum.
  double loss = log_sum + (static_cast<double>(largest) - z_label);
  if (target.class_weight != nullptr) loss *= target.class_weight[label];
  if (target.smoothing > 0) {
    const double lse = log_sum + (static_cast<double>(largest) - origin_of(z_label));
    const double smooth = target.class_weight_sum * lse + summary.smooth;
    loss = (1 - target.smoothing) * loss + target.smoothing / static_cast<double>(rows.vocabulary) * smooth;
  }
  results.loss[i] = static_cast<float>(loss);
  results.normaliser.maximum[i] = largest;
  results.normaliser.log_sum[i] = static_cast<float>(log_sum);
  // NaN counts as larger than the label's logit. The sum is NaN for +inf, too.
  const bool nan = std::isnan(sum) && has_nan(rows, i);
  results.outcome[i] = z_label >= largest && !nan ? kHit : kMiss;
  if (wants_details(results)) {
    const bool spreads = spread > static_cast<double>(rows.vocabulary) * kSpreadOfZero;
    results.details.entropy[i] = static_cast<float>(log_sum + (spreads ? spread / sum : 0));
    // No logit is <= NaN, nor is what fills a vector up.
    results.details.above[i] = static_cast<float>(std::isnan(z_label) ? rows.vocabulary : above);
  }
}

// The gradient of one segment:
// dz_j = scale ((hard + soft) p_j - hard [j = label] - smooth w_j), p_j = exp(z_j - largest) exp(-log_sum)
void write_gradient(const Rows& rows, const Target& target, const RowGradient& gradient, int64_t i,
                    int64_t begin) {
  const int64_t count = std::min(kSegment, rows.vocabulary - begin);
  char* out = address(rows, gradient.out, gradient.out_stride, i, begin);
  float scale = gradient.grad_out ? gradient.grad_out[i * gradient.grad_out_stride] : 1.0f;
  if (gradient.row_scale) scale *= gradient.row_scale[i];
  // A factor of 0 wins over NaN logits.
  if (outcome_by_label(rows, i) != kMiss || scale == 0.0f) {
    std::memset(out, 0, static_cast<size_t>(count) * (rows.dtype == DType::kFloat32 ? 4 : 2));
    return;
  }
  const int64_t label = rows.labels[i];
  const float* w = target.class_weight;
  const float largest = gradient.normaliser.maximum[i];
  const double log_sum = gradient.normaliser.log_sum[i];
  const double smooth = target.smoothing / static_cast<double>(rows.vocabulary);
  const double hard = (1 - target.smoothing) * (w ? w[label] : 1.0);
  const double soft = smooth * target.class_weight_sum;
  const bool has_label = label >= begin && label < begin + count;
  double at_label = 0;
  if (has_label) {
    // p - 1 without cancellation; taken now, as `out` may be the logits.
    const double log_p = (static_cast<double>(logit(rows, i, label)) - largest) - log_sum;
    at_label = scale * (hard * std::expm1(log_p) + soft * std::exp(log_p) - smooth * (w ? w[label] : 1.0));
  }
  kernels().gradient[static_cast<int>(rows.dtype)](
      logits_at(rows, i, begin), out, count,
      {largest, static_cast<float>(scale * (hard + soft) * std::exp(-log_sum)),
       smooth == 0 ? 0.0f : static_cast<float>(scale * smooth), w ? w + begin : nullptr, gradient.stream});
  if (has_label) put(rows, static_cast<float>(at_label), address(rows, out, 0, 0, label - begin));
}

}  // namespace

void row_forward(const Rows& rows, const Target& given, const RowResults& results, int threads) {
  const Target target = with_weight_sum(given, rows.vocabulary);
  const int64_t segments = segments_of(rows);
  const std::unique_ptr<Summary[]> summaries(new Summary[rows.count * segments]);
  for_shares(rows.count * segments, usable_threads(rows.count * rows.vocabulary, threads),
             [&](int64_t begin, int64_t end) {
               for (int64_t t = begin; t < end; ++t) {
                 const int64_t i = t / segments;
                 if (outcome_by_label(rows, i) != kMiss) continue;
                 summaries[t] =
                     summary_of_segment(rows, target, wants_details(results), i, t % segments * kSegment);
               }
             });
  for_shares(rows.count, usable_threads(rows.count * kRowCost, threads), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      if (const Outcome outcome = outcome_by_label(rows, i); outcome != kMiss) {
        write_uncounted(results, i, outcome);
        continue;
      }
      Summary row = summaries[i * segments];
      for (int64_t s = 1; s < segments; ++s) row.join(summaries[i * segments + s]);
      write_counted(rows, target, row, i, results);
    }
  });
}

void row_backward(const Rows& rows, const Target& given, const RowGradient& gradient, int threads) {
  const Target target = with_weight_sum(given, rows.vocabulary);
  const int64_t segments = segments_of(rows);
  for_shares(rows.count * segments, usable_threads(rows.count * rows.vocabulary, threads),
             [&](int64_t begin, int64_t end) {
               // Backwards: the forward pass left the last ones in the cache.
               for (int64_t t = end; t-- > begin;) {
                 write_gradient(rows, target, gradient, t / segments, t % segments * kSegment);
               }
             });
}

void softmax_minus_onehot(const Rows& rows, const RowResults& results, int threads) {
  if (rows.count > 1 && rows.stride < rows.vocabulary) {
    throw std::invalid_argument("logits: rows that overlap in memory cannot be overwritten");
  }
  const Target target = {nullptr, static_cast<double>(rows.vocabulary), 0};
  const bool details = wants_details(results);
  const RowGradient in_place = {nullptr, 0, nullptr, results.normaliser, rows.logits, rows.stride, false};
  for_shares(rows.count, usable_threads(rows.count * rows.vocabulary, threads),
             [&](int64_t begin, int64_t end) {
               for (int64_t i = begin; i < end; ++i) {
                 if (const Outcome outcome = outcome_by_label(rows, i); outcome != kMiss) {
                   write_uncounted(results, i, outcome);
                 } else {
                   Summary row = summary_of_segment(rows, target, details, i, 0);
                   for (int64_t j = kSegment; j < rows.vocabulary; j += kSegment) {
                     row.join(summary_of_segment(rows, target, details, i, j));
                   }
                   write_counted(rows, target, row, i, results);
                 }
                 // The row is in the second-level cache now.
                 for (int64_t j = 0; j < rows.vocabulary; j += kSegment) {
                   write_gradient(rows, target, in_place, i, j);
                 }
               }
             });
}

}  // namespace rd::cpu
