// Bit operations on 64-bit words, and the bits of floats.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace fastgpt {

// Returns the index of the lowest set bit. Requires bits != 0.
inline unsigned lowest_bit(std::uint64_t bits) {
#if defined(__GNUC__)
  return static_cast<unsigned>(__builtin_ctzll(bits));
#else
  unsigned place = 0;
  for (; (bits & 1) == 0; bits >>= 1) ++place;
  return place;
#endif
}

// Returns the index of the highest set bit. Requires bits != 0.
inline unsigned highest_bit(std::uint64_t bits) {
#if defined(__GNUC__)
  return 63U - static_cast<unsigned>(__builtin_clzll(bits));
#else
  unsigned place = 0;
  while ((bits >>= 1) != 0) ++place;
  return place;
#endif
}

// Returns the number of set bits.
inline std::size_t count_bits(std::uint64_t bits) {
#if defined(__GNUC__)
  return static_cast<std::size_t>(__builtin_popcountll(bits));
#else
  std::size_t count = 0;
  for (; bits != 0; bits &= bits - 1) ++count;
  return count;
#endif
}

// Internal linkage, because files that are compiled for different instruction sets use these
// functions, and the linker would otherwise keep one copy for all of them. The calls of memcpy
// compile to register moves.
namespace {

inline std::int32_t bits_of(float x) {
  std::int32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline std::uint32_t unsigned_bits(float x) { return static_cast<std::uint32_t>(bits_of(x)); }

template <typename Bits>
inline float float_of(Bits bits) {
  float x;
  static_assert(sizeof bits == sizeof x);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

}  // namespace
}  // namespace fastgpt
