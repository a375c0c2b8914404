#include "engine/kernel_templates.hpp"
#include "simd/plain_vector.hpp"

namespace fastgpt::engine {
namespace {

struct Vector : Plain {
  static constexpr std::size_t kFloatRows = 2, kIntegerRows = 1, kPanelRows = 2;
};

}  // namespace

constexpr Kernels kKernelsPortable = make_kernels<Vector>();

}  // namespace fastgpt::engine
