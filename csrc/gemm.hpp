// Products of single-precision matrices, faster than MKL's where the processor is not Intel's.
//
// The plan is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication"
// (2008), and of BLIS: both operands are copied, a block at a time, into the order in which a
// kernel reads them that keeps a small tile of the result in registers.
#pragma once

#include <cstddef>

namespace fastgpt {

// A matrix in row-major order: element (i, j) lies at data[i * stride + j].
template <typename Float>
struct MatrixView {
  Float* data = nullptr;
  std::size_t stride = 0;
};

// C[m, n] = A[m, k] · B[k, n] and what may be done on the way. C and `pre` overlap nothing else.
struct Gemm {
  std::size_t m = 0, n = 0, k = 0;
  MatrixView<const float> a, b;
  bool transpose_a = false;  // `a` holds [k, m]
  bool transpose_b = false;  // `b` holds [n, k]
  MatrixView<float> c;
  bool accumulate = false;  // adds to C, and to row_sums; not together with GELU

  const float* bias = nullptr;        // [n], added to each row
  bool gelu = false;                  // C = gelu(A · B + bias)
  MatrixView<float> pre;              // with gelu: also gets A · B + bias
  MatrixView<const float> gelu_grad;  // C = (A · B) gelu'(gelu_grad), element by element
  bool gelu_b = false;                // B is gelu of what `b` holds
  float* row_sums = nullptr;          // [m], gets the sums of A's rows
};

// The instructions to compute with.
enum class GemmCode { kPortable, kAvx2, kAvx512 };

// Whether this processor can run that code.
bool can_run(GemmCode code);

// The fastest code that it can run.
GemmCode best_gemm_code();

// Whether `gemm` is to be preferred to MKL: on processors with AVX2 that are not Intel's, where MKL
// falls short and this was measured. With AVX-512 it was not.
bool gemm_is_faster();

// Computes the product on up to `threads` threads, whose number changes no bit of the result.
// Throws std::bad_alloc before anything is written.
void gemm(const Gemm& product, unsigned threads, GemmCode code = best_gemm_code());

}  // namespace fastgpt
