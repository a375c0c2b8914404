#include "simd/avx2_vector.hpp"
#include "training/gemm_templates.hpp"

namespace fastgpt {

// Of 16 registers, 12 are accumulators for the 6 × 2 tile of C, 2 for a row of B and 1 for an
// element of A.
constexpr GemmKernels kGemmAvx2 = Kernels<Avx2, 6, 2>::table();

}  // namespace fastgpt
