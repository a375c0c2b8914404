// GPT-2's GELU (the tanh approximation) and exp(-x) for one number, written so that compilers
// vectorize loops over them.
//
// Everything has internal linkage: the files that include this are compiled for different
// instruction sets, and the linker would otherwise keep one copy for all of them. For the same
// reason no function of the standard library is called.
#pragma once

#include <cstdint>

#include "common/bits.hpp"

namespace fastgpt {
namespace {

// gelu(x) = x · sigmoid(z) with z = 2u = x (kLinear + kCubic x²), where u is the argument of tanh.
constexpr float kLinear = 1.5957691216057308F;  // 2 √(2/π)
constexpr float kCubic = 0.071354816272279F;    // 0.044715 · kLinear

// Returns exp(-x) for x ≥ 0, accurate to about one ulp: 2ⁿ times a polynomial in r with
// |r| ≤ ln(2)/2, as in Cephes' expf. The result is 0 for x ≥ 87, infinity included; NaN stays NaN.
//
// That range is tested with one unsigned comparison of bits: non-negative floats are ordered as
// their bits are, with NaN above infinity, so that x in [87, infinity] is a range of integers, and
// anything below it wraps around to a large number.
inline float exp_minus(float x) {
  constexpr float kRound = 12582912.0F;           // 1.5 · 2²³: adding it rounds to an integer
  constexpr std::uint32_t kLargest = 0x42AE0000;  // 87.0: beyond it 2ⁿ may be subnormal
  constexpr std::uint32_t kInfinity = 0x7F800000;
  const bool vanishes = unsigned_bits(x) - kLargest <= kInfinity - kLargest;
  const float y = -(vanishes ? 0.0F : x);
  const float rounded = y * 1.44269504F + kRound;
  const float n = rounded - kRound;
  const float r = (y - n * 0.693359375F) + n * 2.12194440e-4F;  // minus n ln(2), in two parts
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + r + 1.0F;
  // The low bits of `rounded` are n; n + 127 is the exponent field of 2ⁿ.
  const std::uint32_t exponent = unsigned_bits(rounded) - unsigned_bits(kRound) + 127;
  const float power = float_of(exponent << 23);
  return vanishes ? 0.0F : p * power;
}

constexpr std::int32_t kSign = INT32_MIN;

inline float absolute(float x) { return float_of(bits_of(x) & ~kSign); }

// Returns 1 for x ≥ 0, `negative` otherwise, by its sign bit.
inline float one_or(float negative, float x) {
  return float_of(bits_of(x) < 0 ? bits_of(negative) : bits_of(1.0F));
}

// Returns gelu(x). With e = exp(-|z|) and q = 1 / (1 + e), sigmoid(z) is q for z ≥ 0 and e q for
// z < 0, and sigmoid · (1 - sigmoid) is e q². Nothing overflows, and there is no cancellation. z
// has the sign of x.
inline float gelu_of(float x) {
  const float e = exp_minus(absolute(x * (kLinear + kCubic * x * x)));
  return x * one_or(e, x) / (1.0F + e);
}

// Returns grad · gelu'(x), where gelu' = sigmoid + x · sigmoid · (1 - sigmoid) · dz/dx. The second
// term has the sign of x, which is set last.
inline float gelu_gradient_of(float grad, float x) {
  const float e = exp_minus(absolute(x * (kLinear + kCubic * x * x)));
  const float q = 1.0F / (1.0F + e);
  const float bend = e * q * absolute(x) * (kLinear + 3.0F * kCubic * x * x);
  return grad * q * (one_or(e, x) + float_of(bits_of(bend) | (bits_of(x) & kSign)));
}

}  // namespace
}  // namespace fastgpt
