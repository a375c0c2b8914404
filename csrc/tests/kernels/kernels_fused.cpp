#include "tests/kernels/kernels_fused.hpp"

#include <cmath>

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
  static Register multiply_pairs(const Register& x, const Register& y, const Register& sum) {
    return multiply_add(half<16>(x), half<16>(y), multiply_add(half<0>(x), half<0>(y), sum));
  }

 private:
  template <std::uint32_t kShift>
  static Register half(const Register& pairs) {
    Register floats;
    for (std::size_t i = 0; i < kWidth; ++i) {
      floats.lane[i] = to_float32(static_cast<Bfloat16>(unsigned_bits(pairs.lane[i]) >> kShift));
    }
    return floats;
  }
};

constexpr Kernels kKernels = kernels_of<Fused>();

}  // namespace

const Kernels& kernels_fused() { return kKernels; }

}  // namespace fastgpt::engine
