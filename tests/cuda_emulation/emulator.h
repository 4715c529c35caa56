// What the CUDA headers of this folder ask of the scheduler (emulator.cpp). A launch runs every CUDA thread
// of a few blocks as a fibre of the calling OS thread; fibres change at barriers, warp collectives, atomics
// and exits only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace emulation {

enum class Kind : uint8_t {
  kRunning,
  kExited,
  kPaused,     // gives the others a turn
  kRecording,  // an atomic that the scheduler takes note of
  kSyncThreads,
  kSyncThreadsOr,
  kSyncThreadsAnd,
  kSyncThreadsCount,
  kClusterSync,
  kSyncWarp,  // this one and those below: warp collectives
  kShuffle,
  kShuffleXor,
  kShuffleUp,
  kShuffleDown,
  kBallot,
  kAny,
  kAll,
};

struct Index {
  unsigned x, y, z;
};

struct Launch {
  const void* kernel;  // its address, for its name
  Index grid, block, cluster;
  size_t shared_bytes;
  void (*body)(void* arguments);  // what each thread runs
  void* arguments;
};

// Runs the whole grid; the seed decides on the order. An error aborts the process where a sanitizer is
// present and throws std::runtime_error elsewhere.
void run(const Launch& launch, uint64_t seed);

// What follows is called by the threads of a kernel.
[[noreturn]] void fail(const std::string& message);
int block_barrier(Kind kind, int predicate);
void cluster_barrier();
uint64_t warp_collective(Kind kind, unsigned mask, uint64_t value, unsigned argument, unsigned width);
void fence();                       // at device scope
void pause();                       // may give other threads a turn
void record_atomic(void* address);  // after an atomic operation
unsigned char* shared_memory();
unsigned cluster_rank();
unsigned cluster_size();
const float* cluster_address(const float* value, unsigned rank);  // the same in the block of that rank
void init_copy_barrier(void* barrier);
void begin_copy(void* to, const void* from, uint32_t bytes, void* barrier);
void await_copy(void* barrier);

}  // namespace emulation
