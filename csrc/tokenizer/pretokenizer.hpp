// Cuts text into the pieces that byte-pair encoding then works on one by one, as GPT-2 does.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace fastgpt {

// Where pieces end, in order, as offsets into the text.
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

// Whether a piece starts at text[at], whatever precedes and follows: at white space after what is
// none. Both are looked for in ASCII only, where one byte tells.
bool starts_piece(std::string_view text, std::size_t at);

// Returns the first such place that is at `at` or after it, but not at the text's start; or the
// text's end.
std::size_t find_start(std::string_view text, std::size_t at);

// Cuts one text, some kilobytes at a time. The pieces are those that GPT-2's pattern matches one
// after the other,
//
//   '(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
//
// with the classes of the Unicode version that unicode_tables.inc names. The text is UTF-8; a byte
// that is not part of a valid character counts as one character of the class [^\s\p{L}\p{N}], so
// every byte lies in exactly one piece whatever the text. Time: linear.
//
// How it works (after simdjson, Langdale & Lemire 2019): 64 bytes at a time are turned into one
// 64-bit mask a class, and shifts and ands of the masks find every place where a piece starts.
class Pretokenizer {
 public:
  // The text must outlive the pretokenizer. `vectorized`: use the processor's wide registers where
  // there are any; the pieces are the same.
  explicit Pretokenizer(std::string_view text, bool vectorized = true);

  // Returns the ends of the next pieces, none once the text is through. They stay valid until the
  // next call.
  Ends next();

  // The classes of 64 bytes, a bit a byte, the first byte lowest. All bytes of a character have the
  // class of the character; what is in no class is [^\s\p{L}\p{N}].
  struct Block {
    std::uint64_t letters = 0;
    std::uint64_t numbers = 0;
    std::uint64_t spaces = 0;       // \s
    std::uint64_t blanks = 0;       // the plain space, which joins the word that follows
    std::uint64_t apostrophes = 0;  // may begin a contraction
    std::uint64_t wide_spaces = 0;  // \s of more than one byte
    std::uint64_t spaces_of_2 = 0;  // the first bytes of those of two
    std::uint64_t spaces_of_3 = 0;  // and of three
  };

 private:
  static constexpr std::size_t kBlock = 64;
  static constexpr std::size_t kEnds = 1024;  // found by one call of next(): 8 KB, to stay in cache

  template <typename Isa>
  std::size_t cut();
  std::size_t cut_with_avx2();
  template <typename Isa>
  Block classify(std::size_t at);
  void classify_wide(std::size_t at, std::uint64_t leads, Block& block);
  std::uint64_t starts(const Block& next);
  std::uint64_t join_contractions(std::uint64_t starts);

  std::string_view text_;
  bool vectorized_;
  std::size_t at_ = 0;  // the first byte of current_
  Block previous_;      // of which only the last byte counts
  Block current_;
  Block spill_;  // what the last character of the block classified last puts into the next one
  bool has_spill_ = false;
  std::uint64_t joined_ = 0;        // places in current_ that continue a contraction,
  std::uint64_t after_joined_ = 0;  // and the place after one, where a piece starts
  std::array<std::size_t, kEnds> ends_;
};

}  // namespace fastgpt
