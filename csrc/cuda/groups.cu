// Steps 2 and 3 as kernels of their own: for rows whose losses are there already, and for distributed
// training, where an all-reduce of the statistics stands between them.
#include "cuda/groups.cuh"
#include "cuda/launch.cuh"

namespace rd::cuda {
namespace {

// One block for each chunk.
__global__ void __launch_bounds__(kGroupThreads, 4)
    group_reduce_kernel(const __grid_constant__ Reduction job) {
  wait_for_previous_kernel();
  GroupMemory& memory = *reinterpret_cast<GroupMemory*>(shared_memory());
  finish_groups(job, blockIdx.x, 1, memory);
}

// One block.
__global__ void __launch_bounds__(kGroupThreads, 4)
    group_update_kernel(Statistics statistics, int64_t num_groups, Update update, float* loss,
                        float* coefficients) {
  wait_for_previous_kernel();
  GroupMemory& memory = *reinterpret_cast<GroupMemory*>(shared_memory());
  update_objective(statistics, num_groups, update, loss, coefficients, memory);
}

// `lanes` threads of a warp, a power of two, share a row's words of bits.
__global__ void __launch_bounds__(kGroupThreads)
    row_scale_kernel(const float* coefficients, const uint8_t* outcome, int64_t rows, Groups groups,
                     int lanes, float* scale) {
  wait_for_previous_kernel();
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kGroupThreads + threadIdx.x) / lanes;
  const bool counted = i < rows && counts(outcome[i]);
  const int lane = threadIdx.x % lanes;
  float sum = 0;
  if (counted && groups.lists != nullptr) {
    const int64_t* ids = groups.lists + i * groups.width;
    for (int64_t k = 0; k < groups.width; ++k) {
      bool repeated = false;
      for (int64_t before = 0; before < k; ++before) repeated |= ids[before] == ids[k];
      if (!repeated && ids[k] >= 0 && ids[k] < groups.count) sum += coefficients[ids[k]];
    }
  } else if (counted) {
    for (int64_t k = lane; k < groups.width; k += lanes) {
      for (uint32_t word = groups.bits[i * groups.width + k]; word != 0; word &= word - 1) {
        sum += coefficients[k * 32 + __ffs(static_cast<int>(word)) - 1];
      }
    }
  }
  for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (i < rows && lane == 0) scale[i] = sum;
}

// A word for each `lanes` threads of a warp, a power of two: a thread reads a byte of it. blockIdx.y is the
// word's place in its row.
__global__ void __launch_bounds__(kGroupThreads)
    pack_mask_kernel(const bool* mask, int64_t rows, int64_t num_groups, int lanes, uint32_t* bits) {
  wait_for_previous_kernel();
  const int64_t i = static_cast<int64_t>(blockIdx.x) * (kGroupThreads / lanes) + threadIdx.x / lanes;
  const int lane = threadIdx.x % lanes, in_warp = threadIdx.x % 32;
  const int64_t g = static_cast<int64_t>(blockIdx.y) * 32 + lane;
  const uint32_t warp = __ballot_sync(~0u, i < rows && g < num_groups && mask[i * num_groups + g]);
  if (i < rows && lane == 0) bits[i * gridDim.y + blockIdx.y] = warp >> in_warp & ~0u >> (32 - lanes);
}

// How many lanes share `work`, a power of two.
int lanes_for(int64_t work) {
  int lanes = 1;
  while (lanes < 32 && lanes < work) lanes *= 2;
  return lanes;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

void group_reduce(const Queue& queue, const float* row_loss, const uint8_t* outcome, int64_t rows,
                  const Groups& groups, const Statistics& statistics, const Scratch& scratch) {
  const Reduction job = {row_loss, outcome, rows, groups, statistics, scratch, {}, nullptr, nullptr};
  const int64_t chunks = rows > kChunkRows ? ceil_div(rows, kChunkRows) : 1;
  launch("group_reduce", group_reduce_kernel, queue, {chunks, kGroupThreads, sizeof(GroupMemory)}, job);
}

void group_update(const Queue& queue, const Statistics& statistics, int64_t num_groups, const Update& update,
                  float* loss, float* coefficients) {
  launch("group_update", group_update_kernel, queue, {1, kGroupThreads, sizeof(GroupMemory)}, statistics,
         num_groups, update, loss, coefficients);
}

void row_scale(const Queue& queue, const float* coefficients, const uint8_t* outcome, int64_t rows,
               const Groups& groups, float* scale) {
  const int lanes = groups.lists != nullptr ? 1 : lanes_for(groups.width);
  launch("row_scale", row_scale_kernel, queue, {ceil_div(rows * lanes, kGroupThreads), kGroupThreads},
         coefficients, outcome, rows, groups, lanes, scale);
}

void pack_mask(const Queue& queue, const bool* mask, int64_t rows, int64_t num_groups, uint32_t* bits) {
  const int lanes = lanes_for(num_groups);
  Grid grid = {ceil_div(rows * lanes, kGroupThreads), kGroupThreads};
  grid.segments = ceil_div(num_groups, 32);
  launch("pack_mask", pack_mask_kernel, queue, grid, mask, rows, num_groups, lanes, bits);
}

}  // namespace rd::cuda
