// Prefetch hints to the processor.
#pragma once

namespace fastgpt {
namespace {  // for files that are compiled for different instruction sets

// Prefetches the cache line of the address for reading.
inline void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

// Prefetches into a farther cache level, for data that is needed a little later and would displace
// other data in the nearest cache.
inline void prefetch_far([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 0, 2);
#endif
}

}  // namespace
}  // namespace fastgpt
