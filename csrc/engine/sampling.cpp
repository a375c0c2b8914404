#include "engine/sampling.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <stdexcept>

#include "common/arithmetic.hpp"
#include "simd/reductions.hpp"

namespace fastgpt::engine {
namespace {

constexpr std::size_t kBlock = 64;

// Inverse transform sampling: returns the first of `size` items at which the cumulative weight
// exceeds uniform · total. An item of weight 0 is never returned.
template <typename Weight>
std::size_t locate(std::size_t size, float uniform, double total, const Weight& weight) {
  const double point = static_cast<double>(uniform) * total;
  double sum = 0.0;
  std::size_t last = 0;
  for (std::size_t i = 0; i < size; ++i) {
    const double w = static_cast<double>(weight(i));
    if (w > 0.0) last = i;
    sum += w;
    if (sum > point) return i;
  }
  return last;  // rounding may leave the sum slightly below the point
}

double sum_of(const float* x, std::size_t size) {
  double lanes[8] = {};
  std::size_t i = 0;
  for (; i + 8 <= size; i += 8) {
    for (std::size_t lane = 0; lane < 8; ++lane) lanes[lane] += static_cast<double>(x[i + lane]);
  }
  for (std::size_t lane = 0; i + lane < size; ++lane) {
    lanes[lane] += static_cast<double>(x[i + lane]);
  }
  return std::accumulate(lanes, lanes + 8, 0.0);
}

}  // namespace

void Counts::add(std::uint32_t token, bool is_new) {
  if (all_[token]++ == 0) seen_.push_back(token);
  if (is_new) ++fresh_[token];
}

void Counts::penalize(const Sampling& sampling, float* logits) const {
  const auto repetition = static_cast<float>(sampling.repetition_penalty);
  const auto presence = static_cast<float>(sampling.presence_penalty);
  const auto frequency = static_cast<float>(sampling.frequency_penalty);
  for (const std::uint32_t token : seen_) {
    float& logit = logits[token];
    logit = logit > 0.0F ? logit / repetition : logit * repetition;
    if (fresh_[token] > 0) logit -= frequency * static_cast<float>(fresh_[token]) + presence;
  }
}

std::uint32_t Sampler::draw(const Sampling& sampling, const Kernels& kernels, float* logits,
                            std::size_t size, Uniform& uniform) {
  const float largest = kernels.largest(logits, size);
  if (!std::isfinite(largest)) throw std::runtime_error("the model's logits are not finite");
  const auto temperature = static_cast<float>(sampling.temperature);
  if (temperature == 0.0F) {
    return static_cast<std::uint32_t>(std::find(logits, logits + size, largest) - logits);
  }
  weights_.resize(size);
  kernels.exponentials(logits, size, largest, temperature, weights_.data());
  const float point = uniform.next();
  const bool some = sampling.top_k != 0 && sampling.top_k < size;
  if (!some && sampling.top_p >= 1.0 && sampling.min_p <= 0.0) return draw_from_all(size, point);

  double all = 0.0;
  if (some) {
    keep_top_k(logits, size, sampling.top_k);
    for (const std::uint32_t token : kept_) all += static_cast<double>(weights_[token]);
  } else {
    all = sum_of(weights_.data(), size);
    keep_probable(all * (1.0 - std::min(sampling.top_p, 1.0)) / static_cast<double>(size));
  }
  if (sampling.top_p < 1.0) keep_top_p(logits, sampling.top_p * all);
  const auto least = static_cast<float>(sampling.min_p);
  kept_.erase(std::remove_if(kept_.begin(), kept_.end(),
                             [&](std::uint32_t token) { return weights_[token] < least; }),
              kept_.end());
  std::sort(kept_.begin(), kept_.end());
  double total = 0.0;
  for (const std::uint32_t token : kept_) total += static_cast<double>(weights_[token]);
  return kept_[locate(kept_.size(), point, total,
                      [&](std::size_t i) { return weights_[kept_[i]]; })];
}

// Draws from all tokens: locates a block of kBlock tokens by the blocks' sums, then a token within
// it.
std::uint32_t Sampler::draw_from_all(std::size_t size, float uniform) const {
  const std::size_t blocks = ceil_div(size, kBlock);
  std::vector<double> sums(blocks);
  for (std::size_t b = 0; b < blocks; ++b) {
    sums[b] = sum_of(weights_.data() + b * kBlock, std::min(kBlock, size - b * kBlock));
  }
  const double total = std::accumulate(sums.begin(), sums.end(), 0.0);
  const std::size_t block = locate(blocks, uniform, total, [&](std::size_t b) { return sums[b]; });
  const double before = std::accumulate(sums.begin(), sums.begin() + static_cast<long>(block), 0.0);
  const float* weights = weights_.data() + block * kBlock;
  double sum = before;
  const double point = static_cast<double>(uniform) * total;
  std::size_t last = block * kBlock;
  for (std::size_t i = 0; i < std::min(kBlock, size - block * kBlock); ++i) {
    if (weights[i] > 0.0F) last = block * kBlock + i;
    sum += static_cast<double>(weights[i]);
    if (sum > point) break;
  }
  return static_cast<std::uint32_t>(last);
}

// Keeps the k largest logits; of equal ones, the first. The k-th largest of the blocks' maxima is a
// lower bound of the k-th largest logit, since k blocks have a logit at least as large. Only logits
// that reach it, usually few, need to be ordered.
void Sampler::keep_top_k(const float* logits, std::size_t size, std::size_t top_k) {
  const std::size_t blocks = ceil_div(size, kBlock);
  float least = -INFINITY;
  if (top_k <= blocks) {
    largest_of_block_.resize(blocks);
    for (std::size_t b = 0; b < blocks; ++b) {
      const float* block = logits + b * kBlock;
      const std::size_t n = std::min(kBlock, size - b * kBlock);
      largest_of_block_[b] = lane_max<8>(n, block[0], [=](std::size_t i) { return block[i]; });
    }
    const auto kth = largest_of_block_.begin() + static_cast<long>(top_k - 1);
    std::nth_element(largest_of_block_.begin(), kth, largest_of_block_.end(), std::greater<>());
    least = *kth;
  }
  kept_.clear();
  for (std::size_t i = 0; i < size; ++i) {
    if (logits[i] >= least) kept_.push_back(static_cast<std::uint32_t>(i));
  }
  const auto kth = kept_.begin() + static_cast<long>(top_k);
  if (kth >= kept_.end()) return;
  std::nth_element(kept_.begin(), kth, kept_.end(), [&](std::uint32_t a, std::uint32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  });
  kept_.erase(kth, kept_.end());
}

// Keeps all tokens except the improbable ones, as a filter before top-p. With `least` the total
// weight that top-p leaves out, divided by the number of tokens, all tokens below it together weigh
// less than that total, so that top-p would not keep any of them. The factor allows for rounding.
void Sampler::keep_probable(double least) {
  kept_.clear();
  for (std::size_t i = 0; i < weights_.size(); ++i) {
    if (static_cast<double>(weights_[i]) >= 0.999 * least) {
      kept_.push_back(static_cast<std::uint32_t>(i));
    }
  }
}

// Keeps the smallest set of most likely tokens whose weights sum to at least `enough`. Tokens are
// sorted in steps of growing size, since usually few are needed.
void Sampler::keep_top_p(const float* logits, double enough) {
  const auto more_likely = [&](std::uint32_t a, std::uint32_t b) {
    return logits[a] != logits[b] ? logits[a] > logits[b] : a < b;
  };
  double before = 0.0;
  std::size_t kept = 0, ordered = 0, step = kBlock;
  while (kept < kept_.size() && (kept == 0 || before < enough)) {
    if (kept == ordered) {
      const auto begin = kept_.begin() + static_cast<long>(ordered);
      ordered = std::min(kept_.size(), ordered + step);
      step *= 4;
      const auto end = kept_.begin() + static_cast<long>(ordered);
      if (end != kept_.end()) std::nth_element(begin, end, kept_.end(), more_likely);
      std::sort(begin, end, more_likely);
    }
    before += static_cast<double>(weights_[kept_[kept++]]);
  }
  kept_.resize(kept);
}

}  // namespace fastgpt::engine
