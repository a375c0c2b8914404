#include "engine/kernel_templates.hpp"
#include "simd/neon_vector.hpp"

namespace fastgpt::engine {
namespace {

// Of 32 registers, a tile of 5 rows by half a panel has 20 accumulators and 4 registers of weights;
// a tile of 2 rows by a whole panel has 16 accumulators and 8 of weights.
struct Vector : Neon {
  static constexpr std::size_t kFloatRows = 5, kIntegerRows = 4, kPanelRows = 2;
};

}  // namespace

constexpr Kernels kKernelsNeon = make_kernels<Vector>();

}  // namespace fastgpt::engine
