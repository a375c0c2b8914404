// Sums and maxima of many floats. They have kLanes independent accumulators, which compilers turn
// into vector registers; term i belongs to accumulator i % kLanes. kLanes, and so the order of the
// additions, does not depend on the instruction set.
#pragma once

#include <cstddef>

#include "common/repeat.hpp"

namespace fastgpt {
namespace {  // for files that are compiled for different instruction sets

// Returns the sum of value(i) for i in [0, n). The accumulators are added pairwise at the end.
template <typename T, std::size_t kLanes, typename Value>
FASTGPT_INLINE inline T lane_sum(std::size_t n, const Value& value) {
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

// Returns the maximum of `start` and value(i) for i in [0, n). Values that are NaN are ignored.
template <std::size_t kLanes, typename Value>
FASTGPT_INLINE inline float lane_max(std::size_t n, float start, const Value& value) {
  const auto larger = [](float x, float y) FASTGPT_INLINE { return x > y ? x : y; };
  float lanes[kLanes];
  for (float& lane : lanes) lane = start;
  std::size_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      lanes[lane] = larger(value(i + lane), lanes[lane]);
    }
  }
  float largest = start;
  for (const float lane : lanes) largest = larger(lane, largest);
  for (; i < n; ++i) largest = larger(value(i), largest);
  return largest;
}

}  // namespace
}  // namespace fastgpt
