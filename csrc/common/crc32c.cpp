// A CRC is the remainder of the message, taken as a polynomial over GF(2), divided by a fixed
// polynomial. Words are bit-reflected: bit 31 - i is the coefficient of x^i, so the lowest bit of a
// byte, which comes first, has the highest power.
#include "common/crc32c.hpp"

#include <array>

#include "common/processor.hpp"

#if defined(FASTGPT_X86)
#include <nmmintrin.h>

#include <cstring>
#endif

namespace fastgpt {

namespace {

constexpr std::uint32_t kPolynomial = 0x82F63B78;  // without its x^32 term

// Returns a polynomial times x, modulo the CRC polynomial.
constexpr std::uint32_t times_x(std::uint32_t a) {
  return (a >> 1U) ^ ((a & 1U) != 0 ? kPolynomial : 0U);
}

using Tables = std::array<std::array<std::uint32_t, 256>, 8>;

// tables[k][b] is the contribution of a byte b to the CRC if k more bytes follow it.
constexpr Tables make_tables() {
  Tables tables{};
  for (std::uint32_t byte = 0; byte < 256; ++byte) {
    std::uint32_t crc = byte;
    for (auto& table : tables) {
      for (int bit = 0; bit < 8; ++bit) crc = times_x(crc);
      table[byte] = crc;
    }
  }
  return tables;
}

constexpr Tables kTables = make_tables();

std::uint32_t byte_at(const unsigned char* from, std::size_t i) { return from[i]; }

// Processes eight bytes per step with eight tables ("slicing-by-8"): Kounavis and Berry, "Novel
// Table Lookup-Based Algorithms for High-Performance CRC Generation", 2008.
std::uint32_t update_portable(std::uint32_t crc, const unsigned char* data, std::size_t size) {
  const Tables& t = kTables;
  for (; size >= 8; data += 8, size -= 8) {
    crc ^= byte_at(data, 0) | byte_at(data, 1) << 8U | byte_at(data, 2) << 16U |
           byte_at(data, 3) << 24U;
    crc = t[7][crc & 255U] ^ t[6][crc >> 8U & 255U] ^ t[5][crc >> 16U & 255U] ^ t[4][crc >> 24U] ^
          t[3][data[4]] ^ t[2][data[5]] ^ t[1][data[6]] ^ t[0][data[7]];
  }
  for (; size > 0; ++data, --size) crc = (crc >> 8U) ^ t[0][(crc ^ *data) & 255U];
  return crc;
}

#if defined(FASTGPT_X86)

// The crc32 instruction has a throughput of one per cycle but a latency of three cycles. Therefore
// three independent streams, which are consecutive stretches of the data, are computed interleaved.
// Their CRCs are then combined: since the CRC is linear, the CRC of A followed by B is that of A
// followed by zeros (append_zero_stream) XOR that of B.
constexpr std::size_t kStream = 4096;  // bytes per stream

// Returns the product of two polynomials modulo the CRC polynomial.
constexpr std::uint32_t product(std::uint32_t a, std::uint32_t b) {
  std::uint32_t sum = 0;
  for (std::uint32_t bit = 1U << 31U; bit != 0; bit >>= 1U) {  // x^0, x^1, ...
    if ((a & bit) != 0) sum ^= b;
    b = times_x(b);
  }
  return sum;
}

// Returns x^exponent modulo the CRC polynomial, by repeated squaring.
constexpr std::uint32_t power_of_x(std::size_t exponent) {
  std::uint32_t result = 1U << 31U;  // x^0
  std::uint32_t square = 1U << 30U;  // x^1
  for (; exponent != 0; exponent >>= 1U) {
    if ((exponent & 1U) != 0) result = product(result, square);
    square = product(square, square);
  }
  return result;
}

// Returns the CRC after kStream zero bytes, which multiply it by x^(8 * kStream).
std::uint32_t append_zero_stream(std::uint32_t crc) {
  constexpr std::uint32_t kShift = power_of_x(8 * kStream);
  return product(kShift, crc);
}

std::uint64_t word_at(const unsigned char* from) {
  std::uint64_t word = 0;
  std::memcpy(&word, from, sizeof word);
  return word;
}

__attribute__((target("sse4.2"))) std::uint32_t update_sse42(std::uint32_t crc,
                                                             const unsigned char* data,
                                                             std::size_t size) {
  std::uint64_t first = crc;
  for (; size >= 3 * kStream; data += 3 * kStream, size -= 3 * kStream) {
    std::uint64_t second = 0;
    std::uint64_t third = 0;
    for (const unsigned char* at = data; at != data + kStream; at += 8) {
      first = _mm_crc32_u64(first, word_at(at));
      second = _mm_crc32_u64(second, word_at(at + kStream));
      third = _mm_crc32_u64(third, word_at(at + 2 * kStream));
    }
    const auto both =
        append_zero_stream(static_cast<std::uint32_t>(first)) ^ static_cast<std::uint32_t>(second);
    first = append_zero_stream(both) ^ third;
  }
  for (; size >= 8; data += 8, size -= 8) first = _mm_crc32_u64(first, word_at(data));
  crc = static_cast<std::uint32_t>(first);
  for (; size > 0; ++data, --size) crc = _mm_crc32_u8(crc, *data);
  return crc;
}

#endif

}  // namespace

std::uint32_t crc32c(const unsigned char* data, std::size_t size, std::uint32_t initial,
                     [[maybe_unused]] bool hardware) {
#if defined(FASTGPT_X86)
  if (hardware && processor().sse42) return ~update_sse42(~initial, data, size);
#endif
  return ~update_portable(~initial, data, size);
}

}  // namespace fastgpt
