// A short piece as two words, which compare and hash in a few instructions.
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

// A piece of up to 16 bytes in two words, with zeros behind it.
struct PieceKey {
  std::uint64_t low;
  std::uint64_t high;

  static constexpr std::size_t kMaxSize = 16;

  // Reads all of 16 bytes, though the piece may have less.
  static PieceKey load(const char* piece, std::size_t size) {
    return {word(piece) & kMasks[size + 8], word(piece + 8) & kMasks[size]};
  }

  // Reads no more than the piece.
  static PieceKey load_exactly(std::string_view piece) {
    const std::size_t size = piece.size();
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
    const std::uint64_t mixed = low ^ high * 0xC2B2AE3D27D4EB4F;  // odd and random
    return mixed * 0x9E3779B97F4A7C15;                            // the high bits are the good ones
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

  // kMasks[n + 8] keeps the first n bytes of a word: none for n <= 0, all for n >= 8.
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

// The hash of any bytes; of up to 16, that of their key.
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

// Returns the key of text[at : at + size], which has at most 16 bytes.
inline PieceKey key_at(std::string_view text, std::size_t at, std::size_t size) {
  if (text.size() - at >= PieceKey::kMaxSize) return PieceKey::load(text.data() + at, size);
  return PieceKey::load_exactly(text.substr(at, size));
}

}  // namespace fastgpt
