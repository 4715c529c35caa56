// Work divided among threads.
#pragma once

#include <algorithm>
#include <cstdint>

#ifdef _OPENMP
#  include <omp.h>
#endif

namespace rd::cpu {

// Below this many logits a thread costs more than it saves.
constexpr int64_t kLogitsPerThread = 1 << 15;

// True in a child process made by fork(). GNU OpenMP's threads do not survive a fork, but its notes about
// them do, and a parallel region would wait for them forever.
bool forked();

// At most `wanted`; 1 without OpenMP.
inline int usable_threads(int64_t logits, int wanted) {
#ifdef _OPENMP
  if (forked()) return 1;
  return static_cast<int>(std::clamp<int64_t>(logits / kLogitsPerThread, 1, std::max(wanted, 1)));
#else
  (void)logits, (void)wanted;
  return 1;
#endif
}

// work(begin, end) for contiguous shares of `count` items. The same items go to the same thread in every call
// of one shape, so that its cache may still hold them. `work` must not throw.
template <class Work>
void for_shares(int64_t count, int threads, const Work& work) {
#ifdef _OPENMP
  if (threads > 1) {
#  pragma omp parallel num_threads(threads)
    {
      const int64_t team = omp_get_num_threads(), thread = omp_get_thread_num();
      work(count * thread / team, count * (thread + 1) / team);
    }
    return;
  }
#endif
  (void)threads;
  work(0, count);
}

}  // namespace rd::cpu
