#include "engine/kernels.hpp"

#if defined(__aarch64__) && defined(__ARM_NEON)
#include "simd/neon_vector.hpp"

namespace fastgpt::engine {
namespace {

struct Neon : NeonBase {
  static constexpr std::size_t kIntegerRows = 4;
  static constexpr std::int32_t kZeroOfDot8 = 0;  // dot8 takes it off by itself

  static Integers dot8(Integers weights, Integers inputs, Integers sum) {
    return dot(signed_bytes(weights), inputs, sum);
  }
  static Integers dot4(Integers weights, Integers inputs, Integers sum) {
    return dot(vreinterpretq_s8_s32(weights), inputs, sum);
  }

 private:
  // 16 bits with a sign hold two products.
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
