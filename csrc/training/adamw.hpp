// Gradient clipping and AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) over float arrays.
#pragma once

#include <cstddef>
#include <vector>

namespace fastgpt {

// A parameter, its gradient, its optimizer state and its hyperparameters.
struct AdamWTensor {
  std::size_t size = 0;
  float* param = nullptr;
  const float* grad = nullptr;
  float* mean = nullptr;         // moving average of the gradient (first moment)
  float* mean_square = nullptr;  // moving average of its square (second moment)
  float* step = nullptr;         // the number of updates so far, one float
  double lr = 0.0, beta1 = 0.0, beta2 = 0.0, eps = 0.0, weight_decay = 0.0;
};

// Performs one AdamW step, as torch.optim.AdamW computes it, after clipping the gradients: if their
// global norm exceeds `max_norm`, they are all scaled down to it (the scaled gradients are not
// stored). Returns the norm before clipping. It is accumulated in fp64 and in a fixed order; if it
// is not finite, nothing is changed.
double clipped_adamw(const std::vector<AdamWTensor>& tensors, double max_norm, unsigned threads);

}  // namespace fastgpt
