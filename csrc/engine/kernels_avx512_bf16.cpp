#include "engine/kernel_templates.hpp"
#include "simd/avx512_vector.hpp"

namespace fastgpt::engine {
namespace {

struct Vector : Avx512Bf16 {  // see kernels_avx512.cpp
  static constexpr std::size_t kFloatRows = 12, kIntegerRows = 12, kPanelRows = 12;
};

}  // namespace

constexpr Kernels kKernelsAvx512Bf16 = make_products<Vector, Format::kBfloat16>();

}  // namespace fastgpt::engine
