// The GEMM kernels for AVX2 and FMA. CMakeLists.txt sets this file's instruction set.
#include "training/gemm_kernels.hpp"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include "simd/transpose_avx.hpp"
#include "training/gemm_kernels_of.hpp"

namespace fastgpt {
namespace {

// Register budget, of 16 registers: 12 accumulators for the 6 × 2 tile of C, 2 for a row of B and 1
// for an element of A.
struct Avx2 {
  using Register = __m256;
  static constexpr std::size_t kWidth = 8;
  static constexpr std::size_t kTileRows = 6;
  static constexpr std::size_t kTileVectors = 2;

  static Register zero() { return _mm256_setzero_ps(); }
  static Register load(const float* from) { return _mm256_loadu_ps(from); }
  static void store(float* to, Register value) { _mm256_storeu_ps(to, value); }
  static Register broadcast(const float& from) { return _mm256_broadcast_ss(&from); }
  static Register add(Register x, Register y) { return _mm256_add_ps(x, y); }
  static Register multiply_add(Register x, Register y, Register z) {
    return _mm256_fmadd_ps(x, y, z);
  }
  static void transpose_8x4(const float* const* rows, float* to, std::size_t stride) {
    transpose_8x4_avx([rows](int i) { return _mm_loadu_ps(rows[i]); }, to, stride);
  }
};

constexpr GemmKernels kKernels = Kernels<Avx2>::table();

}  // namespace

const GemmKernels* gemm_kernels_avx2() { return &kKernels; }

}  // namespace fastgpt
#else
const fastgpt::GemmKernels* fastgpt::gemm_kernels_avx2() { return nullptr; }
#endif
