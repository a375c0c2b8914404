#include "common/host_pool.hpp"

#include <algorithm>
#include <iterator>

#include "common/huge_pages.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif

namespace fastgpt {
namespace {

constexpr std::size_t kAlignment = 64;

}  // namespace

HostPool& HostPool::get() {
  // Never deleted, because blocks may be released after the destruction of static objects.
  static HostPool& pool = *new HostPool;
  return pool;
}

HostPool::HostPool() {
#if defined(__linux__)
  const std::size_t memory = static_cast<std::size_t>(sysconf(_SC_PHYS_PAGES)) *
                             static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  // MAP_NORESERVE: reserve addresses only, without a claim on memory or swap space.
  void* range = mmap(nullptr, memory, PROT_READ | PROT_WRITE,
                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) return;
  base_ = static_cast<std::byte*>(range);
  capacity_ = memory;
  use_huge_pages(range, memory);
  free_.emplace(0, capacity_);
#endif
}

void* HostPool::allocate(std::size_t bytes) {
  const std::size_t size = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  const std::lock_guard lock(mutex_);
  // Best fit; among free ranges of the same size the one at the lowest offset.
  auto best = free_.end();
  for (auto gap = free_.begin(); gap != free_.end(); ++gap) {
    const bool fits = gap->second >= size;
    if (fits && (best == free_.end() || gap->second < best->second)) best = gap;
  }
  if (best == free_.end()) return nullptr;
  const auto [begin, room] = *best;
  free_.erase(best);
  if (room > size) free_.emplace(begin + size, room - size);
  blocks_.emplace(begin, size);
  used_ += size;
  held_ = std::max(held_, begin + size);
  return base_ + begin;
}

void HostPool::release(void* block) {
  const auto begin = static_cast<Offset>(static_cast<std::byte*>(block) - base_);
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(begin);
  std::size_t size = found->second;
  blocks_.erase(found);
  used_ -= size;
  // Merge with the free range that starts at the end of the block, then with the one that ends at
  // its start.
  auto next = free_.lower_bound(begin);
  if (next != free_.end() && next->first == begin + size) {
    size += next->second;
    next = free_.erase(next);
  }
  if (next != free_.begin()) {
    const auto previous = std::prev(next);
    if (previous->first + previous->second == begin) {
      previous->second += size;
      return;
    }
  }
  free_.emplace_hint(next, begin, size);
}

void HostPool::trim() {
  const std::lock_guard lock(mutex_);
#if defined(__linux__)
  // Only whole pages within free ranges, and none beyond held_, which were never accessed.
  const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
  for (const auto& [begin, size] : free_) {
    const std::size_t first = (begin + page - 1) / page * page;
    const std::size_t last = std::min(begin + size, held_) / page * page;
    if (first < last) madvise(base_ + first, last - first, MADV_DONTNEED);
  }
#endif
  held_ = blocks_.empty() ? 0 : blocks_.rbegin()->first + blocks_.rbegin()->second;
}

std::size_t HostPool::held() const {
  const std::lock_guard lock(mutex_);
  return held_;
}

std::size_t HostPool::used() const {
  const std::lock_guard lock(mutex_);
  return used_;
}

}  // namespace fastgpt
