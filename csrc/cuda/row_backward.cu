// The gradient of the logits: one read and one write of each element; a row without gradient is only written.
#include "cuda/gradient.cuh"
#include "cuda/launch.cuh"

namespace rd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kShortRow = 2048;       // elements; a warp is enough for a row up to here
constexpr int kSegmentPieces = 4096;  // of a row, for one block: long rows make as many blocks as short ones

// kThreads / kTeam rows for each block, the last rows first; blockIdx.y is the segment.
template <class T, int kTeam, bool kSmooth>
__global__ void __launch_bounds__(kThreads)
    row_backward_kernel(Rows rows, Weighting weighting, RowGradient gradient) {
  wait_for_previous_kernel();
  const int64_t team = static_cast<int64_t>(blockIdx.x) * (kThreads / kTeam) + threadIdx.x / kTeam;
  const int64_t i = rows.count - 1 - team;
  if (i < 0) return;
  const int thread = threadIdx.x % kTeam;
  const Row<T> out(row_of<T>(gradient.out, gradient.out_stride, i), rows.vocabulary);
  const Part part = {thread, kTeam, static_cast<int>(blockIdx.y) * kSegmentPieces,
                     min(out.pieces, (static_cast<int>(blockIdx.y) + 1) * kSegmentPieces), blockIdx.y == 0};

  float scale = gradient.grad_out ? gradient.grad_out[i * gradient.grad_out_stride] : 1;
  if (gradient.row_scale) scale *= gradient.row_scale[i];
  const int64_t label = rows.labels[i];
  if (outcome_by_label(rows, label) != kMiss || scale == 0) {  // a factor of 0 wins over NaN logits
    write_zeros(out, part);
    return;
  }
  Slope slope = {gradient.normaliser.maximum[i], gradient.normaliser.log_sum[i], scale, scale, 0,
                 static_cast<int>(label)};
  const float* w = weighting.class_weight;
  if (w != nullptr) slope.factor = slope.at_label = scale * w[label];
  if constexpr (kSmooth) {
    const float v = static_cast<float>(rows.vocabulary), share = weighting.smoothing / v;
    slope.at_label *= 1 - weighting.smoothing;
    slope.factor = slope.at_label + scale * share * (weighting.weight_sum ? *weighting.weight_sum : v);
    slope.offset = scale * share;
  }
  const T* logits = row_of<const T>(rows.logits, rows.stride, i);
  write_gradient<T, kSmooth>(logits, out, part, slope, w);
}

}  // namespace

void row_backward(const Queue& queue, const Rows& rows, const Weighting& weighting,
                  const RowGradient& gradient) {
  const char* name = "row_backward";
  with_element(rows.dtype, [&](auto element) {
    using T = decltype(element);
    with_constant(weighting.smoothing > 0, [&](auto smooth) {
      if (rows.vocabulary <= kShortRow) {
        const int64_t per_block = kThreads / 32;
        launch(name, row_backward_kernel<T, 32, smooth()>, queue,
               {(rows.count + per_block - 1) / per_block, kThreads}, rows, weighting, gradient);
      } else {
        constexpr int64_t kSegment = kSegmentPieces * kWide<T>;
        Grid grid = {rows.count, kThreads};
        grid.segments = (rows.vocabulary + kSegment - 1) / kSegment;
        launch(name, row_backward_kernel<T, kThreads, smooth()>, queue, grid, rows, weighting, gradient);
      }
    });
  });
}

}  // namespace rd::cuda
