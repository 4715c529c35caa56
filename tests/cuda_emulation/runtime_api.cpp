// The runtime API: a device like an H100 unless RD_EMULATION_DEVICE says otherwise, whose streams run
// everything at once.
#include <cstdio>
#include <cstdlib>
#include <map>
#include <mutex>
#include <string>

#include "cuda_runtime.h"

namespace {

cudaError_t last_error = cudaSuccess;
std::map<const void*, int> shared_limits;  // of kernels that asked for more than kSharedBytes
constexpr int kSharedBytes = 48 << 10;

cudaError_t report(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

struct Device {
  int processors = 132, major = 9, minor = 0, block_shared_bytes = 232448, processor_shared_bytes = 233472;
};

Device device() {
  Device result;
  if (const char* text = getenv("RD_EMULATION_DEVICE")) {
    sscanf(text, "%d,%d,%d,%d,%d", &result.processors, &result.major, &result.minor,
           &result.block_shared_bytes, &result.processor_shared_bytes);
  }
  return result;
}

// Counts up per launch, and starts again when the variable changes.
uint64_t next_seed() {
  static uint64_t first = 0, launches = 0;
  const char* text = getenv("RD_EMULATION_SEED");
  const uint64_t seed = text ? strtoull(text, nullptr, 10) : 0;
  if (seed != first) launches = 0;
  first = seed;
  return seed + launches++;
}

}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDeviceFunction:
      return "cudaErrorInvalidDeviceFunction";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    case cudaErrorInvalidClusterSize:
      return "cudaErrorInvalidClusterSize";
  }
  return "unrecognized error code";
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorInvalidClusterSize:
      return "cluster misconfiguration";
  }
  return "unrecognized error code";
}

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return report(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int number) {
  if (number != 0) return report(cudaErrorInvalidDevice);
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock:
      *value = 1024;
      break;
    case cudaDevAttrWarpSize:
      *value = 32;
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = device().processors;
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = device().major;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = device().minor;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = device().block_shared_bytes;
      break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = device().processor_shared_bytes;
      break;
    default:
      return report(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}

namespace emulation {

cudaError_t set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (kernel == nullptr) return report(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > device().block_shared_bytes) return report(cudaErrorInvalidValue);
  shared_limits[kernel] = value;
  return cudaSuccess;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(void*),
                   void* arguments) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  dim3 cluster;
  for (unsigned i = 0; i < config.numAttrs; i++) {
    const cudaLaunchAttribute& attribute = config.attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) {
      cluster = {attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z};
    }
  }
  const auto empty = [](const dim3& size) { return size.x == 0 || size.y == 0 || size.z == 0; };
  if (empty(grid) || empty(block) || empty(cluster) || grid.x > 0x7fffffff || grid.y > 65535 ||
      grid.z > 65535 || block.x > 1024 || block.y > 1024 || block.z > 64 ||
      block.x * block.y * block.z > 1024 || grid.x % cluster.x || grid.y % cluster.y || grid.z % cluster.z) {
    return report(cudaErrorInvalidConfiguration);
  }
  const uint64_t cluster_blocks = uint64_t{cluster.x} * cluster.y * cluster.z;
  if (cluster_blocks > (device().major >= 9 ? 8 : 1)) return report(cudaErrorInvalidClusterSize);
  const auto limit = shared_limits.find(kernel);
  if (config.dynamicSmemBytes > size_t(limit == shared_limits.end() ? kSharedBytes : limit->second)) {
    return report(cudaErrorInvalidValue);
  }

  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  run({kernel,
       {grid.x, grid.y, grid.z},
       {block.x, block.y, block.z},
       {cluster.x, cluster.y, cluster.z},
       config.dynamicSmemBytes,
       body,
       arguments},
      next_seed());
  return cudaSuccess;
}

}  // namespace emulation
