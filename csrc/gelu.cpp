#include "gelu.hpp"

#include <cmath>
#include <cstdint>
#include <cstring>

#include "parallel.hpp"

namespace fastgpt {
namespace {

// gelu(x) = x · sigmoid(z) with z = 2u = x (kLinear + kCubic x²), u the argument of the tanh.
constexpr float kLinear = 1.5957691216057308F;  // 2 √(2/π)
constexpr float kCubic = 0.071354816272279F;    // 0.044715 times that

inline std::int32_t bits_of(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

inline float float_of(std::int32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// exp(-x) for x ≥ 0, to about an ulp: 2ⁿ times a polynomial on |r| ≤ ln(2)/2, as in Cephes' expf.
// Floats without a sign order as their bits do, and comparing whole numbers lets NaN through.
inline float exp_minus(float x) {
  constexpr float kRound = 12582912.0F;          // 1.5 · 2²³: adding it rounds to a whole number
  constexpr std::int32_t kLargest = 0x42AE0000;  // 87: past it 2ⁿ would be no normal number
  const std::int32_t bits = bits_of(x);
  const float y = -float_of(bits < kLargest ? bits : kLargest);
  const float rounded = y * 1.44269504F + kRound;
  const float n = rounded - kRound;
  const float r = (y - n * 0.693359375F) + n * 2.12194440e-4F;  // ln(2) in two parts
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + r + 1.0F;
  const float power = float_of((bits_of(rounded) - bits_of(kRound) + 127) << 23);
  return float_of(bits < kLargest ? bits_of(p * power) : 0);
}

// 1 for x ≥ 0, else `negative`.
inline float one_or(float negative, float x) {
  return float_of(bits_of(x) < 0 ? bits_of(negative) : bits_of(1.0F));
}

// With e = exp(-|z|) and q = 1 / (1 + e), sigmoid(z) is q or, for negative z, e q, and
// sigmoid · (1 - sigmoid) is e q²: nothing overflows and nothing cancels.
inline void forward_loop(const float* __restrict x, float* __restrict y, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    const float v = x[i];
    const float e = exp_minus(std::fabs(v * (kLinear + kCubic * v * v)));
    y[i] = v * one_or(e, v) / (1.0F + e);
  }
}

inline void backward_loop(const float* __restrict grad, const float* __restrict x,
                          float* __restrict grad_x, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    const float v = x[i];
    const float e = exp_minus(std::fabs(v * (kLinear + kCubic * v * v)));
    const float q = 1.0F / (1.0F + e);
    const float bend = e * q * std::fabs(v) * (kLinear + 3.0F * kCubic * v * v);
    grad_x[i] = grad[i] * q * (one_or(e, v) + std::copysign(bend, v));
  }
}

#if defined(__x86_64__) && defined(__GNUC__)
// The same loops compiled for AVX2, where the machine that runs them has it.
__attribute__((target("avx2,fma"))) void forward_avx2(const float* x, float* y, std::size_t n) {
  forward_loop(x, y, n);
}
__attribute__((target("avx2,fma"))) void backward_avx2(const float* grad, const float* x,
                                                       float* grad_x, std::size_t n) {
  backward_loop(grad, x, grad_x, n);
}
const bool kHasAvx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
const auto forward_part = kHasAvx2 ? forward_avx2 : forward_loop;
const auto backward_part = kHasAvx2 ? backward_avx2 : backward_loop;
#else
constexpr auto forward_part = forward_loop;
constexpr auto backward_part = backward_loop;
#endif

}  // namespace

void gelu_forward(const float* x, float* y, std::size_t n, unsigned threads) {
  parallel_for(n, threads, [=](std::size_t begin, std::size_t end) {
    forward_part(x + begin, y + begin, end - begin);
  });
}

void gelu_backward(const float* grad, const float* x, float* grad_x, std::size_t n,
                   unsigned threads) {
  parallel_for(n, threads, [=](std::size_t begin, std::size_t end) {
    backward_part(grad + begin, x + begin, grad_x + begin, end - begin);
  });
}

}  // namespace fastgpt
