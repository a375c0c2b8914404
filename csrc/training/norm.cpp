#include "training/norm.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "common/arithmetic.hpp"
#include "common/parallel.hpp"
#include "simd/vector_loops.hpp"

namespace fastgpt {
namespace {

// A task is a tile of at least kTileRows rows; there are at most kMostTiles tiles. Their number
// does not depend on the number of threads, and so neither does the order of summation of the
// gradients of weight and bias.
constexpr std::size_t kTileRows = 32, kMostTiles = 64;

std::size_t rows_of_a_tile(std::size_t rows) {
  return std::max(kTileRows, ceil_div(rows, kMostTiles));
}

template <typename Number>
void apply_row(std::size_t n, const float* __restrict total, float mean, float rstd,
               const float* __restrict weight, const float* __restrict bias, Number* __restrict y) {
  if (bias == nullptr) {
    for (std::size_t i = 0; i < n; ++i) put((total[i] - mean) * rstd * weight[i], y + i);
  } else {
    for (std::size_t i = 0; i < n; ++i) put((total[i] - mean) * rstd * weight[i] + bias[i], y + i);
  }
}

template <typename Number>
void forward_row(std::size_t n, const float* __restrict x, const float* __restrict residual,
                 const float* __restrict weight, const float* __restrict bias, float eps,
                 float* __restrict total, Number* __restrict y, float* mean, float* rstd) {
  const float* row = x;
  if (residual != nullptr) {
    for (std::size_t i = 0; i < n; ++i) total[i] = x[i] + residual[i];
    row = total;
  }
  const auto width = static_cast<float>(n);
  const float center = lane_sum<float, kLanes>(n, [=](std::size_t i) { return row[i]; }) / width;
  const float squares = lane_sum<float, kLanes>(n, [=](std::size_t i) {
    const float centered = row[i] - center;
    return centered * centered;
  });
  const float scale = 1.0F / std::sqrt(squares / width + eps);
  *mean = center;
  *rstd = scale;
  apply_row(n, row, center, scale, weight, bias, y);
}

// Computes one row of the backward pass, and adds its terms to the gradients of weight and bias.
// With h = (total - mean) · rstd and g = grad_y · weight, the gradient of the total is
//   rstd · (g - mean(g) - h · mean(g · h)).
void backward_row(std::size_t n, const float* __restrict grad_y, const float* __restrict grad_total,
                  const float* __restrict total, float mean, float rstd,
                  const float* __restrict weight, float* __restrict grad_x,
                  float* __restrict grad_weight, float* __restrict grad_bias) {
  const auto width = static_cast<float>(n);
  const float g_mean =
      lane_sum<float, kLanes>(n, [=](std::size_t i) { return grad_y[i] * weight[i]; }) / width;
  const float gh_mean =
      lane_sum<float, kLanes>(
          n, [=](std::size_t i) { return grad_y[i] * weight[i] * ((total[i] - mean) * rstd); }) /
      width;
  for (std::size_t i = 0; i < n; ++i) {
    const float h = (total[i] - mean) * rstd;
    grad_weight[i] += grad_y[i] * h;
    grad_bias[i] += grad_y[i];
    grad_x[i] = rstd * (grad_y[i] * weight[i] - g_mean - h * gh_mean);
  }
  if (grad_total == nullptr) return;
  for (std::size_t i = 0; i < n; ++i) grad_x[i] += grad_total[i];
}

// Sums the parts of the tiles, [tiles, columns], in order; does nothing if `sum` is null.
void add_parts(const std::vector<float>& parts, std::size_t columns, float* sum) {
  if (sum == nullptr) return;
  std::fill(sum, sum + columns, 0.0F);
  for (std::size_t part = 0; part < parts.size(); part += columns) {
    run_vectorized<add_to>(columns, parts.data() + part, sum);
  }
}

// Calls body(tile, row) for each row; a tile's rows are processed by one thread, in order.
template <typename Body>
void for_each_row(std::size_t rows, unsigned threads, const Body& body) {
  const std::size_t tile = rows_of_a_tile(rows);
  for_each_tile(ceil_div(rows, tile), threads, [&](std::size_t index) {
    const std::size_t end = std::min(rows, (index + 1) * tile);
    for (std::size_t row = index * tile; row < end; ++row) body(index, row);
  });
}

}  // namespace

void norm_forward(const Norm& norm, const float* x, const float* residual, float eps, float* total,
                  const Floats& y, float* mean, float* rstd, unsigned threads) {
  for_each_row(norm.rows, threads, [&](std::size_t, std::size_t row) {
    const std::size_t at = row * norm.columns;
    const bool adds = residual != nullptr;
    const float* added = adds ? residual + at : nullptr;
    float* sum = adds ? total + at : nullptr;
    of_type(y + at, [&](auto* to) {
      run_vectorized<forward_row<std::remove_pointer_t<decltype(to)>>>(
          norm.columns, x + at, added, norm.weight, norm.bias, eps, sum, to, mean + row,
          rstd + row);
    });
  });
}

void norm_apply(const Norm& norm, const float* total, const float* mean, const float* rstd,
                const Floats& y, unsigned threads) {
  for_each_row(norm.rows, threads, [&](std::size_t, std::size_t row) {
    const std::size_t at = row * norm.columns;
    of_type(y + at, [&](auto* to) {
      run_vectorized<apply_row<std::remove_pointer_t<decltype(to)>>>(
          norm.columns, total + at, mean[row], rstd[row], norm.weight, norm.bias, to);
    });
  });
}

void norm_backward(const Norm& norm, const float* grad_y, const float* grad_total,
                   const float* total, const float* mean, const float* rstd, float* grad_x,
                   float* grad_weight, float* grad_bias, unsigned threads) {
  const std::size_t columns = norm.columns, tile = rows_of_a_tile(norm.rows);
  const std::size_t tiles = ceil_div(norm.rows, tile);
  std::vector<float> weight_parts(tiles * columns), bias_parts(tiles * columns);
  for_each_row(norm.rows, threads, [&](std::size_t index, std::size_t row) {
    const std::size_t at = row * columns, part = index * columns;
    run_vectorized<backward_row>(columns, grad_y + at,
                                 grad_total == nullptr ? nullptr : grad_total + at, total + at,
                                 mean[row], rstd[row], norm.weight, grad_x + at,
                                 weight_parts.data() + part, bias_parts.data() + part);
  });
  add_parts(weight_parts, columns, grad_weight);
  add_parts(bias_parts, columns, grad_bias);
}

}  // namespace fastgpt
