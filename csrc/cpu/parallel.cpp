#include "cpu/parallel.h"

#include <pthread.h>

#include <atomic>

namespace rd::cpu {
namespace {

std::atomic<bool> in_forked_child{false};

[[maybe_unused]] const int registered =
    pthread_atfork(nullptr, nullptr, [] { in_forked_child.store(true, std::memory_order_relaxed); });

}  // namespace

bool forked() { return in_forked_child.load(std::memory_order_relaxed); }

}  // namespace rd::cpu
