// The row kernels as a table, one for each instruction set that row_kernels.cpp was compiled for.
#pragma once

#include "common/types.h"

namespace rd::cpu {

// Of a stretch of logits: the largest, and sum_j exp(z_j - largest). With -inf alone the shift is 0; the sum
// is NaN where a logit is NaN or +inf. Of a scan with details also sum_j (largest - z_j) exp(z_j - largest),
// as if no logit were more than 87 below the largest, and how many are not <= the label's.
struct Scan {
  float largest;
  double sum;
  double spread;
  int64_t above;
};

// dz_j = factor exp(z_j - largest) - offset w_j; w null: ones.
struct Gradient {
  float largest;
  float factor;
  float offset;
  const float* w;
  bool stream;  // write past the cache
};

// Indexed by DType; the untyped pointers are to elements of it. No stretch depends on another.
struct RowKernels {
  const char* isa;
  Scan (*scan[2])(const void* z, int64_t count, float z_label);
  Scan (*scan_with_details[2])(const void* z, int64_t count, float z_label);
  void (*gradient[2])(const void* z, void* out, int64_t count, const Gradient& gradient);
  // sum_j w_j (origin - z_j); w null: ones.
  double (*smoothing_sum[2])(const void* z, const float* w, int64_t count, float origin);
  // The exponential of the kernels above, x <= 0 or NaN, so that its error can be measured.
  void (*exp)(const float* x, float* out, int64_t count);
};

#ifdef RD_HAVE_AVX512
namespace avx512 {
extern const RowKernels kKernels;
}
#endif
#ifdef RD_HAVE_AVX2
namespace avx2 {
extern const RowKernels kKernels;
}
#endif
namespace portable {
extern const RowKernels kKernels;
}

}  // namespace rd::cpu
