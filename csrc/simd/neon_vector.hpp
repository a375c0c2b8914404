// The vector types for 64-bit ARM, without and with the dot product of bytes. See plain_vector.hpp
// for their members.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

namespace fastgpt {
namespace {

struct Neon {
  using Register = float32x4_t;
  using Integers = int32x4_t;
  static constexpr std::size_t kWidth = 4;
  static constexpr std::size_t kRegisters = 32;
  static constexpr std::int32_t kDot8Offset = 0;

  static Register zero() { return vdupq_n_f32(0.0F); }
  static Register load(const void* from) { return vld1q_f32(static_cast<const float*>(from)); }
  static void store(float* to, Register value) { vst1q_f32(to, value); }
  static Register broadcast(const float& from) { return vld1q_dup_f32(&from); }
  static Register add(Register x, Register y) { return vaddq_f32(x, y); }
  static Register multiply(Register x, Register y) { return vmulq_f32(x, y); }
  static Register multiply_add(Register x, Register y, Register sum) {
    return vfmaq_f32(sum, x, y);
  }
  static Register multiply_pairs(Register x, Register y, Register sum) {
    return vfmaq_f32(vfmaq_f32(sum, first(x), first(y)), second(x), second(y));
  }
  static Register load_narrow(const void* from) {
    const uint16x4_t narrow = vld1_u16(static_cast<const std::uint16_t*>(from));
    return vreinterpretq_f32_u32(vshll_n_u16(narrow, 16));
  }
  static float square_root(float x) { return vget_lane_f32(vsqrt_f32(vdup_n_f32(x)), 0); }

  static Integers load_integers(const std::uint32_t* from) {
    return vreinterpretq_s32_u32(vld1q_u32(from));
  }
  static Integers broadcast_integer(const std::int32_t& from) { return vld1q_dup_s32(&from); }
  static Register to_floats(Integers x) { return vcvtq_f32_s32(x); }
  static Integers dot8(Integers weights, Integers inputs, Integers sum) {
    return dot(signed_bytes(weights), inputs, sum);
  }
  static Integers dot4(Integers weights, Integers inputs, Integers sum) {
    return dot(vreinterpretq_s8_s32(weights), inputs, sum);
  }
  static Integers low_nibbles(Integers x) {
    return vreinterpretq_s32_u8(vandq_u8(vreinterpretq_u8_s32(x), vdupq_n_u8(15)));
  }
  static Integers high_nibbles(Integers x) {
    return vreinterpretq_s32_u8(vshrq_n_u8(vreinterpretq_u8_s32(x), 4));
  }

 protected:
  // Flipping the top bit of a byte subtracts 128.
  static int8x16_t signed_bytes(Integers weights) {
    return vreinterpretq_s8_u8(veorq_u8(vreinterpretq_u8_s32(weights), vdupq_n_u8(128)));
  }

 private:
  // Multiplies to 16 bits, adds neighboring products, which do not overflow (2 · 127²), and adds
  // these pairs to the 32-bit sums.
  static Integers dot(int8x16_t weights, Integers inputs, Integers sum) {
    const int8x16_t x = vreinterpretq_s8_s32(inputs);
    const int16x8_t low = vmull_s8(vget_low_s8(weights), vget_low_s8(x));
    return vpadalq_s16(sum, vpaddq_s16(low, vmull_high_s8(weights, x)));
  }
  // The two bfloat16 numbers of each 32-bit lane as floats: the low half is shifted up, the high
  // half only needs the low bits cleared.
  static Register first(Register pair) {
    return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_f32(pair), 16));
  }
  static Register second(Register pair) {
    return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_f32(pair), vdupq_n_u32(0xFFFF0000U)));
  }
};

#if defined(__ARM_FEATURE_DOTPROD)
struct NeonDot : Neon {
  static Integers dot8(Integers weights, Integers inputs, Integers sum) {
    return vdotq_s32(sum, signed_bytes(weights), vreinterpretq_s8_s32(inputs));
  }
  static Integers dot4(Integers weights, Integers inputs, Integers sum) {
    return vdotq_s32(sum, vreinterpretq_s8_s32(weights), vreinterpretq_s8_s32(inputs));
  }
};
#endif

}  // namespace
}  // namespace fastgpt
