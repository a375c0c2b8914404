// The GEMM kernels in portable C++. The bfloat16 kernels are slower than those for fp32; they exist
// for tests.
#include "training/gemm_kernels.hpp"
#include "training/gemm_kernels_of.hpp"

namespace fastgpt {
namespace {

// A vector of four floats, with loops that are short enough for compilers to vectorize.
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

struct PlainBf16 : Plain {
  static Register multiply_add(const Register& x, const Register& y, Register z) {
    using Words = PairPacking<PlainBf16>;
    for (std::size_t i = 0; i < kWidth; ++i) {
      z.lane[i] += Words::first(x.lane[i]) * Words::first(y.lane[i]);
      z.lane[i] += Words::second(x.lane[i]) * Words::second(y.lane[i]);
    }
    return z;
  }
  template <std::size_t n, typename Number>
  static void pack_words(const Number* row, const Number* next, float* to) {
    for (std::size_t i = 0; i < n; ++i) {
      to[i] = word_of(to_float32(row[i]), next == nullptr ? 0.0F : to_float32(next[i]));
    }
  }
  template <typename Number>
  static void transpose_8x4(const Number* const* rows, float* to, std::size_t stride) {
    for (std::size_t j = 0; j < 4; ++j) {
      for (std::size_t i = 0; i < 8; ++i) {
        to[j * stride + i] = word_of(to_float32(rows[i][2 * j]), to_float32(rows[i][2 * j + 1]));
      }
    }
  }
};

constexpr GemmKernels kKernels = Kernels<Plain>::table();
constexpr GemmKernels kBf16Kernels = Kernels<PlainBf16, PairPacking<PlainBf16>>::table();

}  // namespace

const GemmKernels* gemm_kernels_portable() { return &kKernels; }
const GemmKernels* gemm_kernels_bf16_portable() { return &kBf16Kernels; }

}  // namespace fastgpt
