#include "tests/kernels/kernels_fused.hpp"

#include <cmath>

#include "engine/kernel_templates.hpp"
#include "simd/plain_vector.hpp"

namespace fastgpt::engine {
namespace {

struct Fused : Plain {
  // One row at a time: the results must not depend on how many rows are computed together.
  static constexpr std::size_t kFloatRows = 1, kIntegerRows = 1, kPanelRows = 1;

  static Register multiply_add(const Register& x, const Register& y, Register sum) {
    for (std::size_t i = 0; i < kWidth; ++i) {
      sum.lane[i] = std::fma(x.lane[i], y.lane[i], sum.lane[i]);
    }
    return sum;
  }
  static Register multiply_pairs(const Register& x, const Register& y, Register sum) {
    for (std::size_t i = 0; i < kWidth; ++i) {
      const float a = x.lane[i], b = y.lane[i];
      sum.lane[i] = std::fma(first_of_pair(a), first_of_pair(b), sum.lane[i]);
      sum.lane[i] = std::fma(second_of_pair(a), second_of_pair(b), sum.lane[i]);
    }
    return sum;
  }
};

constexpr Kernels kKernels = make_kernels<Fused>();

}  // namespace

const Kernels& kernels_fused() { return kKernels; }

}  // namespace fastgpt::engine
