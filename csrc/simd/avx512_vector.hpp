// The vector types for AVX-512 and for its extensions BF16 and VNNI. See plain_vector.hpp for their
// members.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

#include "simd/transpose_avx.hpp"

namespace fastgpt {
namespace {

struct Avx512 {
  using Register = __m512;
  static constexpr std::size_t kWidth = 16;
  static constexpr std::size_t kRegisters = 32;

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
  static Register load_narrow(const void* from) {
    const __m256i narrow = _mm256_loadu_si256(static_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(narrow), 16));
  }
  static float square_root(float x) { return _mm_cvtss_f32(_mm_sqrt_ss(_mm_set_ss(x))); }
  static void transpose_8x4(const float* const* rows, float* to, std::size_t stride) {
    transpose_8x4_avx([rows](int i) { return _mm_loadu_ps(rows[i]); }, to, stride);
  }

 private:
  // As in Avx2.
  static Register first(Register pair) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(pair), 16));
  }
  static Register second(Register pair) {
    return _mm512_castsi512_ps(
        _mm512_and_si512(_mm512_castps_si512(pair), _mm512_set1_epi32(-65536)));
  }
};

#if defined(__AVX512BF16__)
struct Avx512Bf16 : Avx512 {
  static Register multiply_pairs(Register x, Register y, Register sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }
};
#endif

#if defined(__AVX512VNNI__)
struct Avx512Vnni : Avx512 {
  using Integers = __m512i;
  static constexpr std::int32_t kDot8Offset = 128;

  static Integers load_integers(const std::uint32_t* from) { return _mm512_loadu_si512(from); }
  static Integers broadcast_integer(std::int32_t x) { return _mm512_set1_epi32(x); }
  static Register to_floats(Integers x) { return _mm512_cvtepi32_ps(x); }
  static Integers dot8(Integers weights, Integers inputs, Integers sum) {
    return _mm512_dpbusd_epi32(sum, weights, inputs);
  }
  static Integers dot4(Integers weights, Integers inputs, Integers sum) {
    return _mm512_dpbusd_epi32(sum, weights, inputs);
  }
  static Integers low_nibbles(Integers x) {
    return _mm512_and_si512(x, _mm512_set1_epi32(0x0F0F0F0F));
  }
  static Integers high_nibbles(Integers x) { return low_nibbles(_mm512_srli_epi32(x, 4)); }
};
#endif

}  // namespace
}  // namespace fastgpt
