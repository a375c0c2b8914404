#include "training/cross_entropy.hpp"

#include <algorithm>
#include <cmath>

#include "common/parallel.hpp"
#include "simd/math.hpp"
#include "simd/vector_loops.hpp"

namespace fastgpt {
namespace {

void exponentiate(std::size_t n, float largest, float* __restrict x) {
  for (std::size_t i = 0; i < n; ++i) x[i] = exp_minus(largest - x[i]);
}

void multiply(std::size_t n, float factor, float* __restrict x) {
  for (std::size_t i = 0; i < n; ++i) x[i] *= factor;
}

void sum_exponentials(std::size_t n, float largest, const float* x, float* sum) {
  *sum = lane_sum<float, kLanes>(n, [=](std::size_t i) { return exp_minus(largest - x[i]); });
}

void find_largest(std::size_t n, const float* x, float* largest) {
  *largest = lane_max<kLanes>(n, x[0], [=](std::size_t i) { return x[i]; });
}

void add_up(std::size_t n, const float* x, float* sum) {
  *sum = lane_sum<float, kLanes>(n, [=](std::size_t i) { return x[i]; });
}

// Returns the loss of a row; with `gradient`, replaces its logits by their gradient. The row is
// read several times, from the L2 cache after the first.
float do_row(std::size_t n, float* logits, std::size_t target, bool gradient, float scale) {
  float largest = 0.0F, sum = 0.0F;
  const float picked = logits[target];
  run_vectorized<find_largest>(n, logits, &largest);
  if (!gradient) {
    run_vectorized<sum_exponentials>(n, largest, logits, &sum);
  } else {
    run_vectorized<exponentiate>(n, largest, logits);
    run_vectorized<add_up>(n, logits, &sum);
    run_vectorized<multiply>(n, scale / sum, logits);
    logits[target] -= scale;
  }
  return std::log(sum) + (largest - picked);
}

}  // namespace

void cross_entropy(const LogitsChunk& chunk, bool gradient, float scale, float* losses,
                   unsigned threads) {
  for_each_tile(chunk.rows, threads, [&](std::size_t row) {
    float* logits = chunk.logits + row * chunk.classes;
    const std::int64_t target = chunk.targets[row];
    if (target == chunk.ignored) {
      losses[row] = 0.0F;
      if (gradient) std::fill(logits, logits + chunk.classes, 0.0F);
    } else {
      losses[row] =
          do_row(chunk.classes, logits, static_cast<std::size_t>(target), gradient, scale);
    }
  });
}

}  // namespace fastgpt
