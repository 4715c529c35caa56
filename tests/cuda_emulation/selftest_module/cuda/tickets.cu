#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

#include "tickets.h"

namespace {

__global__ void tickets(unsigned* counter, unsigned* order) {
  __syncthreads();
  order[blockIdx.x * blockDim.x + threadIdx.x] = atomicAdd(counter, 1u);
}

}  // namespace

void draw_tickets(unsigned* counter, unsigned* order, unsigned blocks, unsigned threads) {
  cudaLaunchConfig_t config = {blocks, threads, 0, nullptr, nullptr, 0};
  const cudaError_t error = cudaLaunchKernelEx(&config, tickets, counter, order);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorName(error));
}

int attribute(int which) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(which), 0);
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
  return value;
}
