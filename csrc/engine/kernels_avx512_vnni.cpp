#include "engine/kernel_templates.hpp"
#include "simd/avx512_vector.hpp"

namespace fastgpt::engine {
namespace {

struct Vector : Avx512Vnni {  // see kernels_avx512.cpp
  static constexpr std::size_t kFloatRows = 12, kIntegerRows = 12, kPanelRows = 12;
};

}  // namespace

constexpr Kernels kKernelsAvx512Vnni = make_products<Vector, Format::kInt8, Format::kInt4>();

}  // namespace fastgpt::engine
