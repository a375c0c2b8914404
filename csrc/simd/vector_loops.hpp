// Loops over float arrays that compilers vectorize, and helpers that run them on several threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstddef>

#include "common/parallel.hpp"

namespace fastgpt {

// The number of independent accumulators of a reduction: four AVX2 registers, enough to hide the
// latency of an addition. It is the same on all processors, and so is the order of summation.
constexpr std::size_t kLanes = 32;

// Returns the sum of value(i) for i in [0, n). Term i goes to accumulator i % kLanes; the
// accumulators are then added pairwise.
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

// Returns the maximum of x[0, n), n > 0. NaNs may be ignored.
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
// `flatten` inlines kLoop and all that it calls, so that it is compiled for AVX2 as well.
template <auto kLoop, typename... Arguments>
__attribute__((target("avx2,fma"), flatten)) void run_on_avx2(const Arguments&... arguments) {
  kLoop(arguments...);
}
#endif

// Calls kLoop, in a version compiled for AVX2 and FMA where the processor has both.
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

// Calls body(i) for each i in [0, n) on up to `threads` threads. Scheduling is dynamic: each thread
// takes the next index when it has finished one, so that a preempted thread delays the others
// little.
template <typename Body>
void for_each_tile(std::size_t n, unsigned threads, const Body& body) {
  std::atomic<std::size_t> next{0};
  run_team(n < 2 ? 1 : threads, [&](std::size_t) {
    for (std::size_t i = next.fetch_add(1); i < n; i = next.fetch_add(1)) body(i);
  });
}

}  // namespace fastgpt
