// The choice of the row kernels' instruction set, made once per process.
#pragma once

#include <string>
#include <vector>

#include "cpu/row_kernels.h"

namespace rd::cpu {

// What this build has and this CPU runs, the best first: of "avx512", "avx2", "portable".
std::vector<std::string> usable_isas();

// The kernels in use: the best, or those that the environment variable RD_KERNELS_CPU_ISA names.
// Throws std::invalid_argument, naming what is usable, if it names another.
const RowKernels& kernels();

// Overrides the choice from now on, for tests and benchmarks. Throws like kernels().
void set_isa(const std::string& name);

}  // namespace rd::cpu
