// From logits to a token: penalties, temperature, top-k, top-p, min-p, then a draw.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "engine/kernels.hpp"

namespace fastgpt::engine {

struct Sampling {
  double temperature = 1.0;  // 0: the likeliest
  std::size_t top_k = 0;     // 0: all
  double top_p = 1.0;
  double min_p = 0.0;
  double repetition_penalty = 1.0;  // of tokens in the prompt and the new text
  double presence_penalty = 0.0, frequency_penalty = 0.0;  // of those in the new text

  bool has_penalties() const {
    return repetition_penalty != 1.0 || presence_penalty != 0.0 || frequency_penalty != 0.0;
  }
};

// How often tokens stand in a row's prompt and in its new text.
class Counts {
 public:
  explicit Counts(std::size_t vocab_size) : all_(vocab_size), fresh_(vocab_size) {}
  void add(std::uint32_t token, bool is_new);
  void penalize(const Sampling& sampling, float* logits) const;

 private:
  std::vector<std::uint32_t> all_, fresh_, seen_;
};

// Draws as PyTorch does for the same seed: `torch.rand((1,), generator=...)` on the CPU, which
// takes the lower 24 bits of a Mersenne Twister's next number (ATen/core/TransformationHelper.h).
class Uniform {
 public:
  explicit Uniform(std::uint64_t seed) : twister_(static_cast<std::uint32_t>(seed)) {}
  float next() { return static_cast<float>(twister_() & 0xFFFFFFU) * 0x1p-24F; }

 private:
  std::mt19937 twister_;
};

// Chooses tokens; keeps the memory that this takes.
class Sampler {
 public:
  // Returns the token for `size` logits, which it may change. Throws std::runtime_error if they are
  // not finite.
  std::uint32_t draw(const Sampling& sampling, const Kernels& kernels, float* logits,
                     std::size_t size, Uniform& uniform);

 private:
  std::uint32_t draw_from_all(std::size_t size, float uniform) const;
  void keep_top_k(const float* logits, std::size_t size, std::size_t top_k);
  void keep_probable(double least);
  void keep_top_p(const float* logits, double enough);

  std::vector<float> weights_;       // exp((logit - largest) / temperature) of each token
  std::vector<std::uint32_t> kept_;  // tokens
  std::vector<float> largest_of_block_;
};

}  // namespace fastgpt::engine
