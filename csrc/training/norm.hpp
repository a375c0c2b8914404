// LayerNorm over the rows of a matrix, fused with the preceding residual addition. All arrays are
// in fp32, except the output y, which may be in bfloat16.
#pragma once

#include <cstddef>

#include "common/bfloat16.hpp"

namespace fastgpt {

// The size and parameters of a norm. All matrices are [rows, columns] and contiguous.
struct Norm {
  std::size_t rows = 0, columns = 0;
  const float* weight = nullptr;  // [columns]
  const float* bias = nullptr;    // [columns], optional
};

// Computes total = x + residual and y = (total - mean) · rstd · weight + bias for each row. If
// `residual` is null, x is the total, and `total` is not written. mean and rstd [rows] are outputs.
void norm_forward(const Norm& norm, const float* x, const float* residual, float eps, float* total,
                  const Floats& y, float* mean, float* rstd, unsigned threads);

// Recomputes y from the total, mean and rstd of the forward pass.
void norm_apply(const Norm& norm, const float* total, const float* mean, const float* rstd,
                const Floats& y, unsigned threads);

// Computes grad_x, the gradient of the total: that from grad_y plus grad_total, which may be null.
// grad_weight and grad_bias [columns] may be null.
void norm_backward(const Norm& norm, const float* grad_y, const float* grad_total,
                   const float* total, const float* mean, const float* rstd, float* grad_x,
                   float* grad_weight, float* grad_bias, unsigned threads);

}  // namespace fastgpt
