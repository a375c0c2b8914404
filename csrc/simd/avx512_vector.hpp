// The base vector type of the engine's AVX-512 kernels. kernels_avx512_bf16.cpp replaces
// `multiply_pairs` with the bfloat16 instruction; kernels_avx512_vnni.cpp adds the operations on
// integers.
#pragma once

#include <immintrin.h>

#include "engine/kernels_of.hpp"

namespace fastgpt::engine {
namespace {

// Register budget, of 32 registers: 24 accumulators (12 rows by a panel of two registers) and 2 for
// weights.
struct Avx512 {
  using Register = __m512;
  using Integers = __m512i;
  static constexpr std::size_t kWidth = 16;
  static constexpr bool kManyRegisters = true;
  static constexpr std::size_t kFloatRows = 12, kIntegerRows = 12, kPanelRows = 12;

  static Register zero() { return _mm512_setzero_ps(); }
  static Register load(const void* from) { return _mm512_loadu_ps(from); }
  static void store(float* to, Register value) { _mm512_storeu_ps(to, value); }
  static Register broadcast(const float& from) { return _mm512_set1_ps(from); }
  static Register add(Register x, Register y) { return _mm512_add_ps(x, y); }
  static Register multiply(Register x, Register y) { return _mm512_mul_ps(x, y); }
  static Register multiply_add(Register x, Register y, Register sum) {
    return _mm512_fmadd_ps(x, y, sum);
  }
  static Register multiply_pairs(Register x, Register y, Register sum) {
    return _mm512_fmadd_ps(second(x), second(y), _mm512_fmadd_ps(first(x), first(y), sum));
  }
  // Widens 16 bfloat16 numbers: a bfloat16 is the upper half of a float.
  static Register load_narrow(const void* from) {
    const __m256i narrow = _mm256_loadu_si256(static_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
  }
  static float square_root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }

 private:
  // The two bfloat16 numbers of each 32-bit lane as floats: the low half is shifted up, the high
  // half only needs the low bits cleared.
  static Register first(Register pair) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pair), 16));
  }
  static Register second(Register pair) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(pair), _mm512_set1_epi32(-65536)));
  }
};

}  // namespace
}  // namespace fastgpt::engine
