// Large tensors that come and go with every step, such as the gradient of the logits.
#pragma once

#include <cstddef>

namespace rd::cpu {

// Memory for one tensor. Fresh pages cost more than the arithmetic on them (the kernel clears each one), so a
// block that is freed waits for the next one of about its size. Meanwhile the kernel may take its pages back
// (MADV_FREE) whenever memory is short. Pages are huge where they can be had.
class Block {
 public:
  explicit Block(std::size_t bytes);  // throws std::bad_alloc
  ~Block();
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;

  void* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  // True if its pages were never touched: they had better be written through the cache.
  bool fresh() const { return fresh_; }

 private:
  std::size_t bytes_, capacity_;
  bool fresh_;
  void* data_;
};

std::size_t cached_bytes();

// Gives back what waits.
void empty_cache();

// What waiting blocks may hold together; the oldest are given back beyond that. 0 turns waiting off.
void set_cache_limit(std::size_t bytes);

}  // namespace rd::cpu
