// The matrix product's kernels in plain C++, for the instructions that every processor has.
#include "gemm_kernels.hpp"
#include "gemm_kernels_of.hpp"

namespace fastgpt {
namespace {

// Loops short enough for a compiler to make vector instructions of them.
struct Plain {
  struct Register {
    float lane[4];
  };
  static constexpr std::size_t kWidth = 4;
  static constexpr std::size_t kTileRows = 4;
  static constexpr std::size_t kTileVectors = 2;

  static Register zero() { return {}; }
  static Register load(const float* from) { return {{from[0], from[1], from[2], from[3]}}; }
  static void store(float* to, const Register& value) { std::memcpy(to, value.lane, sizeof value); }
  static Register broadcast(float value) { return {{value, value, value, value}}; }
  static Register add(Register x, const Register& y) {
    for (std::size_t i = 0; i < kWidth; ++i) x.lane[i] += y.lane[i];
    return x;
  }
  static Register multiply_add(const Register& x, const Register& y, Register z) {
    for (std::size_t i = 0; i < kWidth; ++i) z.lane[i] += x.lane[i] * y.lane[i];
    return z;
  }
  static void transpose_8x4(const float* const* rows, float* to, std::size_t stride) {
    for (std::size_t j = 0; j < 4; ++j) {
      for (std::size_t i = 0; i < 8; ++i) to[j * stride + i] = rows[i][j];
    }
  }
};

constexpr GemmKernels kKernels = Kernels<Plain>::table();

}  // namespace

const GemmKernels* gemm_kernels_portable() { return &kKernels; }

}  // namespace fastgpt
