#include "simd/avx512_vector.hpp"
#include "training/gemm_templates.hpp"

namespace fastgpt {

// Of 32 registers, 24 are accumulators for the 12 × 2 tile of C and 2 for a row of B. An element of
// A takes no register: it is a broadcast memory operand of the multiplication.
constexpr GemmKernels kGemmAvx512 = Kernels<Avx512, 12, 2>::table();

}  // namespace fastgpt
