// The AVX-512 vector type of the GEMM kernels, without `multiply_add`: the files that include this
// add it, for words of one float or of two bfloat16 numbers.
#pragma once

#include <immintrin.h>

#include <cstddef>

namespace fastgpt {
namespace {

// Register budget, of 32 registers: 24 accumulators for the 12 × 2 tile of C and 2 for a row of B.
// An element of A takes no register: it is a broadcast memory operand of the multiplication.
struct Avx512Registers {
  using Register = __m512;
  static constexpr std::size_t kWidth = 16;
  static constexpr std::size_t kTileRows = 12;
  static constexpr std::size_t kTileVectors = 2;

  static Register zero() { return _mm512_setzero_ps(); }
  static Register load(const float* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Register value) { _mm512_storeu_ps(to, value); }
  static Register broadcast(const float& from) { return _mm512_set1_ps(from); }
  static Register add(Register x, Register y) { return _mm512_add_ps(x, y); }
};

}  // namespace
}  // namespace fastgpt
