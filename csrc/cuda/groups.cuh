// Steps 2 and 3 of the op on the device: sums by group in two stages, and the objective. Written for blocks
// of kGroupThreads threads, all of which call these functions. Sums are taken in a fixed order, those over
// chunks in double; bad labels and ids are counted in integers. Letters: N rows, G groups.
#pragma once

#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace rd::cuda {

constexpr int kGroupThreads = 256;

// A reduction over the rows and, with `loss`, the objective's update.
struct Reduction {
  const float* row_loss;   // [N]
  const uint8_t* outcome;  // [N]
  int64_t rows;
  Groups groups;
  Statistics statistics;
  Scratch scratch;
  Update update;
  float* loss;          // []; null: no update
  float* coefficients;  // [G]
};

// The sum of a group's losses, its rows, its hits.
template <class T>
struct Sums {
  T loss = 0, count = 0, hits = 0;
};

struct GroupMemory {
  double loss[kGroupThreads], count[kGroupThreads], hits[kGroupThreads];
  float row_loss[kChunkRows];
  int32_t column[kChunkRows];  // of a row with an id: its group, G: none, -1: not in any column
  uint8_t outcome[kChunkRows];
  double warp[kGroupThreads / 32];
  unsigned long long bad[2];
  bool is_last;
};

__device__ __forceinline__ bool counts(uint8_t outcome) { return outcome == kMiss || outcome == kHit; }

// True for the block that arrives as the last of `expected`; it sees what the others wrote before they
// arrived, if it reads it past its first-level cache (__ldcg). The counter is 0 again afterwards.
__device__ __forceinline__ bool arrive_last(uint32_t* counter, uint32_t expected, GroupMemory& memory) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    const uint32_t arrived = atomicAdd(counter, 1u);
    __threadfence();
    memory.is_last = arrived == expected - 1;
    if (memory.is_last) atomicExch(counter, 0u);  // a plain store would race with the other blocks' additions
  }
  __syncthreads();
  return memory.is_last;
}

// How the threads share columns: `width` of them side by side, kGroupThreads / width lanes to each.
__device__ __forceinline__ int columns_at_once(int64_t columns) {
  int width = 1;
  while (width < kGroupThreads && width < columns) width *= 2;
  return width;
}

// Adds up what the lanes have for a column, in their order; right in lane 0.
template <class T>
__device__ __forceinline__ Sums<T> join_lanes(const Sums<T>& mine, int width, GroupMemory& memory) {
  __syncthreads();
  memory.loss[threadIdx.x] = mine.loss, memory.count[threadIdx.x] = mine.count,
  memory.hits[threadIdx.x] = mine.hits;
  __syncthreads();
  Sums<T> sums;
  for (int thread = threadIdx.x % width; thread < kGroupThreads && static_cast<int>(threadIdx.x) < width;
       thread += width) {
    sums.loss += static_cast<T>(memory.loss[thread]);
    sums.count += static_cast<T>(memory.count[thread]);
    sums.hits += static_cast<T>(memory.hits[thread]);
  }
  return sums;
}

// Stage 1: a chunk's partial sums for each group, for rows in no group (column G) and for all rows (G + 1).
__device__ __forceinline__ void reduce_chunk(const Reduction& job, int64_t chunk, GroupMemory& memory) {
  const int64_t first = chunk * kChunkRows, num_groups = job.groups.count, columns = num_groups + 2;
  const int rows = static_cast<int>(job.rows - first < kChunkRows ? job.rows - first : kChunkRows);
  if (threadIdx.x < 2) memory.bad[threadIdx.x] = 0;
  __syncthreads();
  for (int r = threadIdx.x; r < rows; r += kGroupThreads) {
    const uint8_t outcome = __ldcg(job.outcome + first + r);
    const bool counted = counts(outcome);
    int32_t column = -1;
    if (job.groups.ids != nullptr) {
      const int64_t id = counted ? job.groups.ids[first + r] : -2;
      if (id >= -1 && id < num_groups) column = static_cast<int32_t>(id == -1 ? num_groups : id);
      if (counted && column < 0) atomicAdd(&memory.bad[1], 1ull);
    } else if (counted) {
      const bool* member = job.groups.mask + (first + r) * num_groups;
      int64_t g = 0;
      while (g < num_groups && !member[g]) ++g;
      if (g == num_groups) column = static_cast<int32_t>(num_groups);
    }
    if (outcome == kBadLabel) atomicAdd(&memory.bad[0], 1ull);
    memory.row_loss[r] = __ldcg(job.row_loss + first + r);
    memory.outcome[r] = outcome;
    memory.column[r] = column;
  }
  __syncthreads();
  if (threadIdx.x < 2)
    job.scratch.bad[chunk * 2 + threadIdx.x] = static_cast<uint32_t>(memory.bad[threadIdx.x]);

  const int width = columns_at_once(columns);
  const int lane = threadIdx.x / width, lanes = kGroupThreads / width;
  for (int64_t start = 0; start < columns; start += width) {
    const int64_t c = start + threadIdx.x % width;
    Sums<float> sums;
    for (int r = lane; r < rows; r += lanes) {
      bool member = counts(memory.outcome[r]);
      if (c <= num_groups) {
        const bool masked = job.groups.mask != nullptr && c < num_groups;
        member = member && (masked ? job.groups.mask[(first + r) * num_groups + c] : memory.column[r] == c);
      }
      if (member && c < columns) {  // not a product: 0 * NaN would spread one row's NaN to every group
        sums.loss += memory.row_loss[r], sums.count += 1, sums.hits += memory.outcome[r] == kHit;
      }
    }
    sums = join_lanes(sums, width, memory);
    if (lane == 0 && c < columns) {
      float* partials = job.scratch.partials + chunk * 3 * columns + c;
      partials[0] = sums.loss, partials[columns] = sums.count, partials[2 * columns] = sums.hits;
    }
  }
}

// Stage 2: the chunks' sums added up; the weights are written as 0.
__device__ __forceinline__ void add_chunks(const Reduction& job, int64_t chunks, GroupMemory& memory) {
  const int64_t columns = job.groups.count + 2;
  const int width = columns_at_once(columns);
  const int lane = threadIdx.x / width, lanes = kGroupThreads / width;
  for (int64_t start = 0; start < columns; start += width) {
    const int64_t c = start + threadIdx.x % width;
    Sums<double> sums;
    for (int64_t chunk = lane; chunk < chunks && c < columns; chunk += lanes) {
      const float* partials = job.scratch.partials + chunk * 3 * columns + c;
      sums.loss += __ldcg(partials), sums.count += __ldcg(partials + columns);
      sums.hits += __ldcg(partials + 2 * columns);
    }
    sums = join_lanes(sums, width, memory);
    if (lane == 0 && c < columns) {
      float* stats = job.statistics.stats + c;
      stats[kLossSum * columns] = static_cast<float>(sums.loss);
      stats[kCount * columns] = static_cast<float>(sums.count);
      stats[kHits * columns] = static_cast<float>(sums.hits);
      stats[kWeight * columns] = 0;
    }
  }
  if (threadIdx.x < 2) memory.bad[threadIdx.x] = 0;
  __syncthreads();
  for (int64_t i = threadIdx.x; i < 2 * chunks; i += kGroupThreads) {
    const uint32_t bad = __ldcg(job.scratch.bad + i);
    if (bad != 0) atomicAdd(&memory.bad[i % 2], static_cast<unsigned long long>(bad));
  }
  __syncthreads();
  if (threadIdx.x < 2) job.statistics.status[threadIdx.x] = static_cast<int64_t>(memory.bad[threadIdx.x]);
  __syncthreads();  // the block reads its own statistics next
}

// combine() over the block's threads, in a fixed order; the result is right in every thread.
template <class Combine>
__device__ __forceinline__ double block_reduce(double value, GroupMemory& memory, const Combine& combine) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) value = combine(value, __shfl_xor_sync(~0u, value, lanes));
  __syncthreads();
  if (threadIdx.x % 32 == 0) memory.warp[threadIdx.x / 32] = value;
  __syncthreads();
  double result = memory.warp[0];
  for (int warp = 1; warp < kGroupThreads / 32; ++warp) result = combine(result, memory.warp[warp]);
  return result;
}

__device__ __forceinline__ double block_sum(double value, GroupMemory& memory) {
  return block_reduce(value, memory, [](double a, double b) { return a + b; });
}

__device__ __forceinline__ double block_max(double value, GroupMemory& memory) {
  return block_reduce(value, memory, [](double a, double b) { return fmax(a, b); });
}

// Exponentiated gradient (Sagawa et al. 2020, Algorithm 1) in log space and double. Groups absent from the
// batch keep their q up to normalisation, or, with kGroupDroHold, as it is. Nothing changes if a present
// group's mean loss is not finite, or if the groups to be updated have no weight to share.
__device__ __forceinline__ void update_q(const float* loss_sum, const float* count, int64_t num_groups,
                                         const Update& update, GroupMemory& memory) {
  const bool hold = update.objective == Objective::kGroupDroHold;
  const auto log_weight = [&](int64_t g) {
    const double log_q = log(static_cast<double>(update.q[g]));
    if (!(count[g] > 0)) return log_q;
    const double mean = static_cast<double>(loss_sum[g]) / count[g];
    return log_q + update.step_size * (mean + (update.adjustment ? update.adjustment[g] : 0.0f));
  };
  double largest = -INFINITY, shared = 0, unusable = 0;
  for (int64_t g = threadIdx.x; g < num_groups; g += kGroupThreads) {
    if (count[g] > 0) {
      if (!isfinite(loss_sum[g])) unusable = 1;
    } else if (hold) {
      continue;
    }
    largest = fmax(largest, log_weight(g));
    shared += update.q[g];
  }
  largest = block_max(largest, memory);
  shared = block_sum(shared, memory);
  unusable = block_max(unusable, memory);
  if (unusable > 0 || (hold && !(shared > 0))) return;
  double total = 0;
  for (int64_t g = threadIdx.x; g < num_groups; g += kGroupThreads) {
    if (!hold || count[g] > 0) total += exp(log_weight(g) - largest);
  }
  total = block_sum(total, memory);
  for (int64_t g = threadIdx.x; g < num_groups; g += kGroupThreads) {
    if (!hold || count[g] > 0) {
      update.q[g] = static_cast<float>((hold ? shared : 1) * exp(log_weight(g) - largest) / total);
    }
  }
}

// Step 3: q, the weights in the statistics, the coefficients [G] and the loss. Bad labels or ids: loss NaN,
// coefficients 0, q kept.
__device__ __forceinline__ void update_objective(const Statistics& statistics, int64_t num_groups,
                                                 const Update& update, float* loss, float* coefficients,
                                                 GroupMemory& memory) {
  const int64_t columns = num_groups + 2;
  const float* loss_sum = statistics.stats + kLossSum * columns;
  const float* count = statistics.stats + kCount * columns;
  float* weight = statistics.stats + kWeight * columns;
  const bool valid = statistics.status[0] == 0 && statistics.status[1] == 0;
  const bool is_erm = update.objective == Objective::kErm;
  double rows = 0;
  for (int64_t g = threadIdx.x; g < num_groups; g += kGroupThreads) rows += count[g];
  rows = block_sum(rows, memory);
  if (valid && !is_erm && rows > 0) update_q(loss_sum, count, num_groups, update, memory);

  double total_loss = 0, total_weight = 0;
  for (int64_t g = threadIdx.x; g < num_groups; g += kGroupThreads) {
    double coefficient = 0;
    if (is_erm && rows > 0) coefficient = 1 / rows;
    if (!is_erm && count[g] > 0) coefficient = static_cast<double>(update.q[g]) / count[g];
    const double group_weight = is_erm ? coefficient * count[g] : update.q[g];
    coefficients[g] = valid ? static_cast<float>(coefficient) : 0;
    weight[g] = valid ? static_cast<float>(group_weight) : 0;
    total_weight += group_weight;
    if (count[g] > 0) total_loss += coefficient * loss_sum[g];
  }
  total_loss = block_sum(total_loss, memory);
  total_weight = block_sum(total_weight, memory);
  if (threadIdx.x == 0) {
    weight[num_groups] = 0;
    weight[num_groups + 1] = valid ? static_cast<float>(total_weight) : 0;
    *loss = valid ? static_cast<float>(total_loss) : NAN;
  }
}

// After a block has left row results of its part of the chunk: the last of the chunk's `blocks` sums it, and
// the last of the chunks finishes the reduction and the objective.
__device__ __forceinline__ void finish_groups(const Reduction& job, int64_t chunk, uint32_t blocks,
                                              GroupMemory& memory) {
  const int64_t chunks = job.rows > kChunkRows ? (job.rows + kChunkRows - 1) / kChunkRows : 1;
  if (blocks > 1 && !arrive_last(job.scratch.counters + 1 + chunk, blocks, memory)) return;
  reduce_chunk(job, chunk, memory);
  if (!arrive_last(job.scratch.counters, static_cast<uint32_t>(chunks), memory)) return;
  add_chunks(job, chunks, memory);
  if (job.loss != nullptr) {
    update_objective(job.statistics, job.groups.count, job.update, job.loss, job.coefficients, memory);
  }
}

}  // namespace rd::cuda
