// Step 1, alone and with steps 2 and 3 in the same kernel: every row is read once.
#include <algorithm>

#include "cuda/groups.cuh"
#include "cuda/launch.cuh"

namespace rd::cuda {
namespace {

constexpr int kThreads = kGroupThreads;
constexpr int kUnroll = 4;       // pieces that a thread has in flight
constexpr int kShortRow = 2048;  // elements; a warp is enough for a row up to here
constexpr int kMaxCluster = 8;

// One row by a team of kTeam threads of each of the cluster's blocks; its results are written by the first of
// them.
template <class T, int kTeam, bool kSmooth, bool kDetails>
__device__ __forceinline__ void row_pass(const Rows& rows, const Weighting& weighting,
                                         const RowResults& results, int64_t i,
                                         SoftmaxSlots<kTeam / 32, kDetails>& slots) {
  const int thread = kTeam == 32 ? threadIdx.x % 32 : cluster_rank() * kTeam + threadIdx.x;
  const int64_t label = rows.labels[i];
  const Outcome outcome = outcome_by_label(rows, label);
  if (outcome != kMiss) {
    if (thread == 0) write_uncounted<kDetails>(results, i, outcome);
    return;
  }
  const Row<const T> row(row_of<const T>(rows.logits, rows.stride, i), rows.vocabulary);
  const float z_label = Element<T>::load(row.begin[label]);
  // Logits are summed relative to one of them, so that a large common offset costs no precision.
  const float origin = kSmooth && isfinite(z_label) ? z_label : 0;
  const float* w = weighting.class_weight;

  Softmax<kDetails> seen;
  float smooth = 0;  // sum_j w_j (origin - z_j)
  if (const int column = row.edge(thread); column >= 0) {
    const float z = Element<T>::load(row.begin[column]);
    seen.absorb(z, z_label);
    if constexpr (kSmooth) smooth += (w ? w[column] : 1.0f) * (origin - z);
  }
  const int team = kTeam == 32 ? 32 : cluster_size() * kTeam;
  for (int first = thread; first < row.pieces; first += kUnroll * team) {
    uint4 bits[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int piece = first + u * team;
      bits[u] = piece < row.pieces ? __ldg(row.body() + piece) : minus_infinities<T>();
    }
    float z[kUnroll][kWide<T>];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) unpack<T>(bits[u], z[u]);
    seen.absorb(z, z_label);
    if constexpr (kSmooth) {
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        if (const int piece = first + u * team; piece < row.pieces) {
#pragma unroll
          for (int e = 0; e < kWide<T>; ++e) {
            smooth += (w ? w[row.column(piece) + e] : 1.0f) * (origin - z[u][e]);
          }
        }
      }
    }
  }
  if constexpr (kTeam == 32) {
    join_warp(seen, smooth);
  } else {
    join_blocks<kTeam, false, kDetails>(seen, smooth, slots);
  }
  if (thread != 0) return;

  const float log_total = seen.log_total();
  // Not (maximum + log_total) - z_label: a small loss would inherit the rounding of a large maximum.
  float loss = log_total + (seen.maximum - z_label);
  if (w != nullptr) loss *= w[label];
  if constexpr (kSmooth) {
    const float v = static_cast<float>(rows.vocabulary);
    const float mass = weighting.weight_sum ? *weighting.weight_sum : v;
    smooth += mass * (log_total + (seen.maximum - origin));
    loss = (1 - weighting.smoothing) * loss + weighting.smoothing / v * smooth;
  }
  write_counted(results, rows, i, seen, loss, z_label);
}

// kThreads / kTeam rows for each cluster.
template <int kTeam>
__device__ __forceinline__ int64_t row_of_team() {
  const unsigned block = kTeam == kThreads ? blockIdx.x / cluster_size() : blockIdx.x;
  return static_cast<int64_t>(block) * (kThreads / kTeam) + threadIdx.x / kTeam;
}

template <class T, int kTeam, bool kSmooth, bool kDetails>
__global__ void __launch_bounds__(kThreads)
    row_forward_kernel(Rows rows, Weighting weighting, RowResults results) {
  wait_for_previous_kernel();
  auto& slots = *reinterpret_cast<SoftmaxSlots<kTeam / 32, kDetails>*>(shared_memory());
  const int64_t i = row_of_team<kTeam>();
  if (i < rows.count) row_pass<T, kTeam, kSmooth, kDetails>(rows, weighting, results, i, slots);
  let_next_kernel_start();
}

template <class T, int kTeam>
__global__ void __launch_bounds__(kThreads, 4)
    grouped_forward_kernel(Rows rows, RowResults results, const __grid_constant__ Reduction job) {
  wait_for_previous_kernel();
  auto& slots = *reinterpret_cast<SoftmaxSlots<kTeam / 32, false>*>(shared_memory());
  const int64_t i = row_of_team<kTeam>();
  if (i < rows.count) row_pass<T, kTeam, false, false>(rows, {}, results, i, slots);
  let_next_kernel_start();
  if (kTeam == kThreads && cluster_rank() != 0) return;  // the row's results are in its first block
  const int64_t per_block = kThreads / kTeam;
  const int64_t chunk = i / kChunkRows, rest = rows.count - chunk * kChunkRows;
  const int64_t in_chunk = rest < kChunkRows ? rest : kChunkRows;
  finish_groups(job, chunk, static_cast<uint32_t>((in_chunk + per_block - 1) / per_block),
                *reinterpret_cast<GroupMemory*>(shared_memory()));
}

// Rows that are too few to keep every multiprocessor busy are shared by the blocks of a cluster, each of
// which has a few pieces for every thread.
int cluster_for(const Queue& queue, const Rows& rows, int64_t row_bytes, const char* name) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, queue.device, name);
  if (major != 9 && major != 10) return 1;
  const int64_t wanted = 4LL * attribute(cudaDevAttrMultiProcessorCount, queue.device, name);
  const int64_t useful = row_bytes / (16 * kUnroll * kThreads);
  int cluster = 1;
  while (cluster < kMaxCluster && cluster * 2 <= useful && rows.count * cluster * 2 <= wanted) cluster *= 2;
  return cluster;
}

template <class Call>
void with_team(const Queue& queue, const Rows& rows, int shared_bytes, const char* name, const Call& call) {
  with_element(rows.dtype, [&](auto element) {
    using T = decltype(element);
    if (rows.vocabulary <= kShortRow) {
      const int64_t per_block = kThreads / 32;
      call(element, std::integral_constant<int, 32>(),
           Grid{(rows.count + per_block - 1) / per_block, kThreads, shared_bytes});
    } else {
      const int64_t row_bytes = rows.vocabulary * static_cast<int64_t>(sizeof(T));
      const int cluster = cluster_for(queue, rows, row_bytes, name);
      call(element, std::integral_constant<int, kThreads>(),
           Grid{rows.count * cluster, kThreads, shared_bytes, cluster});
    }
  });
}

}  // namespace

void row_forward(const Queue& queue, const Rows& rows, const Weighting& weighting,
                 const RowResults& results) {
  const char* name = "row_forward";
  const auto with_options = [&](const auto& call) {
    with_constant(weighting.smoothing > 0, [&](auto smooth) {
      with_constant(results.details.entropy != nullptr, [&](auto details) { call(smooth, details); });
    });
  };
  with_team(queue, rows, sizeof(SoftmaxSlots<kThreads / 32, true>), name,
            [&](auto element, auto team, const Grid& grid) {
              with_options([&](auto smooth, auto details) {
                launch(name, row_forward_kernel<decltype(element), team(), smooth(), details()>, queue, grid,
                       rows, weighting, results);
              });
            });
}

void grouped_forward(const Queue& queue, const Rows& rows, const RowResults& results, const Groups& groups,
                     const Update& update, const Statistics& statistics, float* loss, float* coefficients,
                     const Scratch& scratch) {
  const char* name = "grouped_forward";
  if (rows.count == 0) {  // nothing starts a block that would finish the groups
    group_reduce(queue, results.loss, results.outcome, 0, groups, statistics, scratch);
    group_update(queue, statistics, groups.count, update, loss, coefficients);
    return;
  }
  const Reduction job = {results.loss, results.outcome, rows.count, groups,      statistics,
                         scratch,      update,          loss,       coefficients};
  const int shared_bytes = std::max(sizeof(SoftmaxSlots<kThreads / 32, false>), sizeof(GroupMemory));
  with_team(queue, rows, shared_bytes, name, [&](auto element, auto team, const Grid& grid) {
    launch(name, grouped_forward_kernel<decltype(element), team()>, queue, grid, rows, results, job);
  });
}

}  // namespace rd::cuda
