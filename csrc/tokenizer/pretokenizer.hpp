// Pre-tokenization: splits text into the pieces (words, numbers, punctuation, white space) of
// GPT-2, which byte-pair encoding then encodes independently of each other.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace fastgpt {

// A view of the ends of pieces: byte offsets into the text, in ascending order.
class Ends {
 public:
  Ends(const std::size_t* data, std::size_t count) : data_(data), count_(count) {}

  bool empty() const { return count_ == 0; }
  std::size_t size() const { return count_; }
  const std::size_t* begin() const { return data_; }
  const std::size_t* end() const { return data_ + count_; }

 private:
  const std::size_t* data_;
  std::size_t count_;
};

// Returns whether a piece is guaranteed to start at text[at], regardless of the text before and
// after: true for ASCII white space that follows an ASCII character other than white space. Only
// ASCII is considered, because there a single byte determines the class. Requires at >= 1.
bool starts_piece(std::string_view text, std::size_t at);

// Returns the first offset >= max(at, 1) at which starts_piece() holds, or the size of the text if
// there is none.
std::size_t find_start(std::string_view text, std::size_t at);

// Splits the text into at most `threads` parts of about the same size, so that processing them on
// as many threads gives the pieces of the whole: each part starts where a piece is guaranteed to
// start. A part has about kMinPart bytes or more, some hundred microseconds of work, which is worth
// the cost of starting a thread.
constexpr std::size_t kMinPart = std::size_t{1} << 18;
std::vector<std::string_view> split_for_threads(std::string_view text, std::size_t threads);

// Splits one text incrementally, some kilobytes per call. The pieces are the successive matches of
// GPT-2's pattern,
//
//   '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//
// with the character classes of the Unicode version given in unicode_tables.inc. The text is
// expected to be UTF-8; a byte that is not part of a valid character is treated as one character of
// the class [^\s\p{L}\p{N}], so every byte belongs to exactly one piece for any input. Runs in
// linear time.
//
// Algorithm (after simdjson, Langdale & Lemire 2019): the text is processed in blocks of 64 bytes.
// Each block is classified into 64-bit masks, one mask per character class and one bit per byte.
// Shifting a mask by one aligns each byte with its neighbor, so that a few shifts and bitwise
// operations find the starts of all pieces in the block, without a branch per byte. Bits that a
// shift moves across a block boundary come from the previous or the next block.
class Pretokenizer {
 public:
  // The text must outlive the pretokenizer. `vectorized` enables AVX2 where the processor supports
  // it; the pieces are the same.
  explicit Pretokenizer(std::string_view text, bool vectorized = true);

  // Returns the ends of the next pieces; empty at the end of the text. Valid until the next call.
  Ends next();

  // The character classes of 64 bytes: bit i of each mask describes byte i. All bytes of a
  // multi-byte character have the class of the character. Bytes in none of letters, numbers and
  // spaces have the class [^\s\p{L}\p{N}].
  struct Block {
    std::uint64_t letters = 0;           // \p{L}
    std::uint64_t numbers = 0;           // \p{N}
    std::uint64_t spaces = 0;            // \s
    std::uint64_t blanks = 0;            // U+0020, which is joined to the word after it
    std::uint64_t apostrophes = 0;       // possible starts of contractions
    std::uint64_t multibyte_spaces = 0;  // all bytes of multi-byte \s
    std::uint64_t spaces_of_2 = 0;       // first bytes of \s of two bytes
    std::uint64_t spaces_of_3 = 0;       // first bytes of \s of three bytes
  };

 private:
  static constexpr std::size_t kBlock = 64;
  static constexpr std::size_t kEnds = 1024;  // capacity of ends_: 8 KB, which fits in L1 cache

  template <typename Isa>
  std::size_t cut();
  std::size_t find_ends_avx2();
  template <typename Isa>
  Block classify(std::size_t at);
  void classify_multibyte(std::size_t at, std::uint64_t leads, Block& block);
  std::uint64_t starts(const Block& next);
  std::uint64_t join_contractions(std::uint64_t starts);

  std::string_view text_;
  bool vectorized_;
  std::size_t at_ = 0;  // offset of the first byte of current_
  Block previous_;      // the block before current_; only its last byte (bit 63) is used
  Block current_;
  // The classes of those bytes of the next block to be classified that belong to a multi-byte
  // character which starts in the block classified last.
  Block spill_;
  bool has_spill_ = false;
  // State carried over from a contraction that crosses the end of the previous block: bits of
  // current_ that continue it, and the bit after it, where a piece starts.
  std::uint64_t joined_ = 0;
  std::uint64_t after_joined_ = 0;
  std::array<std::size_t, kEnds> ends_;
};

}  // namespace fastgpt
