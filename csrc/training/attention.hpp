// Causal self-attention over a packed tensor of queries, keys and values, and its gradient.
#pragma once

#include <cstddef>

#include "common/bfloat16.hpp"

namespace fastgpt {

// The input: `qkv` is [batch, time, 3, heads, size], results are [batch, time, heads, size]. All
// arrays of type ConstFloats or Floats must have the same element type, fp32 or bfloat16, in which
// operands are multiplied; sums are in fp32.
struct Attention {
  std::size_t batch = 0, time = 0, heads = 0, size = 0;
  ConstFloats qkv;
};

// Returns whether this processor has the vector instructions that make these functions worthwhile.
bool attention_is_fast();

// Computes y = softmax(q kᵀ / √size) v with a causal mask: a query sees the keys up to its own
// position. log_sums [batch, heads, time] receives the log-sum-exp of each query's scaled scores,
// from which the backward pass recomputes the probabilities.
void attention_forward(const Attention& attention, const Floats& y, float* log_sums,
                       unsigned threads);

// Computes grad_qkv [batch, time, 3, heads, size] from grad_y; `y` and `log_sums` are the results
// of the forward pass.
void attention_backward(const Attention& attention, const ConstFloats& y, const float* log_sums,
                        const ConstFloats& grad_y, const Floats& grad_qkv, unsigned threads);

}  // namespace fastgpt
