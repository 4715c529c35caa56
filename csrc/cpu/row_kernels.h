// The row kernels as a table, one for each instruction set that row_kernels.cpp was compiled for.
#pragma once

#include "common/types.h"

namespace rd::cpu {

// Every function works on rows [begin, end), and no row depends on another. Indexed by DType.
struct RowKernels {
  const char* isa;
  void (*forward[2])(const Rows&, const Target&, const RowResults&, int64_t begin, int64_t end);
  void (*backward[2])(const Rows&, const Target&, const RowGradient&, int64_t begin, int64_t end);
  // `scratch` [V] is used for bfloat16 only.
  void (*softmax_minus_onehot[2])(const Rows&, const RowResults&, float* scratch, int64_t begin, int64_t end);
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
