// GPT-2's GELU (the tanh approximation) over float arrays.
#pragma once

#include <cstddef>

namespace fastgpt {

// Computes y[i] = gelu(x[i]) on up to `threads` threads.
void gelu_forward(const float* x, float* y, std::size_t n, unsigned threads);

// Computes grad_x[i] = grad[i] · gelu'(x[i]) on up to `threads` threads.
void gelu_backward(const float* grad, const float* x, float* grad_x, std::size_t n,
                   unsigned threads);

}  // namespace fastgpt
