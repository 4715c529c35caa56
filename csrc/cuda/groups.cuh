// Steps 2 and 3 of the op on the device: sums by group in two stages, and the objective. Written for blocks
// of kGroupThreads threads, all of which call these functions. Sums are taken in a fixed order, those over
// chunks in double; bad labels and ids are counted in integers. Letters: N rows, G groups.
#pragma once

#include "cuda/launch.h"
#include "cuda/rows.cuh"

namespace rd::cuda {

constexpr int kGroupThreads = 256;
constexpr int kTileWords = kGroupThreads / 32;  // bits of as many columns as there are threads

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
  uint32_t member[kTileWords][kChunkRows];  // a bit for each column of the tile
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

// Row i, the chunk's r-th: which of a tile's columns it is in. Columns are the groups, G for a row in none of
// them and G + 1 for every row that counts. A repeated id sets its bit again. Returns whether an id is bad.
__device__ __forceinline__ bool find_columns(const Groups& groups, int64_t i, int r, int64_t start,
                                             GroupMemory& memory) {
  const auto enter = [&](int64_t column) {
    const uint64_t place = column - start;  // huge if the column is in an earlier tile
    if (place < kGroupThreads) memory.member[place / 32][r] |= 1u << (place % 32);
  };
  bool in_a_group = false, bad = false;
  for (int64_t k = 0; k < groups.width; ++k) {
    if (groups.lists != nullptr) {
      const int64_t id = groups.lists[i * groups.width + k];
      const bool inside = id >= 0 && id < groups.count;
      if (inside) enter(id);
      in_a_group |= inside;
      bad |= !inside && id != -1;
    } else {
      const uint32_t word = groups.bits[i * groups.width + k];
      const uint64_t place = k - start / 32;
      if (place < kTileWords) memory.member[place][r] = word;
      in_a_group |= word != 0;
    }
  }
  if (!in_a_group && !bad) enter(groups.count);
  enter(groups.count + 1);
  return bad;
}

// Stage 1: a chunk's partial sums for each column, a tile of them at a time.
__device__ __forceinline__ void reduce_chunk(const Reduction& job, int64_t chunk, GroupMemory& memory) {
  const int64_t first = chunk * kChunkRows, columns = job.groups.count + 2;
  const int rows = static_cast<int>(job.rows - first < kChunkRows ? job.rows - first : kChunkRows);
  if (threadIdx.x < 2) memory.bad[threadIdx.x] = 0;
  __syncthreads();
  for (int r = threadIdx.x; r < rows; r += kGroupThreads) {
    const uint8_t outcome = __ldcg(job.outcome + first + r);
    if (outcome == kBadLabel) atomicAdd(&memory.bad[0], 1ull);
    memory.row_loss[r] = __ldcg(job.row_loss + first + r);
    memory.outcome[r] = outcome;
  }
  const int width = columns_at_once(columns);
  const int lane = threadIdx.x / width, lanes = kGroupThreads / width, column = threadIdx.x % width;
  for (int64_t start = 0; start < columns; start += width) {
    for (int r = threadIdx.x; r < rows; r += kGroupThreads) {
      for (int word = 0; word * 32 < width; ++word) memory.member[word][r] = 0;
      if (!counts(memory.outcome[r])) continue;
      const bool bad = find_columns(job.groups, first + r, r, start, memory);
      if (bad && start == 0) atomicAdd(&memory.bad[1], 1ull);
    }
    __syncthreads();
    Sums<float> sums;
    for (int r = lane; r < rows; r += lanes) {
      if (memory.member[column / 32][r] >> (column % 32) & 1) {
        // not a product: 0 * NaN would spread one row's NaN to every group
        sums.loss += memory.row_loss[r], sums.count += 1, sums.hits += memory.outcome[r] == kHit;
      }
    }
    sums = join_lanes(sums, width, memory);
    if (lane == 0 && start + column < columns) {
      float* partials = job.scratch.partials + chunk * 3 * columns + start + column;
      partials[0] = sums.loss, partials[columns] = sums.count, partials[2 * columns] = sums.hits;
    }
  }
  if (threadIdx.x < 2)
    job.scratch.bad[chunk * 2 + threadIdx.x] = static_cast<uint32_t>(memory.bad[threadIdx.x]);
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

// A group's weight before normalisation, as rd_kernels/rules.py defines it, in double: the rate times a loss
// may exceed what float holds.
struct Rule {
  const float *loss_sum, *count;  // [G]
  const Update& update;
  bool finite;  // every group's mean loss

  __device__ __forceinline__ bool keeps_state() const {
    return update.objective == Objective::kGroupDro || update.objective == Objective::kGroupDroHold;
  }
  // Whether it takes part in the normalisation.
  __device__ __forceinline__ bool takes_part(int64_t g) const {
    return count[g] > 0 || update.objective == Objective::kGroupDro;
  }
  // The weight's logarithm; of kWorstGroup what is compared.
  __device__ __forceinline__ double exponent(int64_t g) const {
    if (!takes_part(g)) return -INFINITY;
    const bool present = count[g] > 0;
    double gain = present && finite ? static_cast<double>(loss_sum[g]) / count[g] : 0;
    if (update.objective == Objective::kWorstGroup) return gain;
    if (keeps_state() && present && update.adjustment != nullptr) gain += update.adjustment[g];
    double prior = 1;
    if (keeps_state()) prior = update.q[g];
    if (update.objective == Objective::kTiltedRows) prior = count[g];
    return log(prior) + (present ? update.rate * gain : 0);
  }
  __device__ __forceinline__ double weight(int64_t g, double largest) const {
    if (update.objective == Objective::kErm) return count[g];
    const double mine = exponent(g);
    if (update.objective == Objective::kWorstGroup) return takes_part(g) && mine == largest;
    return exp(mine - (isfinite(largest) ? largest : 0));
  }
};

// Step 3: q, the weights in the statistics, the coefficients [G] and the loss. Bad labels or ids: loss NaN,
// coefficients 0, q kept. Group DRO keeps q, too, where a mean loss is not finite or the groups that it would
// update have no weight to share.
__device__ __forceinline__ void update_objective(const Statistics& statistics, int64_t num_groups,
                                                 const Update& update, float* loss, float* coefficients,
                                                 GroupMemory& memory) {
  const int64_t columns = num_groups + 2;
  Rule rule = {statistics.stats + kLossSum * columns, statistics.stats + kCount * columns, update, true};
  float* reported = statistics.stats + kWeight * columns;
  const bool valid = statistics.status[0] == 0 && statistics.status[1] == 0;
  const bool keeps_state = rule.keeps_state(), hold = update.objective == Objective::kGroupDroHold;

  bool all_finite = true, any_present = false;
  double shared = 0;
  for (int64_t g = threadIdx.x; g < num_groups; g += kGroupThreads) {
    all_finite &= isfinite(rule.loss_sum[g]);
    if (rule.count[g] > 0) any_present = true, shared += update.q[g];
  }
  rule.finite = __syncthreads_and(all_finite);
  any_present = __syncthreads_or(any_present);
  shared = hold ? block_sum(shared, memory) : 1;
  double largest = -INFINITY, total = 0;
  for (int64_t g = threadIdx.x; g < num_groups; g += kGroupThreads) largest = fmax(largest, rule.exponent(g));
  largest = block_max(largest, memory);
  for (int64_t g = threadIdx.x; g < num_groups; g += kGroupThreads) total += rule.weight(g, largest);
  total = block_sum(total, memory);
  const bool updates = keeps_state && valid && any_present && rule.finite && shared > 0;

  double total_loss = 0, total_weight = 0;
  for (int64_t g = threadIdx.x; g < num_groups; g += kGroupThreads) {
    double weight = total > 0 ? shared * rule.weight(g, largest) / total : 0;
    if (updates && rule.takes_part(g)) update.q[g] = static_cast<float>(weight);
    if (keeps_state) weight = update.q[g];
    const double coefficient = rule.count[g] > 0 ? weight / rule.count[g] : 0;
    coefficients[g] = valid ? static_cast<float>(coefficient) : 0;
    reported[g] = valid ? static_cast<float>(weight) : 0;
    total_weight += weight;
    if (rule.count[g] > 0) total_loss += coefficient * rule.loss_sum[g];
  }
  total_loss = block_sum(total_loss, memory);
  total_weight = block_sum(total_weight, memory);
  if (threadIdx.x == 0) {
    reported[num_groups] = 0;
    reported[num_groups + 1] = valid ? static_cast<float>(total_weight) : 0;
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
