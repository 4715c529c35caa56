// Compiled without instrumentation: its state is touched by every fibre, which the thread sanitizer would
// take for races. Fibres only note what they wait for and go home; all bookkeeping happens there.
#include "scheduler.h"

#include <cstdio>
#include <memory>
#include <stdexcept>

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

// With ucontext, whose switch makes a system call, there and back takes 0.7 us; with this one 0.15 us, the
// scheduler's work included. And the address sanitizer clears a whole stack's shadow at each of ucontext's.
asm(R"(
.text
.globl rd_emulation_switch
.hidden rd_emulation_switch
.type rd_emulation_switch, @function
rd_emulation_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace emulation {

Scheduler* scheduler = nullptr;

namespace {

std::vector<std::unique_ptr<Fibre>> fibres;  // reused by all launches

unsigned volume(Index index) { return index.x * index.y * index.z; }
uint3 position(unsigned number, Index extent) {
  return {number % extent.x, number / extent.x % extent.y, number / extent.x / extent.y};
}

}  // namespace

Scheduler::Scheduler(const Launch& launch, uint64_t seed)
    : launch_(launch), random_(seed), order_(static_cast<Order>(seed % 3)) {
  cluster_blocks_ = volume(launch.cluster);
  threads_ = volume(launch.block);
  waiting_.resize(volume(launch.grid) / cluster_blocks_);
  for (unsigned i = 0; i < waiting_.size(); i++) waiting_[i] = i;
  // Taken from the back.
  if (order_ == Order::kAscending) std::reverse(waiting_.begin(), waiting_.end());
  if (order_ == Order::kRandom) std::shuffle(waiting_.begin(), waiting_.end(), random_);

  // Several at once, so that blocks interleave; few enough for the thread sanitizer's 8000 contexts.
  const unsigned most = std::clamp(4096 / (cluster_blocks_ * threads_), 1u, 3u);
  clusters_.resize(std::min<size_t>(most, waiting_.size()));
  unsigned first_fibre = 0;
  for (Cluster& cluster : clusters_) {
    cluster.first_fibre = first_fibre;
    first_fibre += cluster_blocks_ * threads_;
    cluster.blocks.resize(cluster_blocks_);
    for (unsigned rank = 0; rank < cluster_blocks_; rank++) {
      Block& block = cluster.blocks[rank];
      block.cluster = &cluster;
      block.rank = rank;
      block.threads.resize(threads_);
      // Of this size exactly: the address sanitizer sees what goes past it. Without it there is a margin to
      // look at.
      const size_t bytes = launch.shared_bytes + (sanitized() ? 0 : kMargin);
      if (bytes && posix_memalign(reinterpret_cast<void**>(&block.shared), 128, bytes))
        throw std::bad_alloc();
    }
  }
  while (fibres.size() < first_fibre) {
    fibres.push_back(std::make_unique<Fibre>([] { scheduler->run_threads(); }));
  }
}

void Scheduler::start(Cluster& cluster, unsigned number) {
  const Index& size = launch_.cluster;
  const uint3 base =
      position(number, {launch_.grid.x / size.x, launch_.grid.y / size.y, launch_.grid.z / size.z});
  cluster.alive = cluster_blocks_ * threads_;
  cluster.barrier.arrived = 0;
  cluster.generation++;
  for (Block& block : cluster.blocks) {
    const uint3 inside = position(block.rank, size);
    block.index = {base.x * size.x + inside.x, base.y * size.y + inside.y, base.z * size.z + inside.z};
    block.alive = threads_;
    block.barrier.arrived = 0;
    block.copies_used = 0;
    block.fences = {new_order()};
    block.seen.clear();
    // NaN to whoever reads what nobody wrote. By hand: memset would be an access in the eyes of the race
    // detector.
    for (size_t i = 0; i < launch_.shared_bytes + (sanitized() ? 0 : kMargin); i++)
      const_cast<volatile unsigned char*>(block.shared)[i] = 0xff;
    for (unsigned i = 0; i < threads_; i++) {
      Thread& thread = block.threads[i];
      thread.block = &block;
      thread.number = i;
      thread.index = position(i, launch_.block);
      thread.kind = Kind::kRunning;
      thread.lags = order_ == Order::kRandom && random_() % 16 == 0;
      ready_.push_back(&thread);
    }
  }
}

void Scheduler::run() {
  release(&start_order_);
  for (size_t running = 0;;) {
    running = 0;
    for (Cluster& cluster : clusters_) {
      if (cluster.alive == 0 && !waiting_.empty()) {
        start(cluster, waiting_.back());
        waiting_.pop_back();
      }
      running += cluster.alive != 0;
    }
    if (running == 0) break;
    if (ready_.empty()) fail(nullptr, deadlock());

    std::vector<Thread*> turn;
    turn.swap(ready_);
    if (order_ == Order::kDescending) std::reverse(turn.begin(), turn.end());
    if (order_ == Order::kRandom) std::shuffle(turn.begin(), turn.end(), random_);
    for (Thread* thread : turn) {
      // All threads fall behind the others now and then, some far.
      if (order_ == Order::kRandom && (thread->lags ? random_() % 64 != 0 : random_() % 4 == 0)) {
        ready_.push_back(thread);
      } else {
        resume(*thread);
      }
    }
  }
  for (Cluster& cluster : clusters_) {
    acquire(&cluster.order[0]);
    acquire(&cluster.order[1]);
  }
}

void Scheduler::resume(Thread& thread) {
  const Block& block = *thread.block;
  current_ = &thread;
  fibre_ = fibres[block.cluster->first_fibre + block.rank * threads_ + thread.number].get();
  threadIdx = thread.index;
  blockIdx = block.index;
  do {
    thread.kind = Kind::kRunning;
    on_fibre_ = true;
    fibre_->resume();
    on_fibre_ = false;
    if (!error_.empty()) throw std::runtime_error(error_);
    if (thread.kind == Kind::kRecording) record_atomic(thread);
  } while (thread.kind == Kind::kRecording);
  take_note(thread);
}

void Scheduler::run_threads() {
  // The scheduler is another one in the next launch: nothing of it may be kept across a switch.
  scheduler->fibre_->arrived();
  for (;;) {
    acquire(&scheduler->start_order_);
    acquire(
        &scheduler->current_->block->cluster->order[~scheduler->current_->block->cluster->generation & 1]);
    scheduler->launch_.body(scheduler->launch_.arguments);
    release(&scheduler->current_->block->cluster->order[scheduler->current_->block->cluster->generation & 1]);
    scheduler->wait(Kind::kExited);
  }
}

void Scheduler::take_note(Thread& thread) {
  Block& block = *thread.block;
  if (thread.kind == Kind::kPaused) {
    ready_.push_back(&thread);
  } else if (thread.kind == Kind::kExited) {
    exit(thread);
  } else if (is_block_barrier(thread.kind)) {
    block.barrier.arrived++;
    check_block(block);
  } else if (thread.kind == Kind::kClusterSync) {
    block.cluster->barrier.arrived++;
    check_cluster(*block.cluster);
  } else {
    check_warp(thread);
  }
}

void Scheduler::exit(Thread& thread) {
  Block& block = *thread.block;
  const Thread* warp = block.warp(thread);
  for (unsigned lane = 0; lane < block.lanes(thread); lane++) {
    if (is_warp_collective(warp[lane].kind) && (warp[lane].mask >> thread.lane() & 1)) {
      fail(&warp[lane], "lane " + std::to_string(thread.lane()) + " of its mask has exited");
    }
  }
  block.alive--;
  block.cluster->alive--;
  if (block.alive > 0) check_block(block);
  if (block.cluster->alive > 0) check_cluster(*block.cluster);
  if (block.alive > 0) return;
  const unsigned char* end = block.shared + launch_.shared_bytes;
  if (!sanitized() && std::any_of(end, end + kMargin, [](unsigned char byte) { return byte != 0xff; })) {
    fail(&thread, "the block has written past the end of its shared memory");
  }
  for (unsigned i = 0; i < block.copies_used; i++) {
    const Copy& copy = block.copies[i];
    if (copy.begun && !copy.arrived) fail(&thread, "the block has exited before a copy that nobody awaited");
  }
}

void Scheduler::check_block(Block& block) {
  if (block.barrier.arrived == 0 || block.barrier.arrived < block.alive) return;
  const Thread* first = nullptr;
  int count = 0;
  for (const Thread& thread : block.threads) {
    if (thread.kind == Kind::kExited) continue;
    if (first == nullptr) first = &thread;
    if (thread.kind != first->kind) fail(&thread, "but " + describe(*first));
    count += thread.value != 0;
  }
  const Kind kind = first->kind;
  const unsigned all = block.alive;
  for (Thread& thread : block.threads) {
    if (thread.kind == Kind::kExited) continue;
    thread.result = kind == Kind::kSyncThreadsOr    ? count > 0
                    : kind == Kind::kSyncThreadsAnd ? unsigned(count) == all
                                                    : unsigned(count);
    thread.kind = Kind::kRunning;
    ready_.push_back(&thread);
  }
  block.barrier.arrived = 0;
  block.barrier.generation++;
}

void Scheduler::check_cluster(Cluster& cluster) {
  if (cluster.barrier.arrived == 0 || cluster.barrier.arrived < cluster.alive) return;
  for (Block& block : cluster.blocks) {
    for (Thread& thread : block.threads) {
      if (thread.kind == Kind::kExited) continue;
      thread.kind = Kind::kRunning;
      ready_.push_back(&thread);
    }
  }
  cluster.barrier.arrived = 0;
  cluster.barrier.generation++;
}

void Scheduler::check_warp(Thread& thread) {
  Block& block = *thread.block;
  const Thread* warp = block.warp(thread);
  if (!(thread.mask >> thread.lane() & 1)) fail(&thread, "its mask leaves out the thread itself");
  // Whoever arrives last gets around to all; the others, mostly, no further than the next lane.
  for (unsigned i = 1; i < kLanes; i++) {
    const unsigned lane = (thread.lane() + i) % kLanes;
    if (!(thread.mask >> lane & 1)) continue;
    if (lane >= block.lanes(thread) || warp[lane].kind == Kind::kExited) {
      fail(&thread, "lane " + std::to_string(lane) + " of its mask has exited");
    }
    const Thread& other = warp[lane];
    if (!is_warp_collective(other.kind)) return;
    if (other.kind != thread.kind || other.mask != thread.mask) {
      if (!(other.mask >> thread.lane() & 1)) return;  // those it names may go on, and come here
      fail(&thread, "but " + describe(other));
    }
  }
  finish_warp(thread);
}

void Scheduler::finish_warp(Thread& thread) {
  Thread* warp = thread.block->warp(thread);
  const unsigned mask = thread.mask;
  const Kind kind = thread.kind;
  unsigned ballot = 0, generations = 0;
  for (unsigned lane = 0; lane < kLanes; lane++) {
    if (!(mask >> lane & 1)) continue;
    ballot |= unsigned(warp[lane].value != 0) << lane;
    generations |= (warp[lane].warp_syncs & 1) << lane;
  }
  for (unsigned lane = 0; lane < kLanes; lane++) {
    if (!(mask >> lane & 1)) continue;
    Thread& self = warp[lane];
    const unsigned first = lane & ~(self.width - 1), last = first + self.width - 1, argument = self.argument;
    unsigned source = lane;
    if (kind == Kind::kShuffle) source = first | (argument & (self.width - 1));
    if (kind == Kind::kShuffleXor && (lane ^ argument) <= last) source = lane ^ argument;
    if (kind == Kind::kShuffleUp && lane >= first + argument) source = lane - argument;
    if (kind == Kind::kShuffleDown && lane + argument <= last) source = lane + argument;
    if (!(mask >> source & 1)) fail(&self, "reads lane " + std::to_string(source) + " outside its mask");
    self.result = kind == Kind::kBallot ? ballot
                  : kind == Kind::kAny  ? ballot != 0
                  : kind == Kind::kAll  ? ballot == mask
                                        : warp[source].value;
    self.lanes_generation = generations;
  }
  for (unsigned lane = 0; lane < kLanes; lane++) {
    if (!(mask >> lane & 1)) continue;
    warp[lane].kind = Kind::kRunning;
    ready_.push_back(&warp[lane]);
  }
}

// A release through an atomic variable needs a fence before it, an acquire one after it: published is what
// the block's fences have covered so far, and a later fence of a block makes it see what its atomics have
// read.
void Scheduler::record_atomic(Thread& thread) {
  Block& block = *thread.block;
  std::vector<char*>& published = published_[thread.address];
  published.insert(published.end(), block.fences.begin(), block.fences.end());
  block.fences.push_back(new_order());
  block.seen[thread.address] = published.size();
}

void Scheduler::fence() {
  Block& block = *current_->block;
  release(block.fences.back());
  for (const auto& [address, count] : block.seen) {
    const std::vector<char*>& published = published_.find(address)->second;
    for (size_t i = 0; i < count; i++) acquire(published[i]);
  }
}

char* Scheduler::new_order() {
  orders_.push_back(0);
  return &orders_.back();
}

void run(const Launch& launch, uint64_t seed) {
  // Of a launch that failed, some fibres never ended: they cannot be used again.
  struct Running {
    ~Running() {
      if (scheduler->failed()) fibres.clear();
      scheduler = nullptr;
    }
  };
  Scheduler current(launch, seed);
  scheduler = &current;
  const Running running;
  blockDim = {launch.block.x, launch.block.y, launch.block.z};
  gridDim = {launch.grid.x, launch.grid.y, launch.grid.z};
  current.run();
}

}  // namespace emulation
