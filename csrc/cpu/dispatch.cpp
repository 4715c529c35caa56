#include "cpu/dispatch.h"

#include <atomic>
#include <cstdlib>
#include <stdexcept>

namespace rd::cpu {
namespace {

std::vector<const RowKernels*> usable() {
  std::vector<const RowKernels*> found;
#ifdef RD_HAVE_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("fma")) {
    found.push_back(&avx512::kKernels);
  }
#endif
#ifdef RD_HAVE_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found.push_back(&avx2::kKernels);
#endif
  found.push_back(&portable::kKernels);
  return found;
}

const RowKernels* find(const std::string& name, const std::string& source) {
  std::string allowed;
  for (const RowKernels* kernels : usable()) {
    if (name == kernels->isa) return kernels;
    allowed += (allowed.empty() ? "" : ", ") + std::string(kernels->isa);
  }
  throw std::invalid_argument(source + " must be one of " + allowed + " on this machine, got '" + name + "'");
}

std::atomic<const RowKernels*> chosen{nullptr};

}  // namespace

std::vector<std::string> usable_isas() {
  std::vector<std::string> names;
  for (const RowKernels* kernels : usable()) names.emplace_back(kernels->isa);
  return names;
}

const RowKernels& kernels() {
  const RowKernels* current = chosen.load(std::memory_order_acquire);
  if (current == nullptr) {
    const char* wanted = std::getenv("RD_KERNELS_CPU_ISA");
    current = wanted && *wanted ? find(wanted, "RD_KERNELS_CPU_ISA") : usable().front();
    chosen.store(current, std::memory_order_release);
  }
  return *current;
}

void set_isa(const std::string& name) { chosen.store(find(name, "isa"), std::memory_order_release); }

}  // namespace rd::cpu
