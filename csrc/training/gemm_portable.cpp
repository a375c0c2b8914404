// The bfloat16 kernels in portable code are slower than those for fp32; they exist for tests.
#include "simd/plain_vector.hpp"
#include "training/gemm_templates.hpp"

namespace fastgpt {
namespace {

// Packing of pairs of depths: see PairPacking.
struct Pairs {
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

}  // namespace

constexpr GemmKernels kGemmPortable = Kernels<Plain, 4, 2>::table();
constexpr GemmKernels kGemmBf16Portable = Kernels<Plain, 4, 2, PairPacking<Pairs>>::table();

}  // namespace fastgpt
