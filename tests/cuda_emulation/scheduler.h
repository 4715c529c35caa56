// One launch: which threads are resident, what each waits for, and whose turn it is.
#pragma once

#include <algorithm>
#include <array>
#include <cstdlib>
#include <deque>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "cuda_runtime.h"
#include "emulator.h"
#include "fibre.h"

namespace emulation {

constexpr unsigned kLanes = 32;
constexpr size_t kMargin = 256;  // behind shared memory
inline bool is_warp_collective(Kind kind) { return kind >= Kind::kSyncWarp; }
inline bool is_block_barrier(Kind kind) {
  return kind >= Kind::kSyncThreads && kind <= Kind::kSyncThreadsCount;
}

// A place for the happens-before edges of a barrier. Two generations: who leaves late must not see what
// others released at the next barrier already.
struct Barrier {
  unsigned arrived = 0, generation = 0;
  char order[2];
};

struct Block;

struct Thread {
  Block* block = nullptr;
  unsigned number = 0;  // within the block
  uint3 index{};
  Kind kind = Kind::kExited;
  unsigned mask = 0, argument = 0, width = 0, lanes_generation = 0;
  bool lags = false;
  uint64_t value = 0, result = 0;
  void* address = nullptr;
  unsigned warp_syncs = 0;
  char order[2];  // for __syncwarp

  unsigned lane() const { return number % kLanes; }
};

struct Copy {
  void* barrier = nullptr;
  void* to = nullptr;
  const void* from = nullptr;
  uint32_t bytes = 0;
  bool begun = false, arrived = false;
};

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  unsigned rank = 0;
  uint3 index{};
  unsigned char* shared = nullptr;
  std::vector<Thread> threads;
  unsigned alive = 0;
  Barrier barrier;
  std::array<Copy, 64> copies;  // no container that grows: fibres change it
  unsigned copies_used = 0;
  // What the block's __threadfence()s have published: a new entry after each atomic. Never empty.
  std::vector<char*> fences;
  std::map<void*, size_t> seen;  // by this block's atomics: how much of Scheduler::published

  Thread* warp(const Thread& thread) { return &threads[thread.number - thread.lane()]; }
  unsigned lanes(const Thread& thread) const {
    return std::min<unsigned>(kLanes, threads.size() - (thread.number - thread.lane()));
  }
};

struct Cluster {
  std::vector<Block> blocks;
  unsigned alive = 0, first_fibre = 0, generation = 0;
  Barrier barrier;
  char order[2];  // from one cluster in this place to the next: the other generation's is acquired, this
                  // one's released
};

enum class Order { kAscending, kDescending, kRandom };

class Scheduler {
 public:
  explicit Scheduler(const Launch& launch, uint64_t seed);
  ~Scheduler() {
    for (Cluster& cluster : clusters_)
      for (Block& block : cluster.blocks) free(block.shared);
  }
  void run();

  // Called by fibres.
  Thread& current() { return *current_; }
  void wait(Kind kind) {
    current_->kind = kind;
    fibre_->go_home();
  }
  void run_threads();  // a fibre's life
  [[noreturn]] void fail(const Thread* thread, const std::string& message);
  bool random_order() const { return order_ == Order::kRandom; }
  bool coin() { return random_() & 1; }
  void fence();
  const Launch& launch() const { return launch_; }
  bool failed() const { return !error_.empty(); }

 private:
  void start(Cluster& cluster, unsigned number);
  void resume(Thread& thread);
  void take_note(Thread& thread);
  void exit(Thread& thread);
  void check_block(Block& block);
  void check_cluster(Cluster& cluster);
  void check_warp(Thread& thread);
  void finish_warp(Thread& thread);
  void record_atomic(Thread& thread);
  char* new_order();
  std::string describe(const Thread& thread) const;
  std::string deadlock() const;

  const Launch& launch_;
  std::mt19937_64 random_;
  Order order_;
  unsigned cluster_blocks_, threads_;
  std::vector<Cluster> clusters_;  // resident
  std::vector<unsigned> waiting_;  // numbers of the clusters that have not started
  std::vector<Thread*> ready_;
  Thread* current_ = nullptr;
  Fibre* fibre_ = nullptr;
  bool on_fibre_ = false;
  std::string error_;
  char start_order_;
  std::deque<char> orders_;
  std::map<void*, std::vector<char*>> published_;  // through an atomic variable
};

extern Scheduler* scheduler;  // of the launch that is running

}  // namespace emulation
