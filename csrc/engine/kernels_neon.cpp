#include "engine/kernels.hpp"

#if defined(__aarch64__) && defined(__ARM_NEON)
#include "simd/neon_vector.hpp"

namespace fastgpt::engine {
namespace {

struct Neon : NeonBase {
  static constexpr std::size_t kIntegerRows = 4;
  static constexpr std::int32_t kDot8Offset = 0;  // dot8 subtracts the offset itself

  static Integers dot8(Integers weights, Integers inputs, Integers sum) {
    return dot(signed_bytes(weights), inputs, sum);
  }
  static Integers dot4(Integers weights, Integers inputs, Integers sum) {
    return dot(vreinterpretq_s8_s32(weights), inputs, sum);
  }

 private:
  // Multiplies to 16 bits, adds neighbouring products, which do not overflow (2 · 127²), and adds
  // these pairs to the 32-bit sums.
  static Integers dot(int8x16_t weights, Integers inputs, Integers sum) {
    const int8x16_t x = vreinterpretq_s8_s32(inputs);
    const int16x8_t low = vmull_s8(vget_low_s8(weights), vget_low_s8(x));
    return vpadalq_s16(sum, vpaddq_s16(low, vmull_high_s8(weights, x)));
  }
};

constexpr Kernels kKernels = kernels_of<Neon>();

}  // namespace

const Kernels* kernels_neon() { return &kKernels; }

}  // namespace fastgpt::engine

#else

namespace fastgpt::engine {

const Kernels* kernels_neon() { return nullptr; }

}  // namespace fastgpt::engine

#endif
