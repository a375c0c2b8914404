#include "engine/kernel_templates.hpp"
#include "simd/avx2_vector.hpp"

namespace fastgpt::engine {
namespace {

// Of 16 registers, 12 are accumulators for 3 rows by a panel of four registers. Products of
// integers also need registers for constants.
struct Vector : Avx2 {
  static constexpr std::size_t kFloatRows = 3, kIntegerRows = 2, kPanelRows = 3;
};

}  // namespace

constexpr Kernels kKernelsAvx2 = make_kernels<Vector>();

}  // namespace fastgpt::engine
