// The CUDA kernels as host functions: each puts one kernel into a queue and returns. No CUDA header is needed
// to call them. A failure throws std::runtime_error with the kernel's name. Every output element is written;
// sums are taken in an order that depends on the shapes alone. Letters: N rows, V vocabulary, D width, G
// groups.
#pragma once

#include <cstdint>
#include <string>

#include "common/types.h"

namespace rd::cuda {

struct Queue {
  int device;
  void* stream;  // a cudaStream_t
};

// As rd::Target, with the weights' sum on the device; null: V.
struct Weighting {
  const float* class_weight;  // [V]; null: ones
  const float* weight_sum;    // []
  float smoothing;
};

// Rows whose sums are taken together; the blocks that sum them leave them in Scratch.
constexpr int64_t kChunkRows = 128;

struct Scratch {
  float* partials;  // [chunks, 3, G + 2]
  uint32_t* bad;    // [chunks, 2]
  uint32_t*
      counters;  // [1 + chunks], 0 before and after the kernel; not shared between kernels that run at once
};

void row_forward(const Queue& queue, const Rows& rows, const Weighting& weighting, const RowResults& results);

// Rows in reverse: the forward pass has left the last ones in the second-level cache.
void row_backward(const Queue& queue, const Rows& rows, const Weighting& weighting,
                  const RowGradient& gradient);

// row_forward, with the logits overwritten by softmax - onehot, zeros on rows that do not count.
void softmax_minus_onehot(const Queue& queue, const Rows& rows, const RowResults& results);

void group_reduce(const Queue& queue, const float* row_loss, const uint8_t* outcome, int64_t rows,
                  const Groups& groups, const Statistics& statistics, const Scratch& scratch);

// Updates q; writes the weights, the loss and the coefficients [G].
void group_update(const Queue& queue, const Statistics& statistics, int64_t num_groups, const Update& update,
                  float* loss, float* coefficients);

void row_scale(const Queue& queue, const float* coefficients, const uint8_t* outcome, int64_t rows,
               const Groups& groups, float* scale);

// A mask [rows, G] as the bits of Groups.
void pack_mask(const Queue& queue, const bool* mask, int64_t rows, int64_t num_groups, uint32_t* bits);

// row_forward, group_reduce and group_update in one kernel; the last block to finish does the rest.
void grouped_forward(const Queue& queue, const Rows& rows, const RowResults& results, const Groups& groups,
                     const Update& update, const Statistics& statistics, float* loss, float* coefficients,
                     const Scratch& scratch);

// A matrix [N, D] with unit stride along D.
struct Matrix {
  void* data;
  DType dtype;
  int64_t rows, width, stride;
};

// out [N, D] = scale [N] times x, rounded once; 0 where the scale is, whatever x. May be done in place.
void scale_rows(const Queue& queue, const Matrix& x, const float* scale, const Matrix& out);

// The rows with a label, in order: index [capacity] of the first ones, then -1; position [N] of each row
// among all of them, -1 without label; count [] of all of them, which may exceed the capacity.
void compact(const Queue& queue, const int64_t* labels, int64_t rows, int64_t ignore_index, int64_t capacity,
             int64_t* index, int64_t* position, int64_t* count);

// out[i] = x[index[i]], zeros where the index is not in [0, x.rows).
void gather_rows(const Queue& queue, const Matrix& x, const int64_t* index, const Matrix& out);

// torch's name for the devices these kernels run on.
const char* device_type();

// Why no kernel can run on this machine; empty if one can.
std::string missing();

// Lets a kernel start before the one ahead of it in the queue has ended (Hopper and newer; off at first).
void set_programmatic_launch(bool on);

}  // namespace rd::cuda
