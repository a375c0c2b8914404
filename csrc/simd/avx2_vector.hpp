// The vector type for AVX2 and FMA. See plain_vector.hpp for its members.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "simd/transpose_avx.hpp"

namespace fastgpt {
namespace {

struct Avx2 {
  using Register = __m256;
  using Integers = __m256i;
  static constexpr std::size_t kWidth = 8;
  static constexpr std::size_t kRegisters = 16;
  static constexpr std::int32_t kDot8Offset = 0;

  static Register zero() { return _mm256_setzero_ps(); }
  static Register load(const void* from) {
    return _mm256_loadu_ps(static_cast<const float*>(from));
  }
  static void store(float* to, Register value) { _mm256_storeu_ps(to, value); }
  static Register broadcast(const float& from) { return _mm256_broadcast_ss(&from); }
  static Register add(Register x, Register y) { return _mm256_add_ps(x, y); }
  static Register multiply(Register x, Register y) { return _mm256_mul_ps(x, y); }
  static Register multiply_add(Register x, Register y, Register sum) {
    return _mm256_fmadd_ps(x, y, sum);
  }
  static Register multiply_pairs(Register x, Register y, Register sum) {
    return _mm256_fmadd_ps(second(x), second(y), _mm256_fmadd_ps(first(x), first(y), sum));
  }
  static Register load_narrow(const void* from) {
    const __m128i narrow = _mm_loadu_si128(static_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(narrow), 16));
  }
  static float square_root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
  static void transpose_8x4(const float* const* rows, float* to, std::size_t stride) {
    transpose_8x4_avx([rows](int i) { return _mm_loadu_ps(rows[i]); }, to, stride);
  }

  static Integers load_integers(const std::uint32_t* from) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
  }
  static Integers broadcast_integer(std::int32_t x) { return _mm256_set1_epi32(x); }
  static Register to_floats(Integers x) { return _mm256_cvtepi32_ps(x); }
  // maddubs multiplies unsigned by signed bytes and adds pairs of products in 16 bits, saturating.
  // With unsigned weights up to 255 they could overflow; |w| · (±x), with the sign of w moved to x,
  // is at most 2 · 127². XOR with 0x80 recovers the signed weight w.
  static Integers dot8(Integers weights, Integers inputs, Integers sum) {
    const __m256i w = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));
    return dot4(_mm256_abs_epi8(w), _mm256_sign_epi8(inputs, w), sum);
  }
  static Integers dot4(Integers weights, Integers inputs, Integers sum) {
    const __m256i pairs = _mm256_maddubs_epi16(weights, inputs);
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Integers low_nibbles(Integers x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
  static Integers high_nibbles(Integers x) { return low_nibbles(_mm256_srli_epi32(x, 4)); }

 private:
  // The two bfloat16 numbers of each 32-bit lane as floats: the low half is shifted up, the high
  // half only needs the low bits cleared.
  static Register first(Register pair) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(pair), 16));
  }
  static Register second(Register pair) {
    return _mm256_and_ps(pair, _mm256_castsi256_ps(_mm256_set1_epi32(-65536)));
  }
};

}  // namespace
}  // namespace fastgpt
