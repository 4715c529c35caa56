#include <atomic>

#include "cuda/launch.cuh"

namespace rd::cuda {
namespace {

std::atomic<bool> programmatic{false};

std::string described(cudaError_t status) {
  return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

}  // namespace

void check(cudaError_t status, const char* kernel) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a launch that failed is not reported again by a later call
  std::string advice;
  if (status == cudaErrorNoKernelImageForDevice) {
    advice =
        "; this build has no code for this GPU: rebuild with TORCH_CUDA_ARCH_LIST naming its compute "
        "capability";
  }
  throw std::runtime_error("CUDA kernel " + std::string(kernel) + ": " + described(status) + advice);
}

CurrentDevice::CurrentDevice(int device, const char* kernel) {
  int current = device;
  check(cudaGetDevice(&current), kernel);
  if (current == device) return;
  check(cudaSetDevice(device), kernel);
  before_ = current;
}

CurrentDevice::~CurrentDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

int attribute(cudaDeviceAttr name, int device, const char* kernel) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, name, device), kernel);
  return value;
}

bool programmatic_launch() { return programmatic; }

void set_programmatic_launch(bool on) { programmatic = on; }

const char* device_type() { return kDeviceType; }

std::string missing() {
  int count = 0;
  const cudaError_t status = cudaGetDeviceCount(&count);
  if (status != cudaSuccess) {
    cudaGetLastError();
    return "CUDA cannot be used on this machine: " + described(status);
  }
  return count == 0 ? "there is no CUDA device" : "";
}

}  // namespace rd::cuda
