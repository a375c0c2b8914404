// Sampling of a token from logits: penalties, temperature, top-k, top-p, min-p, then a random draw.
#pragma once

#include <cstddef>
#include <cstdint>
#include <random>
#include <vector>

#include "engine/kernels.hpp"

namespace fastgpt::engine {

struct Sampling {
  double temperature = 1.0;  // 0: greedy decoding
  std::size_t top_k = 0;     // 0: no limit
  double top_p = 1.0;
  double min_p = 0.0;
  double repetition_penalty = 1.0;  // of tokens in the prompt or the generated text
  double presence_penalty = 0.0, frequency_penalty = 0.0;  // of tokens in the generated text

  bool has_penalties() const {
    return repetition_penalty != 1.0 || presence_penalty != 0.0 || frequency_penalty != 0.0;
  }
};

// The number of times that each token occurs in a row's prompt and in its generated text.
class Counts {
 public:
  explicit Counts(std::size_t vocab_size) : all_(vocab_size), fresh_(vocab_size) {}
  void add(std::uint32_t token, bool is_new);
  void penalize(const Sampling& sampling, float* logits) const;

 private:
  // The counts in prompt and generated text, those in generated text, and the tokens that occur.
  std::vector<std::uint32_t> all_, fresh_, seen_;
};

// A generator of uniform numbers in [0, 1), identical to `torch.rand((1,), generator=...)` on the
// CPU for the same seed: the lower 24 bits of the next output of a Mersenne Twister
// (ATen/core/TransformationHelper.h).
class Uniform {
 public:
  explicit Uniform(std::uint64_t seed) : twister_(static_cast<std::uint32_t>(seed)) {}
  float next() { return static_cast<float>(twister_() & 0xFFFFFFU) * 0x1p-24F; }

 private:
  std::mt19937 twister_;
};

// Samples tokens. Keeps its buffers from one draw to the next.
class Sampler {
 public:
  // Returns a token sampled from `size` logits, which it may modify. Throws std::runtime_error if
  // they are not finite.
  std::uint32_t draw(const Sampling& sampling, const Kernels& kernels, float* logits,
                     std::size_t size, Uniform& uniform);

 private:
  std::uint32_t draw_from_all(std::size_t size, float uniform) const;
  void keep_top_k(const float* logits, std::size_t size, std::size_t top_k);
  void keep_probable(double least);
  void keep_top_p(const float* logits, double enough);

  std::vector<float> weights_;       // exp((logit - largest) / temperature) of each token
  std::vector<std::uint32_t> kept_;  // tokens that may be drawn
  std::vector<float> largest_of_block_;
};

}  // namespace fastgpt::engine
