// The cross-entropy of a chunk of logits, and its gradient, computed in place.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgpt {

// Logits [rows, classes] and their targets: class indices, or `ignored` for rows that have no loss.
struct LogitsChunk {
  std::size_t rows = 0, classes = 0;
  float* logits = nullptr;
  const std::int64_t* targets = nullptr;  // [rows]
  std::int64_t ignored = -100;
};

// Computes losses[row] = log Σ exp(logits) - logits[target], in nats, and 0 for ignored targets.
// With `gradient`, replaces the logits by their gradient, (softmax - onehot) · scale, and 0 for
// ignored targets.
void cross_entropy(const LogitsChunk& chunk, bool gradient, float scale, float* losses,
                   unsigned threads);

}  // namespace fastgpt
