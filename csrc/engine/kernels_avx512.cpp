#include "engine/kernels.hpp"

#if defined(__AVX512F__)
#include "simd/avx512_vector.hpp"

namespace fastgpt::engine {
namespace {

constexpr Kernels kKernels = [] {
  Kernels kernels = kernels_without_products<Avx512>();
  kernels.multiply[0] = multiply<Avx512, Format::kFloat32>;
  kernels.multiply[1] = multiply<Avx512, Format::kBfloat16>;
  return kernels;
}();

}  // namespace

const Kernels* kernels_avx512() { return &kKernels; }

}  // namespace fastgpt::engine

#else

namespace fastgpt::engine {

const Kernels* kernels_avx512() { return nullptr; }

}  // namespace fastgpt::engine

#endif
