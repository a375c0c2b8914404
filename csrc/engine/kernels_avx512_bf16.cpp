#include "engine/kernels.hpp"

#if defined(__AVX512BF16__)
#include "simd/avx512_vector.hpp"

namespace fastgpt::engine {
namespace {

struct Avx512Bf16 : Avx512 {
  static Register multiply_pairs(Register x, Register y, Register sum) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y));
  }
};

constexpr Kernels kKernels = [] {
  Kernels kernels{};
  kernels.multiply[1] = multiply<Avx512Bf16, Format::kBfloat16>;
  return kernels;
}();

}  // namespace

const Kernels* kernels_avx512_bf16() { return &kKernels; }

}  // namespace fastgpt::engine

#else

namespace fastgpt::engine {

const Kernels* kernels_avx512_bf16() { return nullptr; }

}  // namespace fastgpt::engine

#endif
