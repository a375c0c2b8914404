// Causal self-attention over packed queries, keys and values, with its gradient.
#pragma once

#include <cstddef>

#include "common/bfloat16.hpp"

namespace fastgpt {

// qkv holds [batch, time, 3, heads, size]; results [batch, time, heads, size]. All that is called
// ConstFloats or Floats is in fp32, or all of it in bfloat16, and then products are, too.
struct Attention {
  std::size_t batch = 0, time = 0, heads = 0, size = 0;
  ConstFloats qkv;
};

// Whether this processor has the vector instructions that make this worth while.
bool attention_is_fast();

// y = softmax(q kᵀ / √size) v, where a query sees the keys up to its own. log_sums [batch, heads,
// time] gets the logarithms of the softmaxes' denominators.
void attention_forward(const Attention& attention, const Floats& y, float* log_sums,
                       unsigned threads);

// grad_qkv [batch, time, 3, heads, size], given that of y.
void attention_backward(const Attention& attention, const ConstFloats& y, const float* log_sums,
                        const ConstFloats& grad_y, const Floats& grad_qkv, unsigned threads);

}  // namespace fastgpt
