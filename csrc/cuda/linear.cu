// Pieces of the linear op around its matrix products: row weights folded into a matrix, and the labelled rows
// picked from all of them without the host learning how many there are.
#include "cuda/launch.cuh"

namespace rd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kCompactThreads = 1024;

__device__ __forceinline__ bool aligned(const void* a) { return reinterpret_cast<uintptr_t>(a) % 16 == 0; }

// A warp for each row.
template <class T>
__global__ void __launch_bounds__(kThreads) scale_rows_kernel(Matrix x, const float* scale, Matrix out) {
  wait_for_previous_kernel();
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (i >= out.rows) return;
  const int lane = threadIdx.x % 32;
  const float r = scale[i];
  const T* from = row_of<const T>(x.data, x.stride, i);
  const Row<T> to(row_of<T>(out.data, out.stride, i), out.width);
  // Scale 0 wins over NaN.
  const auto scaled = [r](float value) { return r == 0 ? 0.0f : r * value; };
  const bool wide = aligned(from + to.before);
  if (const int column = to.edge(lane); column >= 0) {
    to.begin[column] = Element<T>::store(scaled(Element<T>::load(from[column])));
  }
  for (int piece = lane; piece < to.pieces; piece += 32) {
    const T* place = from + to.column(piece);
    float values[kWide<T>];
    if (wide) {
      unpack<T>(__ldcs(reinterpret_cast<const uint4*>(place)), values);
    } else {
      for (int e = 0; e < kWide<T>; ++e) values[e] = Element<T>::load(place[e]);
    }
#pragma unroll
    for (int e = 0; e < kWide<T>; ++e) values[e] = scaled(values[e]);
    to.body()[piece] = pack<T>(values);
  }
}

// A warp for each row of `out`; bits are copied as they are.
template <class T>
__global__ void __launch_bounds__(kThreads) gather_rows_kernel(Matrix x, const int64_t* index, Matrix out) {
  wait_for_previous_kernel();
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / 32;
  if (i >= out.rows) return;
  const int lane = threadIdx.x % 32;
  const int64_t source = index[i];
  const Row<T> to(row_of<T>(out.data, out.stride, i), out.width);
  const bool present = source >= 0 && source < x.rows;
  const T* from = row_of<const T>(x.data, x.stride, present ? source : 0);
  const bool wide = aligned(from + to.before);
  if (const int column = to.edge(lane); column >= 0) {
    to.begin[column] = present ? from[column] : Element<T>::store(0.0f);
  }
  for (int piece = lane; piece < to.pieces; piece += 32) {
    uint4 bits = make_uint4(0, 0, 0, 0);
    if (present && wide) {
      bits = __ldcs(reinterpret_cast<const uint4*>(from + to.column(piece)));
    } else if (present) {
      T values[kWide<T>];
      for (int e = 0; e < kWide<T>; ++e) values[e] = from[to.column(piece) + e];
      memcpy(&bits, values, sizeof bits);
    }
    to.body()[piece] = bits;
  }
}

struct CompactMemory {
  int labelled[kCompactThreads / 32];  // of each warp
};

// The sum of every thread's value in the threads before it, and in all of them.
struct Scan {
  int before, all;
};

__device__ __forceinline__ Scan scan_block(int value, CompactMemory& memory) {
  int sum = value;
#pragma unroll
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    const int other = __shfl_up_sync(~0u, sum, lanes);
    if (static_cast<int>(threadIdx.x % 32) >= lanes) sum += other;
  }
  __syncthreads();
  if (threadIdx.x % 32 == 31) memory.labelled[threadIdx.x / 32] = sum;
  __syncthreads();
  Scan scan = {sum - value, 0};
  for (int warp = 0; warp < kCompactThreads / 32; ++warp) {
    if (warp < static_cast<int>(threadIdx.x / 32)) scan.before += memory.labelled[warp];
    scan.all += memory.labelled[warp];
  }
  return scan;
}

// A block for kCompactThreads rows; it counts the labels before them by itself, so that no block waits for
// another.
__global__ void __launch_bounds__(kCompactThreads)
    compact_kernel(const int64_t* labels, int64_t rows, int64_t ignore_index, int64_t capacity,
                   int64_t* index, int64_t* position, int64_t* count) {
  wait_for_previous_kernel();
  auto& memory = *reinterpret_cast<CompactMemory*>(shared_memory());
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kCompactThreads, i = first + threadIdx.x;
  int mine = 0;
  for (int64_t j = threadIdx.x; j < first; j += kCompactThreads) mine += labels[j] != ignore_index;
  const int64_t before = scan_block(mine, memory).all;
  const bool labelled = i < rows && labels[i] != ignore_index;
  const Scan scan = scan_block(labelled, memory);
  const int64_t place = before + scan.before, total = before + scan.all;
  if (i < rows) position[i] = labelled ? place : -1;
  if (labelled && place < capacity) index[place] = i;
  if (blockIdx.x + 1 < gridDim.x) return;
  if (threadIdx.x == 0) *count = total;
  for (int64_t c = total + threadIdx.x; c < capacity; c += kCompactThreads) index[c] = -1;
}

int64_t blocks_for_warps(int64_t rows) { return (rows * 32 + kThreads - 1) / kThreads; }

}  // namespace

void scale_rows(const Queue& queue, const Matrix& x, const float* scale, const Matrix& out) {
  with_element(x.dtype, [&](auto element) {
    launch("scale_rows", scale_rows_kernel<decltype(element)>, queue, {blocks_for_warps(out.rows), kThreads},
           x, scale, out);
  });
}

void compact(const Queue& queue, const int64_t* labels, int64_t rows, int64_t ignore_index, int64_t capacity,
             int64_t* index, int64_t* position, int64_t* count) {
  const int64_t blocks = rows > kCompactThreads ? (rows + kCompactThreads - 1) / kCompactThreads : 1;
  launch("compact", compact_kernel, queue, {blocks, kCompactThreads, sizeof(CompactMemory)}, labels, rows,
         ignore_index, capacity, index, position, count);
}

void gather_rows(const Queue& queue, const Matrix& x, const int64_t* index, const Matrix& out) {
  with_element(x.dtype, [&](auto element) {
    launch("gather_rows", gather_rows_kernel<decltype(element)>, queue,
           {blocks_for_warps(out.rows), kThreads}, x, index, out);
  });
}

}  // namespace rd::cuda
