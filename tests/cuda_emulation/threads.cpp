// What a kernel's threads call; runs on their fibres. Compiled without instrumentation, like the scheduler.
#include <cstring>

#include "scheduler.h"

namespace emulation {

void fail(const std::string& message) { scheduler->fail(&scheduler->current(), message); }

int block_barrier(Kind kind, int predicate) {
  Thread& thread = scheduler->current();
  Barrier& barrier = thread.block->barrier;
  char* order = &barrier.order[barrier.generation & 1];
  release(order);
  thread.value = static_cast<unsigned>(predicate);
  scheduler->wait(kind);
  acquire(order);
  return static_cast<int>(thread.result);
}

void cluster_barrier() {
  Thread& thread = scheduler->current();
  Barrier& barrier = thread.block->cluster->barrier;
  char* order = &barrier.order[barrier.generation & 1];
  release(order);
  scheduler->wait(Kind::kClusterSync);
  acquire(order);
}

uint64_t warp_collective(Kind kind, unsigned mask, uint64_t value, unsigned argument, unsigned width) {
  Thread& thread = scheduler->current();
  if (width == 0 || width > kLanes || (width & (width - 1)))
    fail("the width of a shuffle must be a power of 2");
  thread.mask = mask;
  thread.value = value;
  thread.argument = argument;
  thread.width = width;
  // Only __syncwarp orders memory.
  if (kind == Kind::kSyncWarp) release(&thread.order[++thread.warp_syncs & 1]);
  scheduler->wait(kind);
  if (kind == Kind::kSyncWarp && watches_races()) {
    Thread* warp = thread.block->warp(thread);
    for (unsigned lane = 0; lane < kLanes; lane++) {
      if (mask >> lane & 1) acquire(&warp[lane].order[thread.lanes_generation >> lane & 1]);
    }
  }
  return thread.result;
}

void fence() { scheduler->fence(); }

void pause() {
  if (scheduler->random_order() && scheduler->coin()) scheduler->wait(Kind::kPaused);
}

void record_atomic(void* address) {
  if (!watches_races()) return;
  scheduler->current().address = address;
  scheduler->wait(Kind::kRecording);
}

unsigned char* shared_memory() { return scheduler->current().block->shared; }
unsigned cluster_rank() { return scheduler->current().block->rank; }
unsigned cluster_size() { return static_cast<unsigned>(scheduler->current().block->cluster->blocks.size()); }

namespace {

// Where in the block's shared memory; fails if `bytes` from there on are not inside.
size_t shared_offset(const void* address, size_t bytes) {
  const size_t offset = reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(shared_memory());
  const size_t size = scheduler->launch().shared_bytes;
  if (offset > size || bytes > size - offset) fail("an address outside the block's shared memory");
  return offset;
}

Copy* find_copy(void* barrier) {
  Block& block = *scheduler->current().block;
  for (unsigned i = 0; i < block.copies_used; i++) {
    if (block.copies[i].barrier == barrier) return &block.copies[i];
  }
  return nullptr;
}

Copy& copy_of(void* barrier) {
  Copy* copy = find_copy(barrier);
  if (copy == nullptr) fail("a copy barrier that nobody has initialised");
  return *copy;
}

}  // namespace

const float* cluster_address(const float* value, unsigned rank) {
  const size_t offset = shared_offset(value, sizeof(float));
  auto& blocks = scheduler->current().block->cluster->blocks;
  if (rank >= blocks.size()) fail("cluster_read of rank " + std::to_string(rank));
  if (blocks[rank].alive == 0) fail("cluster_read of a block that has exited");
  return reinterpret_cast<const float*>(blocks[rank].shared + offset);
}

void init_copy_barrier(void* barrier) {
  shared_offset(barrier, 8);
  Block& block = *scheduler->current().block;
  Copy* copy = find_copy(barrier);
  if (copy && copy->begun && !copy->arrived)
    fail("a copy barrier initialised again before its copy was awaited");
  if (copy == nullptr && block.copies_used == block.copies.size())
    fail("more copy barriers than the emulation has");
  if (copy == nullptr) copy = &block.copies[block.copies_used++];
  *copy = Copy();
  copy->barrier = barrier;
}

void begin_copy(void* to, const void* from, uint32_t bytes, void* barrier) {
  Copy& copy = copy_of(barrier);
  if (copy.begun) fail("a second copy for one barrier");
  shared_offset(to, bytes);
  const uintptr_t bits = reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from) | bytes;
  if (bits % 16 != 0 || bytes == 0) fail("a bulk copy whose addresses or size are no multiples of 16");
  copy = {barrier, to, from, bytes, true, false};
  release(barrier);
}

// The bytes come as late as they may: who reads without waiting finds none.
void await_copy(void* barrier) {
  Copy& copy = copy_of(barrier);
  if (!copy.begun) fail("await_copy of a barrier without a copy");
  acquire(barrier);
  if (!copy.arrived) {
    copy.arrived = true;
    memcpy(copy.to, copy.from, copy.bytes);
    release(barrier);
  }
}

}  // namespace emulation
