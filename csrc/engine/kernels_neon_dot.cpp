#include "engine/kernel_templates.hpp"
#include "simd/neon_vector.hpp"

namespace fastgpt::engine {
namespace {

struct Vector : NeonDot {  // see kernels_neon.cpp
  static constexpr std::size_t kFloatRows = 5, kIntegerRows = 5, kPanelRows = 2;
};

}  // namespace

constexpr Kernels kKernelsNeonDot = make_products<Vector, Format::kInt8, Format::kInt4>();

}  // namespace fastgpt::engine
