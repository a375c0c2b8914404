// Conversion between float32 and bfloat16, and type-erased arrays of either.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/bits.hpp"

namespace fastgpt {

using Bfloat16 = std::uint16_t;  // the bits of a bfloat16: the upper half of a float32

// A pointer to contiguous elements of type float32 or bfloat16.
struct ConstFloats {
  const void* data = nullptr;
  bool bf16 = false;
};
struct Floats {
  void* data = nullptr;
  bool bf16 = false;

  operator ConstFloats() const { return {data, bf16}; }
};

namespace {  // see bits.hpp

// Returns a pointer to the element at `index`.
inline ConstFloats operator+(const ConstFloats& all, std::size_t index) {
  const std::size_t bytes = index * (all.bf16 ? sizeof(Bfloat16) : sizeof(float));
  return {static_cast<const char*>(all.data) + bytes, all.bf16};
}
inline Floats operator+(const Floats& all, std::size_t index) {
  const std::size_t bytes = index * (all.bf16 ? sizeof(Bfloat16) : sizeof(float));
  return {static_cast<char*>(all.data) + bytes, all.bf16};
}

// Calls body(pointer) with the pointer cast to the type of the elements.
template <typename Body>
inline void of_type(const Floats& all, const Body& body) {
  if (all.bf16) {
    body(static_cast<Bfloat16*>(all.data));
  } else {
    body(static_cast<float*>(all.data));
  }
}
template <typename Body>
inline void of_type(const ConstFloats& all, const Body& body) {
  if (all.bf16) {
    body(static_cast<const Bfloat16*>(all.data));
  } else {
    body(static_cast<const float*>(all.data));
  }
}

// Converts to float32, which is exact.
inline float to_float32(Bfloat16 x) { return float_of(static_cast<std::uint32_t>(x) << 16); }
inline float to_float32(float x) { return x; }

// Converts to bfloat16, rounding to nearest, ties to even; NaN becomes a quiet NaN. Adding 0x7FFF
// plus the lowest bit that is kept carries into the upper half exactly if the value rounds up. For
// NaN the addition could overflow, so bits are truncated instead, and the quiet bit set.
inline Bfloat16 to_bfloat16(float x) {
  const std::uint32_t bits = unsigned_bits(x);
  const std::uint32_t rounded = (bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16;
  const std::uint32_t quiet = bits >> 16 | 0x40U;
  return static_cast<Bfloat16>((bits & 0x7FFFFFFFU) > 0x7F800000U ? quiet : rounded);
}

// Stores x in the type of the destination.
inline void put(float x, float* to) { *to = x; }
inline void put(float x, Bfloat16* to) { *to = to_bfloat16(x); }

// A pair of bfloat16 numbers in a 32-bit word, the first in the lower half. The matrix products
// handle such words as floats.
inline std::uint32_t bfloat16_pair(float first, float second) {
  return to_bfloat16(first) | static_cast<std::uint32_t>(to_bfloat16(second)) << 16;
}
inline float first_of_pair(float word) {
  return to_float32(static_cast<Bfloat16>(unsigned_bits(word)));
}
inline float second_of_pair(float word) {
  return to_float32(static_cast<Bfloat16>(unsigned_bits(word) >> 16));
}

}  // namespace
}  // namespace fastgpt
