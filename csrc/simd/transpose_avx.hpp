// An 8 × 4 transpose for files that are compiled for AVX or a later instruction set.
#pragma once

#include <immintrin.h>

#include <cstddef>

namespace fastgpt {
namespace {

// Sets to[j * stride + i] = row(i)[j] for i < 8 and j < 4. `row(i)` returns four floats in a
// register.
//
// A 256-bit register joins rows i and i + 4, and both of its halves go through the same 4 × 4
// transpose: unpacking interleaves two rows, shuffling then joins the pairs of four. The stores are
// in the order of j, which callers rely on where `stride` < 8 and a store overlaps the next.
template <typename Row>
inline void transpose_8x4_avx(const Row& row, float* to, std::size_t stride) {
  const auto two = [&row](int i) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(row(i)), row(i + 4), 1);
  };
  const __m256 r0 = two(0), r1 = two(1), r2 = two(2), r3 = two(3);
  const __m256 low01 = _mm256_unpacklo_ps(r0, r1), high01 = _mm256_unpackhi_ps(r0, r1);
  const __m256 low23 = _mm256_unpacklo_ps(r2, r3), high23 = _mm256_unpackhi_ps(r2, r3);
  _mm256_storeu_ps(to, _mm256_shuffle_ps(low01, low23, _MM_SHUFFLE(1, 0, 1, 0)));
  _mm256_storeu_ps(to + stride, _mm256_shuffle_ps(low01, low23, _MM_SHUFFLE(3, 2, 3, 2)));
  _mm256_storeu_ps(to + 2 * stride, _mm256_shuffle_ps(high01, high23, _MM_SHUFFLE(1, 0, 1, 0)));
  _mm256_storeu_ps(to + 3 * stride, _mm256_shuffle_ps(high01, high23, _MM_SHUFFLE(3, 2, 3, 2)));
}

}  // namespace
}  // namespace fastgpt
