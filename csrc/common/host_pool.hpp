// Memory for what a training step allocates and frees again, step after step.
#pragma once

#include <cstddef>
#include <map>
#include <mutex>

namespace fastgpt {

// Blocks of one range of addresses, reserved at the start and taken from the system page by page
// as it fills. A block goes to the smallest gap where it fits, and a freed one joins the gaps
// beside it, so that what is held stays close to what is in use; the system gets nothing back
// unless it is said to, so that no step pays again for pages that it had before.
//
// malloc does worse with large aligned blocks: it cuts them from larger ones, gives the cuttings
// to small objects, and then has no room for a block where one of its size was freed.
class HostPool {
 public:
  // The pool of this process; lives as long as it does.
  static HostPool& get();

  // Returns a block of that many bytes, aligned for any vector instruction; null if there is no
  // room, or no such memory on this system.
  void* allocate(std::size_t bytes);
  void release(void* block);

  // Gives the system all pages back in which no block lies.
  void trim();

  // Bytes from the start of the range to the end of the highest block that there has been, since
  // the last trim; and bytes in blocks now.
  std::size_t held() const;
  std::size_t used() const;

 private:
  HostPool();

  using Offset = std::size_t;

  mutable std::mutex mutex_;
  std::byte* base_ = nullptr;
  std::size_t capacity_ = 0, held_ = 0, used_ = 0;
  std::map<Offset, std::size_t> free_;    // sizes of what lies between blocks and behind them
  std::map<Offset, std::size_t> blocks_;  // sizes of blocks
};

}  // namespace fastgpt
