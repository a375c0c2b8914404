// Short pieces packed into two 64-bit words, which compare and hash in a few instructions.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace fastgpt {

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "pieces are packed into words on the assumption that the first byte is the lowest"
#endif

// A piece of up to 16 bytes in two words, zero-padded: the first byte is the lowest of `low`.
// Pieces that differ only in trailing NUL bytes have equal keys, so the size must be compared as
// well.
struct PieceKey {
  std::uint64_t low;
  std::uint64_t high;

  static constexpr std::size_t kMaxSize = 16;

  // Loads the key of a piece of `size` bytes. Reads 16 bytes regardless of the size.
  static PieceKey load(const char* piece, std::size_t size) {
    return {word(piece) & kMasks[size + 8], word(piece + 8) & kMasks[size]};
  }

  // Loads the key of a piece without reading beyond its end: larger pieces with two loads that
  // overlap, smaller ones byte by byte.
  static PieceKey load_exactly(std::string_view piece) {
    const std::size_t size = piece.size();
    // The word of the last 8 bytes overlaps the first one; the shift drops the bytes they share.
    if (size > 8) return {word(piece.data()), word(piece.data() + size - 8) >> 8 * (16 - size)};
    if (size >= 4) {
      const std::uint64_t last = half_word(piece.data() + size - 4);
      return {half_word(piece.data()) | last << 8 * (size - 4), 0};
    }
    PieceKey key{0, 0};
    for (std::size_t i = size; i > 0; --i) {
      key.low = key.low << 8 | static_cast<unsigned char>(piece[i - 1]);
    }
    return key;
  }

  bool operator==(PieceKey other) const { return low == other.low && high == other.high; }

  std::uint64_t hash() const {
    const std::uint64_t mixed = low ^ high * 0xC2B2AE3D27D4EB4F;  // an arbitrary odd number
    return mixed * 0x9E3779B97F4A7C15;  // multiplicative hashing: use the high bits of the result
  }

 private:
  static std::uint64_t word(const char* bytes) {
    std::uint64_t word;
    std::memcpy(&word, bytes, sizeof word);
    return word;
  }
  static std::uint64_t half_word(const char* bytes) {
    std::uint32_t word;
    std::memcpy(&word, bytes, sizeof word);
    return word;
  }

  // kMasks[n + 8] keeps the first n bytes of a word: none for n <= 0, all for n >= 8. load() uses n
  // = size for the low word and n = size - 8 for the high word.
  static constexpr std::array<std::uint64_t, 25> make_masks() {
    std::array<std::uint64_t, 25> masks{};
    for (std::size_t i = 0; i < masks.size(); ++i) {
      for (std::size_t byte = 0; byte < 8 && byte + 8 < i; ++byte) {
        masks[i] |= std::uint64_t{0xFF} << 8 * byte;
      }
    }
    return masks;
  }
  static const std::array<std::uint64_t, 25> kMasks;
};

inline constexpr std::array<std::uint64_t, 25> PieceKey::kMasks = PieceKey::make_masks();

// Returns the hash of any byte string; for up to 16 bytes, the hash of its key. Longer strings are
// hashed in blocks of 16 bytes, of which the last one may overlap the one before it.
inline std::uint64_t hash_of(std::string_view bytes) {
  constexpr std::size_t kBlock = PieceKey::kMaxSize;
  if (bytes.size() <= kBlock) return PieceKey::load_exactly(bytes).hash();
  std::uint64_t hash = bytes.size();
  const auto mix = [&](std::size_t at) {
    hash = (PieceKey::load(bytes.data() + at, kBlock).hash() ^ hash >> 29) * 0x9E3779B97F4A7C15;
  };
  for (std::size_t at = 0; at + kBlock < bytes.size(); at += kBlock) mix(at);
  mix(bytes.size() - kBlock);
  return hash;
}

// Returns the key of text[at : at + size], with size <= 16.
inline PieceKey key_at(std::string_view text, std::size_t at, std::size_t size) {
  if (text.size() - at >= PieceKey::kMaxSize) return PieceKey::load(text.data() + at, size);
  return PieceKey::load_exactly(text.substr(at, size));
}

}  // namespace fastgpt
