// The cross-entropy of a chunk of logits, and its gradient in their place.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgpt {

// The logits [rows, classes] and what they are held against; `targets` holds `ignored`, or one of
// the classes.
struct LogitsChunk {
  std::size_t rows = 0, classes = 0;
  float* logits = nullptr;
  const std::int64_t* targets = nullptr;  // [rows]
  std::int64_t ignored = -100;
};

// losses[row] = log Σ exp(logits) - logits[target], in nats; 0 where the target is ignored. With
// `gradient`, the logits become (softmax - onehot) · scale, 0 where it is ignored.
void cross_entropy(const LogitsChunk& chunk, bool gradient, float scale, float* losses,
                   unsigned threads);

}  // namespace fastgpt
