#include "gelu.hpp"

#include <cmath>
#include <cstdint>
#include <cstring>

#include "parallel.hpp"

// One function body, compiled for each of these and chosen when the module is loaded.
#if defined(__x86_64__) && defined(__GLIBC__) && !defined(__clang__) && \
    !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define FASTGPT_EVERY_CPU \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FASTGPT_EVERY_CPU
#endif

namespace fastgpt {
namespace {

// gelu(x) = x · sigmoid(z) with z = 2u = x (kLinear + kCubic x²), u the argument of the tanh.
constexpr float kLinear = 1.5957691216057308F;  // 2 √(2/π)
constexpr float kCubic = 0.071354816272279F;    // 0.044715 times that

// exp(x) for x ≤ 0, to about an ulp: 2ⁿ times a polynomial on |r| ≤ ln(2)/2, as in Cephes' expf.
// No branch and no call, so that the loops below become vector code.
inline float exp_negative(float exponent) {
  constexpr float kRound = 12582912.0F;  // 1.5 · 2²³: adding it rounds to a whole number
  constexpr float kSmallest = -87.0F;    // below it 2ⁿ would be no normal number
  const float x = exponent > kSmallest ? exponent : kSmallest;
  const float n = (x * 1.44269504F + kRound) - kRound;
  const float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;  // ln(2) in two parts
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * (r * r) + r + 1.0F;
  const std::int32_t bits = (static_cast<std::int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return exponent > kSmallest ? p * power : 0.0F;
}

// With e = exp(-|z|) and q = 1 / (1 + e), sigmoid(z) is q or, for negative z, e q, and
// sigmoid · (1 - sigmoid) is e q²: nothing overflows and nothing cancels.
FASTGPT_EVERY_CPU
void forward_part(const float* __restrict x, float* __restrict y, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    const float v = x[i];
    const float e = exp_negative(-std::fabs(v * (kLinear + kCubic * v * v)));
    y[i] = v * (v < 0.0F ? e : 1.0F) / (1.0F + e);
  }
}

FASTGPT_EVERY_CPU
void backward_part(const float* __restrict grad, const float* __restrict x,
                   float* __restrict grad_x, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) {
    const float v = x[i];
    const float e = exp_negative(-std::fabs(v * (kLinear + kCubic * v * v)));
    const float q = 1.0F / (1.0F + e);
    const float bend = e * q * std::fabs(v) * (kLinear + 3.0F * kCubic * v * v);
    grad_x[i] = grad[i] * q * (v < 0.0F ? e - bend : 1.0F + bend);
  }
}

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
