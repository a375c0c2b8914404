// Matrix multiplication (GEMM) on the CPU, faster than MKL on processors that are not Intel's.
//
// The blocking follows Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication"
// (2008), and BLIS: both operands are packed, a block at a time, into the order in which a kernel
// reads them that keeps a small tile of the result in registers. Products in bfloat16 round while
// packing, so that no permanent second copy of the weights is needed.
#pragma once

#include <cstddef>
#include <string>

#include "common/bfloat16.hpp"
#include "common/matrix_view.hpp"
#include "training/gemm_kernels.hpp"

namespace fastgpt {

// The arguments of a product C[m, n] = A[m, k] · B[k, n] with its optional fused operations. C and
// `pre` must not overlap any other operand.
struct Gemm {
  std::size_t m = 0, n = 0, k = 0;
  MatrixView<ConstFloats> a, b;
  bool transpose_a = false;  // `a` holds [k, m]
  bool transpose_b = false;  // `b` holds [n, k]
  MatrixView<Floats> c;
  bool accumulate = false;  // add to C and to row_sums; C must be in fp32, not with `gelu`

  const float* bias = nullptr;        // [n], added to each row
  bool gelu = false;                  // C = gelu(A · B + bias)
  MatrixView<Floats> pre;             // with `gelu`: receives A · B + bias, optional
  MatrixView<ConstFloats> gelu_grad;  // C = (A · B) · gelu'(gelu_grad), elementwise; optional
  bool gelu_b = false;                // B = gelu(`b`)
  float* row_sums = nullptr;          // [m], receives the sums of A's rows; optional
};

// Returns the kernels for an instruction set and a precision: "portable", "avx2" and "avx512"
// compute in fp32, and require all matrices to be in fp32; "bf16-portable" and "bf16-avx512" round
// operands to bfloat16 and accumulate in fp32, for matrices of either type. Throws
// std::invalid_argument for other names, and for those that this processor or this build does not
// support.
const GemmKernels& gemm_kernels(const std::string& instruction_set);

// Returns the fastest kernels that this processor can run, for products in fp32 or in bfloat16.
const GemmKernels& best_gemm_kernels(bool bf16 = false);

// Returns whether `gemm` should be preferred to PyTorch's matrix multiplication. In fp32, on AMD
// processors with AVX2, on which MKL is slower; in bfloat16, on processors with AVX512-BF16 and
// without AMX, which PyTorch uses. Measured on Zen 3 and Zen 4.
bool gemm_is_faster(bool bf16);

// Computes the product on up to `threads` threads, whose number does not change any bit of the
// result. Throws std::bad_alloc before anything is written.
void gemm(const Gemm& product, unsigned threads, const GemmKernels& kernels);

}  // namespace fastgpt
