#include "training/adamw.hpp"

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "common/parallel.hpp"
#include "simd/vector_loops.hpp"

namespace fastgpt {
namespace {

constexpr std::size_t kTile = 16384;  // elements per task

struct Tile {
  const AdamWTensor* tensor;
  std::size_t begin, size;
};

// Splits all tensors into tiles of at most kTile elements.
std::vector<Tile> cut(const std::vector<AdamWTensor>& tensors) {
  std::vector<Tile> tiles;
  for (const AdamWTensor& tensor : tensors) {
    for (std::size_t begin = 0; begin < tensor.size; begin += kTile) {
      tiles.push_back({&tensor, begin, std::min(kTile, tensor.size - begin)});
    }
  }
  return tiles;
}

void add_squares(std::size_t n, const float* x, double* sum) {
  *sum = lane_sum<double, kLanes>(n, [=](std::size_t i) {
    const double value = x[i];
    return value * value;
  });
}

// The factors of a step, which are the same for all elements of a tensor.
struct Rates {
  float clip, decay, beta1, one_minus_beta1, beta2, one_minus_beta2, lr, root_correction, eps;
};

Rates rates_of(const AdamWTensor& t, double clip) {
  const double step = static_cast<double>(*t.step) + 1.0;
  return {static_cast<float>(clip),
          static_cast<float>(1.0 - t.lr * t.weight_decay),
          static_cast<float>(t.beta1),
          static_cast<float>(1.0 - t.beta1),
          static_cast<float>(t.beta2),
          static_cast<float>(1.0 - t.beta2),
          static_cast<float>(t.lr / (1.0 - std::pow(t.beta1, step))),
          static_cast<float>(std::sqrt(1.0 - std::pow(t.beta2, step))),
          static_cast<float>(t.eps)};
}

void update(std::size_t n, const Rates& r, const float* __restrict grad, float* __restrict param,
            float* __restrict mean, float* __restrict mean_square) {
  for (std::size_t i = 0; i < n; ++i) {
    const float g = grad[i] * r.clip;
    const float m = r.beta1 * mean[i] + r.one_minus_beta1 * g;
    const float v = r.beta2 * mean_square[i] + r.one_minus_beta2 * g * g;
    mean[i] = m;
    mean_square[i] = v;
    param[i] = param[i] * r.decay - r.lr * m / (std::sqrt(v) / r.root_correction + r.eps);
  }
}

// Returns the global norm. The tiles' sums are added in the order of the tiles, so that the number
// of threads does not change the result.
double norm_of(const std::vector<Tile>& tiles, unsigned threads) {
  std::vector<double> sums(tiles.size());
  for_each_tile(tiles.size(), threads, [&](std::size_t i) {
    const Tile& tile = tiles[i];
    run_vectorized<add_squares>(tile.size, tile.tensor->grad + tile.begin, &sums[i]);
  });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return std::sqrt(total);
}

}  // namespace

double clipped_adamw(const std::vector<AdamWTensor>& tensors, double max_norm, unsigned threads) {
  const std::vector<Tile> tiles = cut(tensors);
  const double norm = norm_of(tiles, threads);
  if (!std::isfinite(norm)) return norm;
  const double clip = std::min(1.0, max_norm / (norm + 1e-6));  // as in torch's clip_grad_norm_
  std::vector<Rates> rates;
  rates.reserve(tensors.size());
  for (const AdamWTensor& tensor : tensors) rates.push_back(rates_of(tensor, clip));
  for_each_tile(tiles.size(), threads, [&](std::size_t i) {
    const auto& [tensor, begin, size] = tiles[i];
    const Rates& r = rates[static_cast<std::size_t>(tensor - tensors.data())];
    run_vectorized<update>(size, r, tensor->grad + begin, tensor->param + begin,
                           tensor->mean + begin, tensor->mean_square + begin);
  });
  for (const AdamWTensor& tensor : tensors) *tensor.step += 1.0F;
  return norm;
}

}  // namespace fastgpt
