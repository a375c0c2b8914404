#include "engine/kernels.hpp"

#if defined(__AVX512VNNI__)
#include "simd/avx512_vector.hpp"

namespace fastgpt::engine {
namespace {

struct Avx512Vnni : Avx512 {
  static constexpr std::int32_t kDot8Offset = kInt8Zero;

  static Integers load_integers(const std::uint32_t* from) { return _mm512_loadu_si512(from); }
  static Integers broadcast_integer(std::int32_t x) { return _mm512_set1_epi32(x); }
  static Register to_floats(Integers x) { return _mm512_cvtepi32_ps(x); }
  static Integers dot8(Integers weights, Integers inputs, Integers sum) {
    return _mm512_dpbusd_epi32(sum, weights, inputs);
  }
  static Integers dot4(Integers weights, Integers inputs, Integers sum) {
    return _mm512_dpbusd_epi32(sum, weights, inputs);
  }
  static Integers low_nibbles(Integers x) {
    return _mm512_and_si512(x, _mm512_set1_epi32(0x0F0F0F0F));
  }
  static Integers high_nibbles(Integers x) { return low_nibbles(_mm512_srli_epi32(x, 4)); }
};

constexpr Kernels kKernels = [] {
  Kernels kernels{};
  kernels.multiply[2] = multiply<Avx512Vnni, Format::kInt8>;
  kernels.multiply[3] = multiply<Avx512Vnni, Format::kInt4>;
  return kernels;
}();

}  // namespace

const Kernels* kernels_avx512_vnni() { return &kKernels; }

}  // namespace fastgpt::engine

#else

namespace fastgpt::engine {

const Kernels* kernels_avx512_vnni() { return nullptr; }

}  // namespace fastgpt::engine

#endif
