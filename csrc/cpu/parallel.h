// Rows divided among threads.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#  include <omp.h>
#endif

namespace rd::cpu {

// Below this many elements a thread costs more than it saves.
constexpr int64_t kElementsPerThread = 1 << 15;

// True in a child process made by fork(). GNU OpenMP's threads do not survive a fork, but its notes about
// them do, and a parallel region would wait for them forever.
bool forked();

// At most `wanted`; 1 without OpenMP.
inline int usable_threads(int64_t rows, int64_t vocabulary, int wanted) {
#ifdef _OPENMP
  if (forked()) return 1;
  const int64_t worthwhile = std::min(rows, rows * vocabulary / kElementsPerThread);
  return static_cast<int>(std::clamp<int64_t>(worthwhile, 1, std::max(wanted, 1)));
#else
  (void)rows, (void)vocabulary, (void)wanted;
  return 1;
#endif
}

// work(begin, end, thread) for contiguous shares of the rows. The same rows go to the same thread in every
// call of one shape, so that its cache may still hold them. `work` must not throw.
template <class Work>
void for_rows(int64_t rows, int threads, const Work& work) {
#ifdef _OPENMP
  if (threads > 1) {
#  pragma omp parallel num_threads(threads)
    {
      const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
      work(rows * thread / team, rows * (thread + 1) / team, static_cast<int>(thread));
    }
    return;
  }
#endif
  (void)threads;
  work(0, rows, 0);
}

}  // namespace rd::cpu
