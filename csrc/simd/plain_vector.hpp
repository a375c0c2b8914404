// A vector type for any processor: what the other files implement with intrinsics, as loops over
// four lanes.
#pragma once

#include <cmath>
#include <cstring>

#include "engine/kernels_of.hpp"

namespace fastgpt::engine {
namespace {

struct Plain {
  static constexpr std::size_t kWidth = 4;
  static constexpr bool kManyRegisters = false;
  static constexpr std::size_t kFloatRows = 2, kIntegerRows = 1, kPanelRows = 2;
  static constexpr std::int32_t kDot8Offset = kInt8Zero;
  struct Register {
    float lane[kWidth];
  };
  struct Integers {
    std::uint32_t lane[kWidth];  // unsigned, so that sums may wrap around as in registers
  };

  static Register zero() { return {}; }
  static Register load(const void* from) {
    Register value;
    std::memcpy(value.lane, from, sizeof value);
    return value;
  }
  static void store(float* to, const Register& value) { std::memcpy(to, value.lane, sizeof value); }
  static Register broadcast(float x) { return {{x, x, x, x}}; }
  static Register add(Register x, const Register& y) {
    for (std::size_t i = 0; i < kWidth; ++i) x.lane[i] += y.lane[i];
    return x;
  }
  static Register multiply(Register x, const Register& y) {
    for (std::size_t i = 0; i < kWidth; ++i) x.lane[i] *= y.lane[i];
    return x;
  }
  static Register multiply_add(const Register& x, const Register& y, Register sum) {
    for (std::size_t i = 0; i < kWidth; ++i) sum.lane[i] += x.lane[i] * y.lane[i];
    return sum;
  }
  static Register multiply_pairs(const Register& x, const Register& y, Register sum) {
    for (std::size_t i = 0; i < kWidth; ++i) {
      const std::uint32_t a = unsigned_bits(x.lane[i]), b = unsigned_bits(y.lane[i]);
      sum.lane[i] += to_float32(static_cast<Bfloat16>(a)) * to_float32(static_cast<Bfloat16>(b));
      sum.lane[i] +=
          to_float32(static_cast<Bfloat16>(a >> 16)) * to_float32(static_cast<Bfloat16>(b >> 16));
    }
    return sum;
  }
  static Register load_narrow(const void* from) {
    Bfloat16 narrow[kWidth];
    std::memcpy(narrow, from, sizeof narrow);
    return {{to_float32(narrow[0]), to_float32(narrow[1]), to_float32(narrow[2]),
             to_float32(narrow[3])}};
  }
  static float square_root(float x) { return std::sqrt(x); }

  static Integers load_integers(const std::uint32_t* from) {
    return {{from[0], from[1], from[2], from[3]}};
  }
  static Integers broadcast_integer(std::int32_t x) {
    const auto bits = static_cast<std::uint32_t>(x);
    return {{bits, bits, bits, bits}};
  }
  static Register to_floats(const Integers& x) {
    Register value;
    for (std::size_t i = 0; i < kWidth; ++i) {
      value.lane[i] = static_cast<float>(static_cast<std::int32_t>(x.lane[i]));
    }
    return value;
  }
  // Each lane holds four bytes: weights are unsigned, inputs signed.
  static Integers dot8(const Integers& weights, const Integers& inputs, Integers sum) {
    for (std::size_t i = 0; i < kWidth; ++i) {
      for (std::uint32_t shift = 0; shift < 32; shift += 8) {
        const auto weight = static_cast<std::uint8_t>(weights.lane[i] >> shift);
        const auto input = static_cast<std::int8_t>(inputs.lane[i] >> shift);
        sum.lane[i] += static_cast<std::uint32_t>(weight * input);
      }
    }
    return sum;
  }
  static Integers dot4(const Integers& weights, const Integers& inputs, const Integers& sum) {
    return dot8(weights, inputs, sum);
  }
  static Integers low_nibbles(Integers x) {
    for (std::uint32_t& lane : x.lane) lane &= 0x0F0F0F0FU;
    return x;
  }
  static Integers high_nibbles(Integers x) {
    for (std::uint32_t& lane : x.lane) lane = lane >> 4 & 0x0F0F0F0FU;
    return x;
  }
};

}  // namespace
}  // namespace fastgpt::engine
