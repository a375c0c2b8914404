#include "training/gelu.hpp"

#include "common/parallel.hpp"
#include "training/gelu_formula.hpp"

namespace fastgpt {
namespace {

inline void forward_loop(const float* __restrict x, float* __restrict y, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) y[i] = gelu_of(x[i]);
}

inline void backward_loop(const float* __restrict grad, const float* __restrict x,
                          float* __restrict grad_x, std::size_t n) {
  for (std::size_t i = 0; i < n; ++i) grad_x[i] = gelu_gradient_of(grad[i], x[i]);
}

#if defined(__x86_64__) && defined(__GNUC__)
// The same loops compiled for AVX2, used if the processor supports it.
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
