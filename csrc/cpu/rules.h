// Step 3 of the op: from a batch's sums to what multiplies them. rd_kernels/rules.py is the definition.
#pragma once

#include "common/types.h"

namespace rd::cpu {

// Updates q; writes the weights, the loss and the coefficients [G]. A non-zero status: loss NaN, coefficients
// 0, q kept. In double, rounded once: a step size or tilt times a loss may exceed what float holds.
void group_update(const Statistics& statistics, int64_t num_groups, const Update& update, float* loss,
                  float* coefficients);

}  // namespace rd::cpu
