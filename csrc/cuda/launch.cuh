// Starting a kernel: the configuration, and every status turned into an exception with the kernel's name.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace rd::cuda {

void check(cudaError_t status, const char* kernel);
bool programmatic_launch();

// The device that a queue belongs to is the current one for as long as this lives.
class CurrentDevice {
 public:
  CurrentDevice(int device, const char* kernel);
  ~CurrentDevice();
  CurrentDevice(const CurrentDevice&) = delete;
  CurrentDevice& operator=(const CurrentDevice&) = delete;

 private:
  int before_ = -1;
};

int attribute(cudaDeviceAttr name, int device, const char* kernel);

struct Grid {
  int64_t blocks;
  int threads;
  int shared_bytes = 0;
  int cluster = 1;       // blocks
  int64_t segments = 1;  // blockIdx.y
};

template <class... Parameters, class... Arguments>
void launch(const char* name, void (*kernel)(Parameters...), const Queue& queue, const Grid& grid,
            const Arguments&... arguments) {
  if (grid.blocks == 0) return;
  if (grid.blocks > INT32_MAX || grid.segments > 65535) {
    throw std::runtime_error(std::string(name) + ": too many rows or too long ones for one launch");
  }
  const CurrentDevice current(queue.device, name);
  if (grid.shared_bytes > 48 * 1024) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize, grid.shared_bytes),
          name);
  }
  cudaLaunchAttribute attributes[2];
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.segments));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = grid.shared_bytes;
  config.stream = static_cast<cudaStream_t>(queue.stream);
  config.attrs = attributes;
  if (grid.cluster > 1) {
    attributes[config.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[config.numAttrs].val.clusterDim.x = grid.cluster;
    attributes[config.numAttrs].val.clusterDim.y = 1;
    attributes[config.numAttrs++].val.clusterDim.z = 1;
  }
  if (programmatic_launch()) {
    attributes[config.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[config.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), name);
}

// call(T()) with the element type of that dtype.
template <class Call>
void with_element(DType dtype, const Call& call) {
  switch (dtype) {
    case DType::kFloat32:
      return call(float());
    case DType::kBFloat16:
      return call(__nv_bfloat16());
    case DType::kFloat16:
      return call(__half());
  }
}

// call(integral_constant<bool, value>())
template <class Call>
void with_constant(bool value, const Call& call) {
  value ? call(std::true_type()) : call(std::false_type());
}

}  // namespace rd::cuda
