#include "tokenizer/pretokenizer.hpp"

#include <algorithm>
#include <cstring>

#include "common/bits.hpp"
#include "common/processor.hpp"

#if defined(FASTGPT_HAS_AVX2)
#include <immintrin.h>
#endif

namespace fastgpt {
namespace {

using Block = Pretokenizer::Block;

enum class CharClass : std::uint8_t { kOther, kLetter, kNumber, kSpace };

struct ClassRange {
  std::uint32_t first;
  std::uint32_t last;
  CharClass char_class;
};

constexpr ClassRange kRanges[] = {
#include "tokenizer/unicode_tables.inc"
};

// One byte a code point up to the last that has a class: a single load tells the class, and a text
// touches only the few cache lines of its own scripts.
class ClassTable {
 public:
  ClassTable() {
    for (const ClassRange& range : kRanges) {
      std::fill(classes_.begin() + range.first, classes_.begin() + range.last + 1,
                range.char_class);
    }
  }

  CharClass operator[](std::uint32_t code_point) const {
    return code_point < classes_.size() ? classes_[code_point] : CharClass::kOther;
  }

 private:
  std::array<CharClass, std::end(kRanges)[-1].last + 1> classes_{};
};

// Filled when the module is loaded and only read after that.
const ClassTable kClasses;

struct Char {
  CharClass char_class;
  unsigned size;  // in bytes
};

// The first bytes of characters of more than one byte. (0xC0 and 0xC1 would start an overlong form
// of an ASCII character, those above 0xF4 a number beyond U+10FFFF.)
constexpr unsigned kFirstLead = 0xC2;
constexpr unsigned kLastLead = 0xF4;

// Reads the character whose first byte, one of these, is the lowest of `bytes`.
inline Char multibyte_char(std::uint32_t bytes) {
  const auto bits = [&](unsigned byte, std::uint32_t mask) { return bytes >> 8 * byte & mask; };
  if ((bytes & 0xC0E0) == 0x80C0) return {kClasses[bits(0, 0x1F) << 6 | bits(1, 0x3F)], 2};
  if ((bytes & 0xC0C0F0) == 0x8080E0) {
    const std::uint32_t point = bits(0, 0x0F) << 12 | bits(1, 0x3F) << 6 | bits(2, 0x3F);
    // Surrogates and numbers past U+10FFFF, invalid too, need no check: no class is theirs either.
    if (point >= 0x800) return {kClasses[point], 3};
  } else if ((bytes & 0xC0C0C0F8) == 0x808080F0) {
    const std::uint32_t point =
        bits(0, 0x07) << 18 | bits(1, 0x3F) << 12 | bits(2, 0x3F) << 6 | bits(3, 0x3F);
    if (point >= 0x10000) return {kClasses[point], 4};
  }
  return {CharClass::kOther, 1};
}

// The four bytes at text[at], the first one lowest, with zeros beyond the end.
inline std::uint32_t four_bytes_at(std::string_view text, std::size_t at) {
  std::uint32_t bytes = 0;
  if (text.size() - at >= sizeof bytes) {
    std::memcpy(&bytes, text.data() + at, sizeof bytes);
    return bytes;
  }
  for (std::size_t i = text.size(); i > at; --i) {
    bytes = bytes << 8 | static_cast<unsigned char>(text[i - 1]);
  }
  return bytes;
}

// Returns the length of the contraction ('s 'd 'm 't 'll 've 're) whose apostrophe is text[begin],
// or 0.
unsigned contraction_size(std::string_view text, std::size_t begin) {
  const std::string_view rest = text.substr(begin + 1, 2);
  if (rest.empty()) return 0;
  if (rest[0] == 's' || rest[0] == 'd' || rest[0] == 'm' || rest[0] == 't') return 2;
  return rest == "ll" || rest == "ve" || rest == "re" ? 3 : 0;
}

// Classifies 64 bytes as far as each byte alone allows, and returns which are the first of a longer
// character.
struct Portable {
  static unsigned lowest_or_any(std::uint64_t bits) {
    return lowest_bit(bits | std::uint64_t{1} << 63);
  }

  static std::uint64_t classify(const char* bytes, Block& block) {
    std::uint64_t leads = 0;
    for (unsigned i = 0; i < 64; ++i) {
      const auto byte = static_cast<unsigned char>(bytes[i]);
      const std::uint64_t letter = static_cast<unsigned char>((byte | 0x20U) - 'a') < 26;
      const std::uint64_t number = static_cast<unsigned char>(byte - '0') < 10;
      const std::uint64_t blank = byte == ' ';
      const std::uint64_t control = static_cast<unsigned char>(byte - '\t') < 5;
      block.letters |= letter << i;
      block.numbers |= number << i;
      block.blanks |= blank << i;
      block.spaces |= (blank | control) << i;
      block.apostrophes |= std::uint64_t{byte == '\''} << i;
      leads |= std::uint64_t{byte >= kFirstLead && byte <= kLastLead} << i;
    }
    return leads;
  }
};

#if defined(FASTGPT_HAS_AVX2)
struct Avx2 {
  FASTGPT_AVX2 static std::uint64_t lowest_or_any(std::uint64_t bits) { return _tzcnt_u64(bits); }

  FASTGPT_AVX2 static std::uint64_t classify(const char* bytes, Block& block) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32));
    block.letters = below(lower(low), lower(high), 'a', 26);
    block.numbers = below(low, high, '0', 10);
    block.blanks = below(low, high, ' ', 1);
    block.spaces = block.blanks | below(low, high, '\t', 5);
    block.apostrophes = below(low, high, '\'', 1);
    return below(low, high, static_cast<char>(kFirstLead), kLastLead - kFirstLead + 1);
  }

 private:
  FASTGPT_AVX2 static __m256i lower(__m256i bytes) {
    return _mm256_or_si256(bytes, _mm256_set1_epi8(0x20));
  }

  // Which bytes are at least `first` and less than `first + count`.
  FASTGPT_AVX2 static std::uint64_t below(__m256i low, __m256i high, char first, char count) {
    return mask(below(low, first, count), below(high, first, count));
  }

  FASTGPT_AVX2 static __m256i below(__m256i bytes, char first, char count) {
    const __m256i above = _mm256_sub_epi8(bytes, _mm256_set1_epi8(first));
    const __m256i last = _mm256_set1_epi8(static_cast<char>(count - 1));
    return _mm256_cmpeq_epi8(_mm256_min_epu8(above, last), above);
  }

  FASTGPT_AVX2 static std::uint64_t mask(__m256i low, __m256i high) {
    const auto bits = static_cast<std::uint32_t>(_mm256_movemask_epi8(low));
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(_mm256_movemask_epi8(high)))
               << 32 |
           bits;
  }
};
#endif

// Each bit one place on, with the last bit of the block before coming in.
inline std::uint64_t shifted_on(std::uint64_t bits, std::uint64_t previous) {
  return bits << 1 | previous >> 63;
}

// Each bit one place back, with the first bit of the block after coming in.
inline std::uint64_t shifted_back(std::uint64_t bits, std::uint64_t next) {
  return bits >> 1 | next << 63;
}

// White space starts a piece where a run of it starts, and where its last character is if other
// text follows, for `\s+(?!\S)` leaves that one to the word there.
inline std::uint64_t space_starts(std::uint64_t continued, const Block& block, const Block& next) {
  const std::uint64_t last_bytes = block.spaces & ~shifted_back(block.spaces, next.spaces);
  std::uint64_t last_chars = last_bytes;
  if (block.wide_spaces != 0) {  // a last byte here may be that of a character before it
    const std::uint64_t last_bytes_next = next.spaces & ~(next.spaces >> 1);
    const std::uint64_t one_on = shifted_back(last_bytes, last_bytes_next);
    const std::uint64_t two_on = shifted_back(one_on, last_bytes_next >> 1);
    last_chars = (last_bytes & ~block.wide_spaces) | (block.spaces_of_2 & one_on) |
                 (block.spaces_of_3 & two_on);
  }
  return (block.spaces & ~continued) | last_chars;
}

// Writes `base` plus the place of each set bit, and returns how many there are. Goes by eights, for
// fewer branches to mispredict, and so writes up to seven numbers more, of no meaning.
template <typename Isa>
inline std::size_t write_places(std::uint64_t bits, std::size_t base, std::size_t* to) {
  const std::size_t count = count_bits(bits);
  for (std::size_t i = 0; i < count; i += 8) {
    for (std::size_t j = i; j < i + 8; ++j) {
      to[j] = base + Isa::lowest_or_any(bits);
      bits &= bits - 1;
    }
  }
  return count;
}

}  // namespace

bool starts_piece(std::string_view text, std::size_t at) {
  const auto is_space = [](char c) { return c == ' ' || (c >= '\t' && c <= '\r'); };
  const char before = text[at - 1];
  return is_space(text[at]) && !is_space(before) && static_cast<unsigned char>(before) < 0x80;
}

std::size_t find_start(std::string_view text, std::size_t at) {
  at = std::max<std::size_t>(at, 1);
  while (at < text.size() && !starts_piece(text, at)) ++at;
  return std::min(at, text.size());
}

Pretokenizer::Pretokenizer(std::string_view text, bool vectorized)
    : text_(text), vectorized_(vectorized) {
  previous_.spaces = ~std::uint64_t{0};  // before the text: nothing that a word could go on from
  current_ = classify<Portable>(0);
}

Ends Pretokenizer::next() {
#if defined(FASTGPT_HAS_AVX2)
  if (vectorized_ && has_avx2()) return {ends_.data(), cut_with_avx2()};
#endif
  return {ends_.data(), cut<Portable>()};
}

#if defined(FASTGPT_HAS_AVX2)
FASTGPT_AVX2_FLAT std::size_t Pretokenizer::cut_with_avx2() { return cut<Avx2>(); }
#endif

// Writes the next ends to ends_, and returns how many.
template <typename Isa>
std::size_t Pretokenizer::cut() {
  std::size_t count = 0;
  while (at_ < text_.size() && count + kBlock < kEnds) {
    const Block next = classify<Isa>(at_ + kBlock);
    std::uint64_t places = starts(next);
    if (at_ == 0) places &= ~std::uint64_t{1};  // where the first piece starts, none ends
    const std::size_t left = text_.size() - at_;
    if (left < kBlock) places &= (std::uint64_t{1} << left) - 1;
    count += write_places<Isa>(places, at_, &ends_[count]);
    if (left <= kBlock) ends_[count++] = text_.size();
    previous_ = current_;
    current_ = next;
    at_ += kBlock;
  }
  return count;
}

// Returns the places in current_ where a piece starts.
std::uint64_t Pretokenizer::starts(const Block& next) {
  const Block& block = current_;
  const std::uint64_t others = ~(block.letters | block.numbers | block.spaces);
  const std::uint64_t previous_others = ~(previous_.letters | previous_.numbers | previous_.spaces);
  const std::uint64_t continued = (block.letters & shifted_on(block.letters, previous_.letters)) |
                                  (block.numbers & shifted_on(block.numbers, previous_.numbers)) |
                                  (others & shifted_on(others, previous_others));
  const std::uint64_t after_blank = shifted_on(block.blanks, previous_.blanks);
  const std::uint64_t words = ~(block.spaces | continued | after_blank);
  const std::uint64_t places =
      words | space_starts(shifted_on(block.spaces, previous_.spaces), block, next);
  return join_contractions(places);
}

// An apostrophe where a piece starts may begin a contraction: take out the start of the letters
// that follow, for they belong to it, and put in one after it.
std::uint64_t Pretokenizer::join_contractions(std::uint64_t starts) {
  std::uint64_t apostrophes = starts & current_.apostrophes;
  starts = (starts & ~joined_) | after_joined_;
  joined_ = after_joined_ = 0;
  for (; apostrophes != 0; apostrophes &= apostrophes - 1) {
    const unsigned place = lowest_bit(apostrophes);
    const unsigned size = contraction_size(text_, at_ + place);
    if (size == 0) continue;
    const auto set = [](std::uint64_t& here, std::uint64_t& next, unsigned at) {
      (at < kBlock ? here : next) |= std::uint64_t{1} << at % kBlock;
    };
    std::uint64_t joined = 0;
    set(joined, joined_, place + 1);
    starts &= ~joined;
    set(starts, after_joined_, place + size);
  }
  return starts;
}

// Returns the classes of the 64 bytes at `at`. Blocks must be classified in order. Beyond the end
// of the text all is white space: it ends no word that goes on, and is no text after white space.
template <typename Isa>
Block Pretokenizer::classify(std::size_t at) {
  Block block;
  if (at >= text_.size()) {
    block.spaces = ~std::uint64_t{0};
    return block;
  }
  std::array<char, kBlock> padded;
  const char* bytes = text_.data() + at;
  if (text_.size() - at < kBlock) {
    padded.fill(' ');
    std::memcpy(padded.data(), bytes, text_.size() - at);
    bytes = padded.data();
  }
  const std::uint64_t leads = Isa::classify(bytes, block);
  if (leads != 0 || has_spill_) classify_wide(at, leads, block);
  return block;
}

// Adds the characters of more than one byte, of which these are the first bytes; and what the last
// one of the block before has here. A byte that continues no character is in no class.
void Pretokenizer::classify_wide(std::size_t at, std::uint64_t leads, Block& block) {
  std::array<std::uint64_t, 4> masks = {0, spill_.letters, spill_.numbers, spill_.spaces};
  std::array<std::uint64_t, 4> spilled{};  // both by CharClass
  for (; leads != 0; leads &= leads - 1) {
    const unsigned place = lowest_bit(leads);
    const Char c = multibyte_char(four_bytes_at(text_, at + place));
    const std::uint64_t bytes = (std::uint64_t{1} << c.size) - 1;
    const auto char_class = static_cast<std::size_t>(c.char_class);
    masks[char_class] |= bytes << place;
    if (c.char_class == CharClass::kSpace) {
      (c.size == 2 ? block.spaces_of_2 : block.spaces_of_3) |= std::uint64_t{1} << place;
    }
    if (place + c.size > kBlock) spilled[char_class] = bytes >> (kBlock - place);
  }
  block.letters |= masks[1];
  block.numbers |= masks[2];
  block.spaces |= masks[3];
  block.wide_spaces = masks[3];
  spill_.letters = spilled[1];
  spill_.numbers = spilled[2];
  spill_.spaces = spilled[3];
  has_spill_ = (spilled[1] | spilled[2] | spilled[3]) != 0;
}

}  // namespace fastgpt
