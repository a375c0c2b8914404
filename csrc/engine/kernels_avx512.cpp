#include "engine/kernel_templates.hpp"
#include "simd/avx512_vector.hpp"

namespace fastgpt::engine {
namespace {

// Of 32 registers, 24 are accumulators (12 rows by a panel of two registers), and 2 for weights.
struct Vector : Avx512 {
  static constexpr std::size_t kFloatRows = 12, kIntegerRows = 12, kPanelRows = 12;
};

}  // namespace

constexpr Kernels kKernelsAvx512 = make_products<Vector, Format::kFloat32, Format::kBfloat16>(
    make_kernels_without_products<Vector>());

}  // namespace fastgpt::engine
