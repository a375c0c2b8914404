// A hint to the processor that what lies at an address is about to be needed.
#pragma once

namespace fastgpt {
namespace {  // for files that are compiled for different instruction sets

inline void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

// The same for what is needed a little later, and would only be in the way in the nearest cache.
inline void prefetch_far([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address, 0, 2);
#endif
}

}  // namespace
}  // namespace fastgpt
