// The linear op's kernel: logits become U = softmax - onehot where they are, in one kernel, before the row
// weights are known. A row is needed twice. It is kept in shared memory in between, by a cluster of blocks if
// it is too long for one (Hopper and newer), copied there by the copy engine where there is one; a row too
// long for that is read again, which the second-level cache answers.
#include "cuda/gradient.cuh"
#include "cuda/launch.cuh"

namespace rd::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kUnroll = 4;
constexpr int kCopyPieces = 1024;  // of one bulk copy
constexpr int kMaxCopies = 16;
constexpr int kMaxCluster = 8;

enum class Keep { kNothing, kByThreads, kByCopyEngine };

template <bool kDetails>
struct RowMemory {
  SoftmaxSlots<kThreads / 32, kDetails> slots;
  CopyBarrier copies[kMaxCopies];
};
constexpr int kHeader = (sizeof(RowMemory<true>) + 127) / 128 * 128;  // the row's pieces follow

// One cluster for each row; every block has a stretch of its pieces.
template <class T, Keep kKeep, bool kDetails>
__global__ void __launch_bounds__(kThreads) softmax_minus_onehot_kernel(Rows rows, RowResults results) {
  wait_for_previous_kernel();
  auto& memory = *reinterpret_cast<RowMemory<kDetails>*>(shared_memory());
  uint4* const kept = reinterpret_cast<uint4*>(shared_memory() + kHeader);
  const int rank = static_cast<int>(cluster_rank()), blocks = static_cast<int>(cluster_size());
  const int64_t i = blockIdx.x / blocks;
  const int thread = threadIdx.x;
  const Row<T> row(row_of<T>(rows.logits, rows.stride, i), rows.vocabulary);
  const int share = (row.pieces + blocks - 1) / blocks;
  const int begin = min(rank * share, row.pieces), end = min(begin + share, row.pieces);
  const Part part = {thread, kThreads, begin, end, rank == 0};
  const bool writes_results = rank == 0 && thread == 0;

  const int64_t label = rows.labels[i];
  const Outcome outcome = outcome_by_label(rows, label);
  if (outcome != kMiss) {
    write_zeros(row, part);
    if (writes_results) write_uncounted<kDetails>(results, i, outcome);
    return;
  }
  const float z_label = Element<T>::load(row.begin[label]);  // by every thread before any writes

  Softmax<kDetails> seen;
  if (const int column = part.edges ? row.edge(thread) : -1; column >= 0) {
    seen.absorb(Element<T>::load(row.begin[column]), z_label);
  }
  if constexpr (kKeep == Keep::kByCopyEngine) {
    if (thread == 0) {
      for (int c = 0; c * kCopyPieces < end - begin; ++c) {
        const int pieces = min(kCopyPieces, end - begin - c * kCopyPieces);
        init(&memory.copies[c]);
        begin_copy(kept + c * kCopyPieces, row.body() + begin + c * kCopyPieces, pieces * 16,
                   &memory.copies[c]);
      }
    }
    __syncthreads();
    for (int c = 0; c * kCopyPieces < end - begin; ++c) {
      await_copy(&memory.copies[c]);
      const int stop = min((c + 1) * kCopyPieces, end - begin);
      for (int piece = c * kCopyPieces + thread; piece < stop; piece += kThreads) {
        float z[1][kWide<T>];
        unpack<T>(kept[piece], z[0]);
        seen.absorb(z, z_label);
      }
    }
  } else {
    for (int first = begin + thread; first < end; first += kUnroll * kThreads) {
      uint4 bits[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int piece = first + u * kThreads;
        bits[u] = piece < end ? row.body()[piece] : minus_infinities<T>();
      }
      float z[kUnroll][kWide<T>];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int piece = first + u * kThreads;
        if (kKeep == Keep::kByThreads && piece < end) kept[piece - begin] = bits[u];
        unpack<T>(bits[u], z[u]);
      }
      seen.absorb(z, z_label);
    }
  }
  float smooth = 0;
  join_blocks<kThreads, true, kDetails>(seen, smooth, memory.slots);

  const float maximum = seen.saved_maximum(), log_total = seen.log_total();
  if (writes_results) write_counted(results, rows, i, seen, log_total + (seen.maximum - z_label), z_label);
  const Slope slope = {maximum, log_total, 1, 1, 0, static_cast<int>(label)};
  if constexpr (kKeep == Keep::kNothing) {
    write_gradient<T, false>(row.begin, row, part, slope, nullptr);
  } else {
    write_edge<T, false>(row.begin, row, part, slope, nullptr);
    for (int piece = begin + thread; piece < end; piece += kThreads) {
      store(row.body() + piece,
            gradient_of<T, false>(kept[piece - begin], row.column(piece), slope, nullptr));
    }
  }
}

struct Plan {
  Keep keep;
  Grid grid;
};

// A row's share of shared memory leaves room for a second block, so that one reads while the other writes; if
// even the largest cluster is too small for that, for one block.
Plan plan_for(const Queue& queue, const Rows& rows, int64_t row_bytes, const char* name) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, queue.device, name);
  const int64_t most = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, queue.device, name);
  const int64_t half = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor, queue.device, name) / 2 - 1024;
  const int largest = major == 9 || major == 10 ? kMaxCluster : 1;
  for (const int64_t room : {half < most ? half : most, most}) {
    for (int cluster = 1; cluster <= largest; cluster *= 2) {
      const int64_t pieces = (row_bytes / 16 + cluster - 1) / cluster, bytes = kHeader + pieces * 16;
      if (bytes > room || pieces > kMaxCopies * kCopyPieces) continue;
      return {major >= 9 ? Keep::kByCopyEngine : Keep::kByThreads,
              {rows.count * cluster, kThreads, static_cast<int>(bytes), cluster}};
    }
  }
  return {Keep::kNothing, {rows.count, kThreads, kHeader}};
}

}  // namespace

void softmax_minus_onehot(const Queue& queue, const Rows& rows, const RowResults& results) {
  const char* name = "softmax_minus_onehot";
  if (rows.count > 1 && rows.stride < rows.vocabulary) {
    throw std::invalid_argument("logits: rows that overlap in memory cannot be overwritten");
  }
  with_element(rows.dtype, [&](auto element) {
    using T = decltype(element);
    const Plan plan = plan_for(queue, rows, rows.vocabulary * static_cast<int64_t>(sizeof(T)), name);
    with_constant(results.details.entropy != nullptr, [&](auto details) {
      const auto start = [&](auto keep) {
        launch(name, softmax_minus_onehot_kernel<T, keep(), details()>, queue, plan.grid, rows, results);
      };
      switch (plan.keep) {
        case Keep::kNothing:
          return start(std::integral_constant<Keep, Keep::kNothing>());
        case Keep::kByThreads:
          return start(std::integral_constant<Keep, Keep::kByThreads>());
        case Keep::kByCopyEngine:
          return start(std::integral_constant<Keep, Keep::kByCopyEngine>());
      }
    });
  });
}

}  // namespace rd::cuda
