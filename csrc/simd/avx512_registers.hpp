// For the matrix product's files that are compiled for AVX-512: all but how words are multiplied.
#pragma once

#include <immintrin.h>

#include <cstddef>

namespace fastgpt {
namespace {

// Of the 32 registers, 24 hold the tile and 2 a row of B; an element of A is part of the operation.
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
