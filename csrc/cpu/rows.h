// The row passes over a whole batch: chosen instruction set, several threads. The results do not depend on
// the number of threads.
#pragma once

#include "common/types.h"

namespace rd::cpu {

void row_forward(const Rows& rows, const Target& target, const RowResults& results, int threads);

void row_backward(const Rows& rows, const Target& target, const RowGradient& gradient, int threads);

// row_forward without class weights and smoothing; the logits become softmax - onehot(label), zeros on rows
// that do not count. Throws std::invalid_argument for rows that overlap in memory.
void softmax_minus_onehot(const Rows& rows, const RowResults& results, int threads);

}  // namespace rd::cpu
