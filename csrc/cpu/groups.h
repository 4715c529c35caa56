// Step 2 of the op, sums by group, and each row's weight. Serial, in double and in an order that only the
// groups decide, so that results are the same bit for bit in every run.
#pragma once

#include "common/types.h"

namespace rd::cpu {

// Writes the statistics, the weights as 0.
void group_reduce(const float* row_loss, const uint8_t* outcome, int64_t rows, const Groups& groups,
                  const Statistics& statistics);

// scale [N]: the sum of the coefficients of a row's groups; 0 for rows without label or group.
void row_scale(const float* coefficients, const uint8_t* outcome, int64_t rows, const Groups& groups,
               float* scale);

// A mask [N, G] of bytes 0 and 1 -> its bits, words [N, G / 32 rounded up], zeros beyond G.
void pack_mask(const uint8_t* mask, int64_t rows, int64_t num_groups, uint32_t* words);

// The row pass, the rule (cpu/rules.h) and all of the above in one call.
void grouped_forward(const Rows& rows, const Groups& groups, const Update& update,
                     const Statistics& statistics, float* loss, float* scale, const Normaliser& normaliser,
                     int threads);

}  // namespace rd::cpu
