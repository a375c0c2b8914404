// A pool of host memory for the buffers that each training step allocates and frees.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

namespace fastgpt {

// An allocator within one range of virtual addresses, as large as the physical memory. The range is
// reserved once; the system backs it with memory page by page on first access.
//
// Allocation is best-fit: a block is placed at the start of the smallest free range that it fits
// into. A released block is merged with the free ranges next to it. This keeps fragmentation low,
// so that the memory held stays close to the memory in use. Pages are returned to the system only
// by trim(), so that later steps do not pay for page faults again.
//
// malloc is worse for large aligned blocks: it splits them off larger ones, uses the remainders for
// small objects, and then cannot place a block where one of the same size was freed.
//
// Thread-safe: all functions lock a mutex.
class HostPool {
 public:
  // Returns the pool of this process. It is never destroyed.
  static HostPool& get();

  // Returns a block of at least `bytes` bytes, aligned to 64 bytes (for any vector instruction).
  // Returns null if no free range is large enough, or if the system does not support the pool.
  void* allocate(std::size_t bytes);
  // Frees a block that allocate() returned.
  void release(void* block);

  // Returns all unused pages to the system.
  void trim();

  // held() returns the size of the range up to the end of the highest block since the last trim(),
  // in bytes; used() returns the total size of the current blocks.
  std::size_t held() const;
  std::size_t used() const;

 private:
  HostPool();

  using Offset = std::size_t;

  mutable std::mutex mutex_;
  std::byte* base_ = nullptr;
  std::size_t capacity_ = 0, held_ = 0, used_ = 0;
  // Sizes by offset. Together, both maps cover the whole range without overlaps, and no two free
  // ranges are adjacent.
  std::map<Offset, std::size_t> free_;
  std::map<Offset, std::size_t> blocks_;
};

}  // namespace fastgpt
