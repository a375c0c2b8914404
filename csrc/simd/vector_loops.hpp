// Running of loops over float arrays in a version that is compiled for AVX2, for code that is not
// compiled once for each instruction set.
#pragma once

#include <cstddef>

#include "common/processor.hpp"
#include "simd/reductions.hpp"

namespace fastgpt {

// The number of accumulators of a reduction: four AVX2 registers, enough to hide the latency of an
// addition.
constexpr std::size_t kLanes = 32;

#if defined(FASTGPT_X86)
template <auto kLoop, typename... Arguments>
FASTGPT_AVX2_FLAT void run_on_avx2(const Arguments&... arguments) {
  kLoop(arguments...);
}
#endif

// Calls kLoop, in a version compiled for AVX2 and FMA where the processor has both.
template <auto kLoop, typename... Arguments>
inline void run_vectorized(const Arguments&... arguments) {
#if defined(FASTGPT_X86)
  if (processor().avx2) return run_on_avx2<kLoop>(arguments...);
#endif
  kLoop(arguments...);
}

// A loop for run_vectorized: adds `from` to `to`, element by element.
inline void add_to(std::size_t n, const float* __restrict from, float* __restrict to) {
  for (std::size_t i = 0; i < n; ++i) to[i] += from[i];
}

}  // namespace fastgpt
