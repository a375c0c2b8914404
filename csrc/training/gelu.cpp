#include "training/gelu.hpp"

#include <algorithm>

#include "common/arithmetic.hpp"
#include "common/parallel.hpp"
#include "simd/math.hpp"
#include "simd/vector_loops.hpp"

namespace fastgpt {
namespace {

constexpr std::size_t kTile = 16384;  // elements per task

void forward_loop(std::size_t n, const float* __restrict x, float* __restrict y) {
  for (std::size_t i = 0; i < n; ++i) y[i] = gelu_of(x[i]);
}

void backward_loop(std::size_t n, const float* __restrict grad, const float* __restrict x,
                   float* __restrict grad_x) {
  for (std::size_t i = 0; i < n; ++i) grad_x[i] = gelu_gradient_of(grad[i], x[i]);
}

}  // namespace

void gelu_forward(const float* x, float* y, std::size_t n, unsigned threads) {
  for_each_tile(ceil_div(n, kTile), threads, [=](std::size_t tile) {
    const std::size_t at = tile * kTile;
    run_vectorized<forward_loop>(std::min(kTile, n - at), x + at, y + at);
  });
}

void gelu_backward(const float* grad, const float* x, float* grad_x, std::size_t n,
                   unsigned threads) {
  for_each_tile(ceil_div(n, kTile), threads, [=](std::size_t tile) {
    const std::size_t at = tile * kTile;
    run_vectorized<backward_loop>(std::min(kTile, n - at), grad + at, x + at, grad_x + at);
  });
}

}  // namespace fastgpt
