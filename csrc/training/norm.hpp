// LayerNorm over the rows of matrices, with the residual's addition before it. All is in fp32 but
// the norm itself, which may be asked for in bfloat16.
#pragma once

#include <cstddef>

#include "common/bfloat16.hpp"

namespace fastgpt {

// What a norm reads; all matrices are [rows, columns], without gaps.
struct Norm {
  std::size_t rows = 0, columns = 0;
  const float* weight = nullptr;  // [columns]
  const float* bias = nullptr;    // [columns], or none
};

// total = x + residual; y = (total - mean) · rstd · weight + bias, row by row. Without a residual
// x is the total, and `total` is not written.
void norm_forward(const Norm& norm, const float* x, const float* residual, float eps, float* total,
                  const Floats& y, float* mean, float* rstd, unsigned threads);

// y again, from what the forward kept.
void norm_apply(const Norm& norm, const float* total, const float* mean, const float* rstd,
                const Floats& y, unsigned threads);

// grad_x = grad_total + the gradient that grad_y gives the total; grad_total may be null.
// grad_weight and grad_bias [columns] may be null.
void norm_backward(const Norm& norm, const float* grad_y, const float* grad_total,
                   const float* total, const float* mean, const float* rstd, float* grad_x,
                   float* grad_weight, float* grad_bias, unsigned threads);

}  // namespace fastgpt
