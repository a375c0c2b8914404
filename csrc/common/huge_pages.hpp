// Use of huge memory pages, where the system supports them.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace fastgpt {

constexpr std::size_t kHugePage = std::size_t{1} << 21;

// Advises the system to back the whole huge pages within memory[0 : bytes] by huge pages on first
// access, which reduces page faults and TLB misses. A hint: failure is ignored and only costs
// speed.
inline void use_huge_pages([[maybe_unused]] void* memory, [[maybe_unused]] std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto begin = reinterpret_cast<std::uintptr_t>(memory);
  const std::uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const std::uintptr_t last = (begin + bytes) / kHugePage * kHugePage;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace fastgpt
