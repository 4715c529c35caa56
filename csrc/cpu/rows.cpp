#include "cpu/rows.h"

#include <memory>
#include <stdexcept>

#include "cpu/dispatch.h"
#include "cpu/parallel.h"

namespace rd::cpu {
namespace {

Target with_weight_sum(Target target, int64_t vocabulary) {
  target.class_weight_sum = static_cast<double>(vocabulary);
  if (target.class_weight != nullptr && target.smoothing > 0) {
    target.class_weight_sum = 0;
    for (int64_t j = 0; j < vocabulary; ++j) target.class_weight_sum += target.class_weight[j];
  }
  return target;
}

}  // namespace

void row_forward(const Rows& rows, const Target& target, const RowResults& results, int threads) {
  const Target full = with_weight_sum(target, rows.vocabulary);
  const auto kernel = kernels().forward[static_cast<int>(rows.dtype)];
  for_rows(rows.count, usable_threads(rows.count, rows.vocabulary, threads),
           [&](int64_t begin, int64_t end, int) { kernel(rows, full, results, begin, end); });
}

void row_backward(const Rows& rows, const Target& target, const RowGradient& gradient, int threads) {
  const Target full = with_weight_sum(target, rows.vocabulary);
  const auto kernel = kernels().backward[static_cast<int>(rows.dtype)];
  for_rows(rows.count, usable_threads(rows.count, rows.vocabulary, threads),
           [&](int64_t begin, int64_t end, int) { kernel(rows, full, gradient, begin, end); });
}

void softmax_minus_onehot(const Rows& rows, const RowResults& results, int threads) {
  if (rows.count > 1 && rows.stride < rows.vocabulary) {
    throw std::invalid_argument("logits: rows that overlap in memory cannot be overwritten");
  }
  const auto kernel = kernels().softmax_minus_onehot[static_cast<int>(rows.dtype)];
  const int team = usable_threads(rows.count, rows.vocabulary, threads);
  std::unique_ptr<float[]> scratch;
  if (rows.dtype == DType::kBFloat16) scratch.reset(new float[team * rows.vocabulary]);
  for_rows(rows.count, team, [&](int64_t begin, int64_t end, int thread) {
    kernel(rows, results, scratch ? scratch.get() + thread * rows.vocabulary : nullptr, begin, end);
  });
}

}  // namespace rd::cpu
