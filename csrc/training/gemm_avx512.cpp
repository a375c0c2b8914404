// The GEMM kernels for AVX-512. CMakeLists.txt sets this file's instruction set.
#include "training/gemm_kernels.hpp"

#if defined(__AVX512F__)
#include "simd/avx512_registers.hpp"
#include "simd/transpose_avx.hpp"
#include "training/gemm_kernels_of.hpp"

namespace fastgpt {
namespace {

struct Avx512 : Avx512Registers {
  static Register multiply_add(Register x, Register y, Register z) {
    return _mm512_fmadd_ps(x, y, z);
  }
  static void transpose_8x4(const float* const* rows, float* to, std::size_t stride) {
    transpose_8x4_avx([rows](int i) { return _mm_loadu_ps(rows[i]); }, to, stride);
  }
};

constexpr GemmKernels kKernels = Kernels<Avx512>::table();

}  // namespace

const GemmKernels* gemm_kernels_avx512() { return &kKernels; }

}  // namespace fastgpt
#else
const fastgpt::GemmKernels* fastgpt::gemm_kernels_avx512() { return nullptr; }
#endif
