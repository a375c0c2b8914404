// Arithmetic on sizes, and the splitting of a range.
#pragma once

#include <cstddef>

namespace fastgpt {

// [begin, end)
struct Range {
  std::size_t begin = 0, end = 0;

  std::size_t size() const { return end - begin; }
};

namespace {  // for files that are compiled for different instruction sets

constexpr std::size_t ceil_div(std::size_t a, std::size_t b) { return (a + b - 1) / b; }
constexpr std::size_t round_up(std::size_t a, std::size_t b) { return ceil_div(a, b) * b; }
constexpr std::size_t min_of(std::size_t a, std::size_t b) { return a < b ? a : b; }

// Returns the `index`th of `parts` parts of [0, n), whose sizes differ by at most 1.
constexpr Range share_of(std::size_t n, std::size_t index, std::size_t parts) {
  return {n * index / parts, n * (index + 1) / parts};
}

}  // namespace
}  // namespace fastgpt
