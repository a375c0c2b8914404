// The matrix product's kernels for AVX-512; CMakeLists.txt has this file compiled for it.
#include "gemm_kernels.hpp"

#if defined(__AVX512F__)
#include <immintrin.h>

#include "gemm_kernels_of.hpp"
#include "transpose_avx.hpp"

namespace fastgpt {
namespace {

// Of the 32 registers, 24 hold the tile and 2 a row of B; an element of A is part of the operation.
struct Avx512 {
  using Register = __m512;
  static constexpr std::size_t kWidth = 16;
  static constexpr std::size_t kTileRows = 12;
  static constexpr std::size_t kTileVectors = 2;

  static Register zero() { return _mm512_setzero_ps(); }
  static Register load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Register value) { _mm512_storeu_ps(to, value); }
  static Register broadcast(const float& from) { return _mm512_set1_ps(from); }
  static Register add(Register x, Register y) { return _mm512_add_ps(x, y); }
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
