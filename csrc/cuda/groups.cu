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

// `lanes` threads of a warp, a power of two, share a row's mask.
__global__ void __launch_bounds__(kGroupThreads)
    row_scale_kernel(const float* coefficients, const uint8_t* outcome, int64_t rows, Groups groups,
                     int lanes, float* scale) {
  wait_for_previous_kernel();
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kGroupThreads + threadIdx.x) / lanes;
  const bool counted = i < rows && counts(outcome[i]);
  const int lane = threadIdx.x % lanes;
  float sum = 0;
  if (counted && groups.ids != nullptr) {
    const int64_t id = groups.ids[i];
    if (id >= 0 && id < groups.count) sum = coefficients[id];
  } else if (counted) {
    const bool* member = groups.mask + i * groups.count;
    for (int64_t g = lane; g < groups.count; g += lanes) sum += member[g] ? coefficients[g] : 0.0f;
  }
  for (int step = lanes / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  if (i < rows && lane == 0) scale[i] = sum;
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
  int lanes = 1;
  while (groups.mask != nullptr && lanes < 32 && lanes < groups.count) lanes *= 2;
  launch("row_scale", row_scale_kernel, queue, {ceil_div(rows * lanes, kGroupThreads), kGroupThreads},
         coefficients, outcome, rows, groups, lanes, scale);
}

}  // namespace rd::cuda
