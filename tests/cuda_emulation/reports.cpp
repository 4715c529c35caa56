// What an error says: the kernel, the block, the thread, and what each waits at.
#include <dlfcn.h>

#include <cstdio>
#include <cstring>
#include <stdexcept>

#include "scheduler.h"

namespace emulation {
namespace {

const char* const kKindNames[] = {"runs",
                                  "has exited",
                                  "pauses",
                                  "atomic",
                                  "__syncthreads",
                                  "__syncthreads_or",
                                  "__syncthreads_and",
                                  "__syncthreads_count",
                                  "cluster_sync",
                                  "__syncwarp",
                                  "__shfl_sync",
                                  "__shfl_xor_sync",
                                  "__shfl_up_sync",
                                  "__shfl_down_sync",
                                  "__ballot_sync",
                                  "__any_sync",
                                  "__all_sync"};

std::string text(uint3 index) {
  return "(" + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + ")";
}
std::string hex(unsigned mask) {
  char digits[16];
  snprintf(digits, sizeof digits, "0x%08x", mask);
  return digits;
}

std::string kernel_name(const void* kernel) {
  Dl_info info;
  if (!dladdr(kernel, &info)) return "?";
  char command[1024], name[512] = "";
  const size_t offset = static_cast<const char*>(kernel) - static_cast<const char*>(info.dli_fbase);
  snprintf(command, sizeof command, "LD_PRELOAD= addr2line -f -C -e '%s' %zx", info.dli_fname, offset);
  if (FILE* pipe = popen(command, "r")) {
    if (fgets(name, sizeof name, pipe)) name[strcspn(name, "\n")] = 0;
    pclose(pipe);
  }
  return name[0] && name[0] != '?' ? name : "?";
}

}  // namespace

std::string Scheduler::describe(const Thread& thread) const {
  std::string result = "block " + text(thread.block->index) + " thread " + text(thread.index) + " " +
                       (thread.kind > Kind::kRecording ? "waits at " : "") + kKindNames[int(thread.kind)];
  if (is_warp_collective(thread.kind)) result += " with mask " + hex(thread.mask);
  return result;
}

std::string Scheduler::deadlock() const {
  std::string result = "deadlock";
  unsigned waiting = 0;
  for (const Cluster& cluster : clusters_) {
    for (const Block& block : cluster.blocks) {
      const Thread* before = nullptr;
      for (const Thread& thread : block.threads) {
        if (cluster.alive == 0) continue;
        // The first of each run of threads that wait alike.
        if (!before || before->kind != thread.kind || before->mask != thread.mask) {
          if (waiting++ < 40) result += "\n  " + describe(thread) + ", and those after it";
        }
        before = &thread;
      }
    }
  }
  return result;
}

void Scheduler::fail(const Thread* thread, const std::string& message) {
  const std::string where = thread ? describe(*thread) + ": " : "";
  error_ = "CUDA emulation: kernel " + kernel_name(launch_.kernel) + ": " + where + message;
  fprintf(stderr, "%s\n", error_.c_str());
  if (sanitized()) abort();
  if (!on_fibre_) throw std::runtime_error(error_);
  fibre_->go_home();  // the scheduler throws; nobody unwinds this stack
  abort();
}

}  // namespace emulation
