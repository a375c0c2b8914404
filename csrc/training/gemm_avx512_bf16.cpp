#include "simd/avx512_vector.hpp"
#include "training/gemm_templates.hpp"

namespace fastgpt {
namespace {

// Packing of pairs of depths: see PairPacking.
struct Pairs {
  // Masks the last vector, so that exactly n words are read and written. `next` is null where the
  // second depth does not exist; the upper halves are then zero.
  template <std::size_t n, typename Number>
  static void pack_words(const Number* row, const Number* next, float* to) {
    constexpr std::size_t kLast = n % 16 == 0 ? 16 : n % 16;
    constexpr std::size_t kVectors = (n + 15) / 16;
    repeat<kVectors>([&](auto v) FASTGPT_INLINE {
      constexpr std::size_t kAt = 16 * v;
      constexpr auto kMask = static_cast<__mmask16>((1U << (v + 1 < kVectors ? 16 : kLast)) - 1U);
      const __m512i words =
          next == nullptr ? one_row(kMask, row + kAt) : two_rows(kMask, row + kAt, next + kAt);
      _mm512_mask_storeu_epi32(to + kAt, kMask, words);
    });
  }

  template <typename Number>
  static void transpose_8x4(const Number* const* rows, float* to, std::size_t stride) {
    transpose_8x4_avx([rows](int i) { return four_words(rows[i]); }, to, stride);
  }

 private:
  static __m512i two_rows(__mmask16 mask, const float* row, const float* next) {
    const __m512 low = _mm512_maskz_loadu_ps(mask, row), high = _mm512_maskz_loadu_ps(mask, next);
    // The conversion leaves the 16 numbers of `row` in the lower half of the register and those of
    // `next` in the upper half; the permutation interleaves them.
    const auto side_by_side = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low));
    const __m512i order =
        _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return _mm512_permutexvar_epi16(order, side_by_side);
  }
  static __m512i two_rows(__mmask16 mask, const Bfloat16* row, const Bfloat16* next) {
    return _mm512_or_si512(one_row(mask, row), _mm512_slli_epi32(one_row(mask, next), 16));
  }
  static __m512i one_row(__mmask16 mask, const float* row) {
    const __m512bh rounded = _mm512_cvtne2ps_pbh(__m512{}, _mm512_maskz_loadu_ps(mask, row));
    return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(reinterpret_cast<__m512i>(rounded)));
  }
  static __m512i one_row(__mmask16 mask, const Bfloat16* row) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, row));
  }
  static __m128 four_words(const float* from) {
    return reinterpret_cast<__m128>(_mm256_cvtneps_pbh(_mm256_loadu_ps(from)));
  }
  static __m128 four_words(const Bfloat16* from) {
    return _mm_castsi128_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
};

}  // namespace

// The tile is that of gemm_avx512.cpp.
constexpr GemmKernels kGemmAvx512Bf16 = Kernels<Avx512Bf16, 12, 2, PairPacking<Pairs>>::table();

}  // namespace fastgpt
