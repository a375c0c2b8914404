// Conversion between float32 and bfloat16, and type-erased arrays of either.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fastgpt {

using Bfloat16 = std::uint16_t;  // the bits of a bfloat16: the upper half of a float32

// A pointer to contiguous elements of type float32 or bfloat16.
template <typename Void>
struct AnyFloats {
  Void* data = nullptr;
  bool bf16 = false;
};
using Floats = AnyFloats<void>;
using ConstFloats = AnyFloats<const void>;

// Internal linkage, because the files that include this header are compiled for different
// instruction sets, and the linker would otherwise keep one copy for all of them. The calls of
// memcpy compile to register moves.
namespace {

// Returns a pointer to the element at `index`.
inline Floats operator+(const Floats& all, std::size_t index) {
  return {static_cast<char*>(all.data) + index * (all.bf16 ? sizeof(Bfloat16) : sizeof(float)),
          all.bf16};
}
inline ConstFloats operator+(const ConstFloats& all, std::size_t index) {
  return {
      static_cast<const char*>(all.data) + index * (all.bf16 ? sizeof(Bfloat16) : sizeof(float)),
      all.bf16};
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

// Converts to float32, which is exact.
inline float to_float32(Bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline float to_float32(float x) { return x; }

// Converts to bfloat16, rounding to nearest, ties to even; NaN becomes a quiet NaN. Adding 0x7FFF
// plus the lowest bit that is kept carries into the upper half exactly if the value rounds up. For
// NaN the addition could overflow, so bits are truncated instead, and the quiet bit set.
inline Bfloat16 to_bfloat16(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16;
  const std::uint32_t quiet = bits >> 16 | 0x40U;
  return static_cast<Bfloat16>((bits & 0x7FFFFFFFU) > 0x7F800000U ? quiet : rounded);
}

// Stores x in the type of the destination.
inline void put(float x, float* to) { *to = x; }
inline void put(float x, Bfloat16* to) { *to = to_bfloat16(x); }

}  // namespace
}  // namespace fastgpt
