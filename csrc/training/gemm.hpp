// Products of matrices on a CPU, faster than MKL's where the processor is not Intel's.
//
// The plan is that of Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication"
// (2008), and of BLIS: both operands are copied, a block at a time, into the order in which a
// kernel reads them that keeps a small tile of the result in registers. Copying also rounds to
// bfloat16 where products are in that: so weights need no second copy that lasts.
#pragma once

#include <cstddef>

#include "common/bfloat16.hpp"

namespace fastgpt {

// A matrix in row-major order: element (i, j) is number i * stride + j.
template <typename AnyFloats>
struct MatrixView {
  AnyFloats numbers;
  std::size_t stride = 0;
};

// C[m, n] = A[m, k] · B[k, n] and what may be done on the way. C and `pre` overlap nothing else.
struct Gemm {
  std::size_t m = 0, n = 0, k = 0;
  MatrixView<ConstFloats> a, b;
  bool transpose_a = false;  // `a` holds [k, m]
  bool transpose_b = false;  // `b` holds [n, k]
  MatrixView<Floats> c;
  bool accumulate = false;  // adds to C, and to row_sums; C in fp32, not together with GELU

  const float* bias = nullptr;        // [n], added to each row
  bool gelu = false;                  // C = gelu(A · B + bias)
  MatrixView<Floats> pre;             // with gelu: also gets A · B + bias
  MatrixView<ConstFloats> gelu_grad;  // C = (A · B) gelu'(gelu_grad), element by element
  bool gelu_b = false;                // B is gelu of what `b` holds
  float* row_sums = nullptr;          // [m], gets the sums of A's rows
};

// The instructions to compute with. The last two multiply in bfloat16 and add up in fp32, whatever
// the matrices hold; the others compute in fp32, and all matrices must be in that.
enum class GemmCode { kPortable, kAvx2, kAvx512, kBf16Portable, kBf16Avx512 };

inline bool is_bf16(GemmCode code) { return code >= GemmCode::kBf16Portable; }

// Whether this processor can run that code.
bool can_run(GemmCode code);

// Its kernels; the processor must be able to run them.
struct GemmKernels;
const GemmKernels& gemm_kernels(GemmCode code);

// The fastest code that it can run, for products in fp32 or in bfloat16.
GemmCode best_gemm_code(bool bf16 = false);

// Whether `gemm` is to be preferred to PyTorch's products: in fp32 on processors with AVX2 that are
// not Intel's, where MKL falls short; in bfloat16 where there is AVX512-BF16 and no AMX, whose
// tiles PyTorch multiplies with. Measured on Zen 3 and Zen 4.
bool gemm_is_faster(bool bf16);

// Computes the product on up to `threads` threads, whose number changes no bit of the result.
// Throws std::bad_alloc before anything is written.
void gemm(const Gemm& product, unsigned threads, GemmCode code);

}  // namespace fastgpt
