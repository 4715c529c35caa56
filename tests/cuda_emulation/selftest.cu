// Small kernels that need one thing of a GPU each, right ones and (BUG_...) wrong ones: does the emulation
// tell them apart? `selftest NAME [LAUNCHES]` prints "right" or "wrong"; what a sanitizer or the scheduler
// finds ends it.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <string>

#include "cuda/hardware.cuh"

namespace {

constexpr unsigned kAll = 0xffffffff;

__device__ float warp_sum(float value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
#ifdef BUG_SHUFFLE_OFFSET
    value += __shfl_xor_sync(kAll, value, lanes / 2);
#else
    value += __shfl_xor_sync(kAll, value, lanes);
#endif
  }
  return value;
}

__device__ float block_sum(float value, float* partial) {
#ifdef BUG_NOT_ALL_AT_BARRIER
  if (threadIdx.x % 32 == 0) __syncthreads();
#endif
#ifdef BUG_DIFFERENT_COLLECTIVES
  if (threadIdx.x == 0) __ballot_sync(kAll, 1);
#endif
#ifdef BUG_DIFFERENT_MASKS
  __syncwarp(threadIdx.x % 32 ? kAll : 0x55555555);
#else
  if (threadIdx.x % 2 == 0) __syncwarp(0x55555555);  // while the others wait in the sum already
#endif
  value = warp_sum(value);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = value;
#ifndef BUG_MISSING_BARRIER
  __syncthreads();
#endif
  float sum = 0;
  for (unsigned warp = 0; warp < blockDim.x / 32; warp++) sum += partial[warp];
  return sum;
}

// Sums of rows of `count` floats, a row per block, by loads of 4 floats.
__global__ void row_sums(const float* rows, int count, float* sums) {
  float* partial = reinterpret_cast<float*>(rd::cuda::shared_memory());
#if defined BUG_MISALIGNED || defined BUG_MISALIGNED_PLAIN_LOAD
  const float4* row = reinterpret_cast<const float4*>(rows + blockIdx.x * count + (blockIdx.x == 1));
#elif defined BUG_READ_PAST_END
  const float4* row =
      reinterpret_cast<const float4*>(rows + blockIdx.x * count + 4 * (blockIdx.x == gridDim.x - 1));
#else
  const float4* row = reinterpret_cast<const float4*>(rows + blockIdx.x * count);
#endif
  float sum = 0;
  for (int i = threadIdx.x; i < count / 4; i += blockDim.x) {
#ifdef BUG_MISALIGNED_PLAIN_LOAD
    const float4 part = row[i];
#else
    const float4 part = __ldg(row + i);
#endif
    sum += (part.x + part.y) + (part.z + part.w);
  }
#ifdef BUG_EXITED_LANE
  if (threadIdx.x == blockDim.x - 1) return;
#endif
  sum = block_sum(sum, partial);
#ifdef BUG_WRITE_PAST_END
  if (threadIdx.x == 0) sums[blockIdx.x + 1] = sum;
#else
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
#endif
}

__global__ __launch_bounds__(256) void transpose(const int* in, int* out, int rows, int columns) {
#ifdef BUG_SHARED_OVERFLOW
  constexpr int kPitch = 18;
#else
  constexpr int kPitch = 17;
#endif
  int* tile = reinterpret_cast<int*>(rd::cuda::shared_memory());
  const int row = blockIdx.y * 16 + threadIdx.y, column = blockIdx.x * 16 + threadIdx.x;
  if (row < rows && column < columns) tile[threadIdx.y * kPitch + threadIdx.x] = in[row * columns + column];
#ifndef BUG_MISSING_BARRIER
  __syncthreads();
#endif
  const int to_row = blockIdx.x * 16 + threadIdx.y, to_column = blockIdx.y * 16 + threadIdx.x;
  if (to_row < columns && to_column < rows) {
    out[to_row * rows + to_column] = tile[threadIdx.x * kPitch + threadIdx.y];
  }
}

// The last block adds up what the others left, in a fixed order.
__global__ void last_block(float* partial, unsigned* counter, float* total) {
  bool* last = reinterpret_cast<bool*>(rd::cuda::shared_memory());
  if (threadIdx.x < 4) partial[blockIdx.x * 4 + threadIdx.x] = static_cast<float>(blockIdx.x);
#ifndef BUG_MISSING_FENCE
  __threadfence();
#endif
#ifndef BUG_MISSING_BARRIER
  __syncthreads();
#endif
  if (threadIdx.x == 63) *last = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
  __syncthreads();
  if (!*last) return;
#ifndef BUG_MISSING_ACQUIRE
  __threadfence();
#endif
  float sum = 0;
  for (unsigned i = threadIdx.x; i < gridDim.x * 4; i += blockDim.x) sum += partial[i];
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_down_sync(kAll, sum, lanes);
  __syncthreads();  // before what was read is written over
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) *total = partial[0] + partial[1];
}

__global__ void cluster_sum(float* sums) {
  float* mine = reinterpret_cast<float*>(rd::cuda::shared_memory());
  if (threadIdx.x == 0) *mine = static_cast<float>(blockIdx.x);
#ifndef BUG_MISSING_BARRIER
  rd::cuda::cluster_sync();
#endif
  float sum = 0;
  for (unsigned rank = 0; rank < rd::cuda::cluster_size(); rank++) sum += rd::cuda::cluster_read(mine, rank);
#ifndef BUG_EXIT_BEFORE_READ
  rd::cuda::cluster_sync();
#endif
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

__global__ void copy_reversed(const int* in, int* out) {
  auto* copy = reinterpret_cast<int*>(rd::cuda::shared_memory());
  auto* barrier = reinterpret_cast<rd::cuda::CopyBarrier*>(copy + blockDim.x);
  if (threadIdx.x == 0) {
#ifndef BUG_NO_INIT
    rd::cuda::init(barrier);
#endif
    rd::cuda::begin_copy(copy, in + blockIdx.x * blockDim.x, blockDim.x * sizeof(int), barrier);
  }
  __syncthreads();
#ifdef BUG_NO_AWAIT
  if (threadIdx.x >= 32)
#endif
    rd::cuda::await_copy(barrier);
  out[blockIdx.x * blockDim.x + threadIdx.x] = copy[blockDim.x - 1 - threadIdx.x];
}

// --- Launches

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, unsigned cluster,
            Arguments... arguments) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {cluster, 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {grid, block, shared, nullptr, attributes, 2};
  const cudaError_t error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != cudaSuccess) {
    printf("%s: %s\n", cudaGetErrorName(error), cudaGetErrorString(error));
    exit(2);
  }
}

bool row_sums_right() {
  constexpr int kRows = 7, kCount = 1024;
  // new[]: its ends are where the address sanitizer looks.
  const std::unique_ptr<float[]> rows(new float[kRows * kCount]), sums(new float[kRows]);
  for (int i = 0; i < kRows * kCount; i++) rows[i] = static_cast<float>(i % 13);
  size_t shared = 4 * sizeof(float);
#ifdef BUG_TOO_MUCH_SHARED
  shared = (48 << 10) + 1;
#endif
  launch(row_sums, kRows, 128, shared, 1, rows.get(), kCount, sums.get());
  for (int row = 0; row < kRows; row++) {
    float expected = 0;
    for (int i = 0; i < kCount; i++) expected += rows[row * kCount + i];
    if (sums[row] != expected) return false;
  }
  return true;
}

bool transpose_right() {
  constexpr int kRows = 40, kColumns = 50;
  const std::unique_ptr<int[]> in(new int[kRows * kColumns]), out(new int[kRows * kColumns]);
  for (int i = 0; i < kRows * kColumns; i++) in[i] = i;
  launch(transpose, dim3(4, 3), dim3(16, 16), (16 * 17 - 1) * sizeof(int), 1, in.get(), out.get(), kRows,
         kColumns);
  for (int i = 0; i < kRows * kColumns; i++) {
    if (out[i % kColumns * kRows + i / kColumns] != i) return false;
  }
  return true;
}

bool last_block_right() {
  constexpr int kBlocks = 20;
  const std::unique_ptr<float[]> partial(new float[kBlocks * 4]);
  for (int i = 0; i < kBlocks * 4; i++) partial[i] = -1;
  unsigned counter = 0;
  float total = 0;
  launch(last_block, kBlocks, 64, 1, 1, partial.get(), &counter, &total);
  return counter == 0 && total == 4 * kBlocks * (kBlocks - 1) / 2;
}

bool cluster_sum_right() {
  float sums[12];
  launch(cluster_sum, 12, 64, sizeof(float), 4, &sums[0]);
  for (int i = 0; i < 12; i++) {
    if (sums[i] != static_cast<float>(i / 4 * 16 + 6)) return false;
  }
  return true;
}

bool copy_reversed_right() {
  alignas(16) int in[256], out[256];
  for (int i = 0; i < 256; i++) in[i] = i;
  launch(copy_reversed, 4, 64, 64 * sizeof(int) + sizeof(rd::cuda::CopyBarrier), 1, &in[0], &out[0]);
  for (int i = 0; i < 256; i++) {
    if (out[i] != i / 64 * 64 + 63 - i % 64) return false;
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string name = count > 1 ? arguments[1] : "";
  const int launches = count > 2 ? atoi(arguments[2]) : 6;  // each in another order
  for (int i = 0; i < launches; i++) {
    const bool right = name == "row_sums"      ? row_sums_right()
                       : name == "transpose"   ? transpose_right()
                       : name == "last_block"  ? last_block_right()
                       : name == "cluster_sum" ? cluster_sum_right()
                                               : name == "copy_reversed" && copy_reversed_right();
    if (!right) {
      printf("wrong\n");
      return 1;
    }
  }
  printf("right\n");
}
