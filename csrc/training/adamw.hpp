// Gradient clipping and AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over float arrays.
#pragma once

#include <cstddef>
#include <vector>

namespace fastgpt {

// A parameter, its gradient and what AdamW remembers of it.
struct AdamWTensor {
  std::size_t size = 0;
  float* param = nullptr;
  const float* grad = nullptr;
  float* mean = nullptr;         // of the gradient
  float* mean_square = nullptr;  // of its square
  float* step = nullptr;         // how many updates there were, one number
  double lr = 0.0, beta1 = 0.0, beta2 = 0.0, eps = 0.0, weight_decay = 0.0;
};

// Does a step of AdamW, as torch.optim.AdamW computes it, with all gradients scaled down to
// `max_norm` if their norm as one vector is larger, and returns that norm. It is added up in fp64
// and in a fixed order; if it is not finite, nothing is changed.
double clipped_adamw(const std::vector<AdamWTensor>& tensors, double max_norm, unsigned threads);

}  // namespace fastgpt
