// Loops over float arrays that a compiler turns into vector instructions, and threads for them.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>

#include "common/parallel.hpp"

namespace fastgpt {

// Partial results that a sum or a maximum over an array keeps side by side: four registers of
// AVX2, enough to hide how long an addition takes. Their number, not the processor, fixes the
// order in which numbers are added.
constexpr std::size_t kLanes = 32;

// The sum of value(i) for i in [0, n).
template <typename T, typename Value>
inline T lane_sum(std::size_t n, const Value& value) {
  T lanes[kLanes] = {};
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) lanes[lane] += value(i + lane);
  }
  for (std::size_t lane = 0; i + lane < n; ++lane) lanes[lane] += value(i + lane);
  for (std::size_t width = kLanes / 2; width > 0; width /= 2) {
    for (std::size_t lane = 0; lane < width; ++lane) lanes[lane] += lanes[lane + width];
  }
  return lanes[0];
}

// The largest of x[0, n), n > 0; a NaN may be left out.
inline float lane_max(const float* x, std::size_t n) {
  float lanes[kLanes];
  for (float& lane : lanes) lane = x[0];
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
    }
  }
  for (std::size_t lane = 0; i + lane < n; ++lane) {
    lanes[lane] = x[i + lane] > lanes[lane] ? x[i + lane] : lanes[lane];
  }
  return *std::max_element(lanes, lanes + kLanes);
}

#if defined(__x86_64__) && defined(__GNUC__)
template <auto kLoop, typename... Arguments>
__attribute__((target("avx2,fma"), flatten)) void run_on_avx2(const Arguments&... arguments) {
  kLoop(arguments...);
}
#endif

// Calls kLoop, compiled for AVX2 where the machine that runs it has it.
template <auto kLoop, typename... Arguments>
inline void run_vectorized(const Arguments&... arguments) {
#if defined(__x86_64__) && defined(__GNUC__)
  static const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (has_avx2) {
    run_on_avx2<kLoop>(arguments...);
    return;
  }
#endif
  kLoop(arguments...);
}

// Calls body(i) for each i in [0, n), on up to `threads` threads: each takes the next when it is
// done with one, so that no thread waits long for one that was interrupted.
template <typename Body>
void for_each_tile(std::size_t n, unsigned threads, const Body& body) {
  std::atomic<std::size_t> next{0};
  run_team(n < 2 ? 1 : threads, [&](std::size_t) {
    for (std::size_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) body(i);
  });
}

}  // namespace fastgpt
