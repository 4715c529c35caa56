// Steps 2 and 3 of the op: sums by group, the objective, and each row's weight. Serial, in double and in row
// order, so that results are the same bit for bit in every run.
#pragma once

#include "common/types.h"

namespace rd::cpu {

// Writes the statistics, the weights as 0.
void group_reduce(const float* row_loss, const uint8_t* outcome, int64_t rows, const Groups& groups,
                  const Statistics& statistics);

// Updates q; writes the weights, the loss and the coefficients [G]. A non-zero status: loss NaN, coefficients
// 0, q kept.
void group_update(const Statistics& statistics, int64_t num_groups, const Update& update, float* loss,
                  float* coefficients);

// scale [N]: the sum of the coefficients of a row's groups; 0 for rows without label or group.
void row_scale(const float* coefficients, const uint8_t* outcome, int64_t rows, const Groups& groups,
               float* scale);

// The row pass and all of the above in one call.
void grouped_forward(const Rows& rows, const Groups& groups, const Update& update,
                     const Statistics& statistics, float* loss, float* scale, const Normaliser& normaliser,
                     int threads);

}  // namespace rd::cpu
