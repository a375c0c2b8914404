// Loops that are fully unrolled at compile time.
#pragma once

#include <cstddef>
#include <type_traits>
#include <utility>

#if defined(__GNUC__)
#define FASTGPT_INLINE __attribute__((always_inline))
#else
#define FASTGPT_INLINE
#endif

namespace fastgpt {
namespace {  // for files that are compiled for different instruction sets

template <typename Body, std::size_t... kIndex>
FASTGPT_INLINE inline void repeat(std::index_sequence<kIndex...> /*indices*/, const Body& body) {
  (body(std::integral_constant<std::size_t, kIndex>{}), ...);
}

// Calls body(0), ..., body(n - 1) with the index as a compile-time constant. Only without a loop do
// compilers keep arrays of vectors in registers.
template <std::size_t n, typename Body>
FASTGPT_INLINE inline void repeat(const Body& body) {
  repeat(std::make_index_sequence<n>{}, body);
}

}  // namespace
}  // namespace fastgpt
