// The vector type `Plain`, for any processor: what the other files of this folder implement with
// intrinsics, as loops over four lanes.
//
// A vector type consists of static functions for one instruction set. The matrix products and the
// engine's kernels are templates over it; each file that instantiates them is compiled for the
// instruction set, and so everything has internal linkage. The members of a vector type:
//
//   Register, Integers       a register of kWidth floats, or of kWidth 32-bit integers
//   kWidth, kRegisters       the number of lanes, and of registers
//   zero, load, store, broadcast, add, multiply, multiply_add        on floats
//   multiply_pairs(x, y, sum)   on lanes that hold two bfloat16 numbers (see bfloat16_pair): adds
//                            the product of the first ones, then that of the second ones
//   load_narrow              loads kWidth bfloat16 numbers as floats
//   square_root              of a single float
//   transpose_8x4(rows, to, stride)  sets to[j * stride + i] = rows[i][j] for i < 8 and j < 4, in
//                            the order of j: a row of `to` may overlap the next one
//   load_integers, broadcast_integer, to_floats      on integers
//   dot8, dot4(weights, inputs, sum)   on lanes of four bytes: add the four products to the lane's
//                            sum. Inputs are signed, from -127 to 127. Weights are unsigned: for
//                            dot4 from 0 to 15, for dot8 from 1 to 255, with 128 added to them
//   kDot8Offset              what dot8 leaves added to the weights: 128, or 0 if it subtracts it
//   low_nibbles, high_nibbles          the halves of each byte, as bytes
//
// Not every type has all of them: Avx512 and Avx512Bf16 have no operations on integers, Avx512Vnni
// none on pairs of its own, and the types for NEON no transpose_8x4.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/bfloat16.hpp"

namespace fastgpt {
namespace {

struct Plain {
  static constexpr std::size_t kWidth = 4;
  static constexpr std::size_t kRegisters = 16;  // of most processors
  static constexpr std::int32_t kDot8Offset = 128;
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
      sum.lane[i] += first_of_pair(x.lane[i]) * first_of_pair(y.lane[i]);
      sum.lane[i] += second_of_pair(x.lane[i]) * second_of_pair(y.lane[i]);
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
  static void transpose_8x4(const float* const* rows, float* to, std::size_t stride) {
    for (std::size_t j = 0; j < 4; ++j) {
      for (std::size_t i = 0; i < 8; ++i) to[j * stride + i] = rows[i][j];
    }
  }

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
}  // namespace fastgpt
