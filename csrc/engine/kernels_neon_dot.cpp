#include "engine/kernels.hpp"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)
#include "simd/neon_vector.hpp"

namespace fastgpt::engine {
namespace {

struct NeonDot : NeonBase {
  static constexpr std::size_t kIntegerRows = 5;
  static constexpr std::int32_t kDot8Offset = 0;  // dot8 subtracts the offset itself

  static Integers dot8(Integers weights, Integers inputs, Integers sum) {
    return vdotq_s32(sum, signed_bytes(weights), vreinterpretq_s8_s32(inputs));
  }
  static Integers dot4(Integers weights, Integers inputs, Integers sum) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(inputs));
  }
};

constexpr Kernels kKernels = [] {
  Kernels kernels{};
  kernels.multiply[2] = multiply<NeonDot, Format::kInt8>;
  kernels.multiply[3] = multiply<NeonDot, Format::kInt4>;
  return kernels;
}();

}  // namespace

const Kernels* kernels_neon_dot() { return &kKernels; }

}  // namespace fastgpt::engine

#else

namespace fastgpt::engine {

const Kernels* kernels_neon_dot() { return nullptr; }

}  // namespace fastgpt::engine

#endif
