// A hint to the processor that what lies at an address is about to be needed.
#pragma once

namespace fastgpt {

inline void prefetch([[maybe_unused]] const void* address) {
#if defined(__GNUC__)
  __builtin_prefetch(address);
#endif
}

}  // namespace fastgpt
