// bfloat16, the upper half of a float, and arrays that hold either.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fastgpt {

using Bfloat16 = std::uint16_t;  // its bits

// Numbers in fp32 or in bfloat16, one after the other.
template <typename Void>
struct AnyFloats {
  Void* data = nullptr;
  bool bf16 = false;
};
using Floats = AnyFloats<void>;
using ConstFloats = AnyFloats<const void>;

// Internal linkage, because the files that include this are compiled for different instruction
// sets, and a linker would keep one copy for all; memcpy is no call.
namespace {

// The numbers from the `index`th on.
inline Floats operator+(const Floats& all, std::size_t index) {
  return {static_cast<char*>(all.data) + index * (all.bf16 ? sizeof(Bfloat16) : sizeof(float)),
          all.bf16};
}
inline ConstFloats operator+(const ConstFloats& all, std::size_t index) {
  return {
      static_cast<const char*>(all.data) + index * (all.bf16 ? sizeof(Bfloat16) : sizeof(float)),
      all.bf16};
}

// Calls body with the pointer that it is.
template <typename Body>
inline void of_type(const Floats& all, const Body& body) {
  if (all.bf16) {
    body(static_cast<Bfloat16*>(all.data));
  } else {
    body(static_cast<float*>(all.data));
  }
}

inline float widened(Bfloat16 x) {
  const std::uint32_t bits = static_cast<std::uint32_t>(x) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof wide);
  return wide;
}
inline float widened(float x) { return x; }

// The nearest bfloat16, of two equally near the even one; NaN stays NaN.
inline Bfloat16 narrowed(float x) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  const std::uint32_t rounded = (bits + 0x7FFFU + (bits >> 16 & 1U)) >> 16;
  const std::uint32_t quiet = bits >> 16 | 0x40U;
  return static_cast<Bfloat16>((bits & 0x7FFFFFFFU) > 0x7F800000U ? quiet : rounded);
}

inline void put(float x, float* to) { *to = x; }
inline void put(float x, Bfloat16* to) { *to = narrowed(x); }

}  // namespace
}  // namespace fastgpt
