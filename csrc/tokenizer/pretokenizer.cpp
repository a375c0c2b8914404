// The pattern and the algorithm are described in the header.
#include "tokenizer/pretokenizer.hpp"

#include <algorithm>
#include <cstring>

#include "common/bits.hpp"
#include "common/processor.hpp"

#if defined(FASTGPT_X86)
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

// Maps code points to classes: one byte per code point, up to the last one that has a class. A
// lookup is a single load, and a text touches only the few cache lines of the scripts it uses.
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

// Filled when the module is loaded, read-only afterwards.
const ClassTable kClasses;

struct Char {
  CharClass char_class;
  unsigned size;  // in bytes
};

// The range of the first bytes (lead bytes) of multi-byte characters. 0xC0 and 0xC1 would start an
// overlong form of an ASCII character, bytes above 0xF4 a code point beyond U+10FFFF.
constexpr unsigned kFirstLead = 0xC2;
constexpr unsigned kLastLead = 0xF4;

// Decodes the multi-byte character at the start of `bytes` (four bytes, the first one lowest, which
// must be a lead byte). If it is not valid UTF-8, the class is kOther; then the size is not used,
// because kOther has no mask.
//
// Each `if` compares the marker bits of all bytes of one length at once: 110xxxxx 10xxxxxx for two
// bytes, 1110xxxx 10xxxxxx 10xxxxxx for three, 11110xxx and three continuation bytes for four.
inline Char multibyte_char(std::uint32_t bytes) {
  const auto bits = [&](unsigned byte, std::uint32_t mask) { return bytes >> 8 * byte & mask; };
  if ((bytes & 0xC0E0) == 0x80C0) return {kClasses[bits(0, 0x1F) << 6 | bits(1, 0x3F)], 2};
  if ((bytes & 0xC0C0F0) == 0x8080E0) {
    const std::uint32_t point = bits(0, 0x0F) << 12 | bits(1, 0x3F) << 6 | bits(2, 0x3F);
    // Overlong forms are rejected. Surrogates and code points beyond U+10FFFF, also invalid, need
    // no check: the table maps them to kOther as well.
    if (point >= 0x800) return {kClasses[point], 3};
  } else if ((bytes & 0xC0C0C0F8) == 0x808080F0) {
    const std::uint32_t point =
        bits(0, 0x07) << 18 | bits(1, 0x3F) << 12 | bits(2, 0x3F) << 6 | bits(3, 0x3F);
    if (point >= 0x10000) return {kClasses[point], 4};
  }
  return {CharClass::kOther, 1};
}

// Returns the four bytes at text[at], the first one lowest, zero-padded beyond the end of the text.
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

// Instruction sets. classify() sets the masks of the ASCII characters among 64 bytes and returns
// the mask of the lead bytes of multi-byte characters. lowest_or_any() returns the index of the
// lowest set bit, or any value if no bit is set.
struct Portable {
  static unsigned lowest_or_any(std::uint64_t bits) {
    return lowest_bit(bits | std::uint64_t{1} << 63);
  }

  static std::uint64_t classify(const char* bytes, Block& block) {
    std::uint64_t leads = 0;
    for (unsigned i = 0; i < 64; ++i) {
      const auto byte = static_cast<unsigned char>(bytes[i]);
      // The unsigned subtraction wraps around below the range, so one comparison checks both ends.
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

#if defined(FASTGPT_X86)
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

  // Returns the mask of the bytes in [first, first + count).
  FASTGPT_AVX2 static std::uint64_t below(__m256i low, __m256i high, char first, char count) {
    return mask(below(low, first, count), below(high, first, count));
  }

  // AVX2 has no unsigned comparison of bytes: x <= last is computed as min(x, last) == x.
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

// Aligns each byte with the one before it: bit i of the result is bit i - 1 of the mask. Bit 0
// comes from the last bit of the previous block.
inline std::uint64_t with_previous_bit(std::uint64_t bits, std::uint64_t previous) {
  return bits << 1 | previous >> 63;
}

// Aligns each byte with the one after it: bit i of the result is bit i + 1 of the mask. Bit 63
// comes from the first bit of the next block.
inline std::uint64_t with_next_bit(std::uint64_t bits, std::uint64_t next) {
  return bits >> 1 | next << 63;
}

// Returns the mask of the white space that starts a piece: the first byte of each run of white
// space, and the first byte of the last character of a run that is followed by other text. The
// latter is where `\s+(?!\S)` stops, one character before the end of the run.
//
// `continued` is the mask of the bytes whose predecessor is white space.
inline std::uint64_t space_starts(std::uint64_t continued, const Block& block, const Block& next) {
  const std::uint64_t last_bytes = block.spaces & ~with_next_bit(block.spaces, next.spaces);
  std::uint64_t last_chars = last_bytes;
  // If the last character of a run has several bytes, the piece starts at its first byte: one byte
  // before the last byte of a character of two, two bytes before that of a character of three. The
  // last byte may lie in the next block.
  if (block.multibyte_spaces != 0) {
    const std::uint64_t last_bytes_next = next.spaces & ~(next.spaces >> 1);
    const std::uint64_t one_on = with_next_bit(last_bytes, last_bytes_next);
    const std::uint64_t two_on = with_next_bit(one_on, last_bytes_next >> 1);
    last_chars = (last_bytes & ~block.multibyte_spaces) | (block.spaces_of_2 & one_on) |
                 (block.spaces_of_3 & two_on);
  }
  return (block.spaces & ~continued) | last_chars;
}

// Writes `base` plus the index of each set bit to `to`, and returns the number of set bits. The
// loop writes eight values per iteration, so that its branch is mispredicted less often; up to
// seven values after the last one are meaningless, and `to` must have room for them.
template <typename Isa>
inline std::size_t write_set_bits(std::uint64_t bits, std::size_t base, std::size_t* to) {
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

std::vector<std::string_view> split_for_threads(std::string_view text, std::size_t threads) {
  const std::size_t parts = std::max<std::size_t>(std::min(threads, text.size() / kMinPart), 1);
  std::vector<std::string_view> list;
  const std::size_t size = text.size() / parts + 1;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = find_start(text, begin + size);
    list.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  return list;
}

Pretokenizer::Pretokenizer(std::string_view text, bool vectorized)
    : text_(text), vectorized_(vectorized) {
  // Treat what precedes the text as white space, which no word or number continues. It is not a
  // blank either, so a word at the start of the text is not joined to it.
  previous_.spaces = ~std::uint64_t{0};
  current_ = classify<Portable>(0);
}

Ends Pretokenizer::next() {
#if defined(FASTGPT_X86)
  if (vectorized_ && processor().avx2) return {ends_.data(), find_ends_avx2()};
#endif
  return {ends_.data(), cut<Portable>()};
}

#if defined(FASTGPT_X86)
FASTGPT_AVX2_FLAT std::size_t Pretokenizer::find_ends_avx2() { return cut<Avx2>(); }
#endif

// Writes the next ends to ends_ and returns their number. A piece ends where the next one starts,
// so the starts found in a block are the ends to return, except for the start at 0; the end of the
// text is added last.
template <typename Isa>
std::size_t Pretokenizer::cut() {
  std::size_t count = 0;
  while (at_ < text_.size() && count + kBlock < kEnds) {
    const Block next = classify<Isa>(at_ + kBlock);
    std::uint64_t places = starts(next);
    if (at_ == 0) places &= ~std::uint64_t{1};  // no piece ends at the start of the text
    const std::size_t left = text_.size() - at_;
    if (left < kBlock) places &= (std::uint64_t{1} << left) - 1;
    count += write_set_bits<Isa>(places, at_, &ends_[count]);
    if (left <= kBlock) ends_[count++] = text_.size();
    previous_ = current_;
    current_ = next;
    at_ += kBlock;
  }
  return count;
}

// Returns the mask of the bytes of current_ at which a piece starts.
//
// A byte that is not white space starts a piece if its class differs from that of the byte before
// it, unless that byte is a blank: ` ?\p{L}+` and its like take the blank into the piece, which
// then starts at the blank (see space_starts). The bytes of one multi-byte character have one
// class, so only its first byte can start a piece.
//
// An example, with the first byte, which is the lowest bit, on the left; _ is a blank:
//
//   text          H i _ _ t h e r e _ 4 2 ! _ x
//   letters       1 1 0 0 1 1 1 1 1 0 0 0 0 0 1
//   blanks        0 0 1 1 0 0 0 0 0 1 0 0 0 1 0   (here the same as spaces)
//   continued     0 1 0 0 0 1 1 1 1 0 0 1 0 0 0
//   after_blank   0 0 0 1 1 0 0 0 0 0 1 0 0 0 1
//   words         1 0 0 0 0 0 0 0 0 0 0 0 1 0 0
//   space_starts  0 0 1 1 0 0 0 0 0 1 0 0 0 1 0
//   pieces        Hi|_|_there|_42|!|_x
std::uint64_t Pretokenizer::starts(const Block& next) {
  const Block& block = current_;
  const std::uint64_t others = ~(block.letters | block.numbers | block.spaces);
  const std::uint64_t previous_others = ~(previous_.letters | previous_.numbers | previous_.spaces);
  const std::uint64_t continued =
      (block.letters & with_previous_bit(block.letters, previous_.letters)) |
      (block.numbers & with_previous_bit(block.numbers, previous_.numbers)) |
      (others & with_previous_bit(others, previous_others));
  const std::uint64_t after_blank = with_previous_bit(block.blanks, previous_.blanks);
  const std::uint64_t words = ~(block.spaces | continued | after_blank);
  const std::uint64_t places =
      words | space_starts(with_previous_bit(block.spaces, previous_.spaces), block, next);
  return join_contractions(places);
}

// Corrects the starts of pieces for contractions ('s, 'll, ...). By their classes, an apostrophe
// and the letters after it are two pieces. If the apostrophe starts a piece (it neither follows a
// blank nor continues punctuation), it may begin a contraction: then the start at its first letter
// is removed, and one is added after its last letter, where the letters may continue. Both
// positions can lie in the next block, and are kept in joined_ and after_joined_ until then.
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

// Returns the classes of the 64 bytes at text_[at]. Blocks must be classified in order, because of
// spill_. Bytes beyond the end of the text are classified as white space, so that white space at
// the end of the text is not followed by other text and remains one piece.
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
  if (leads != 0 || has_spill_) classify_multibyte(at, leads, block);
  return block;
}

// Adds the classes of multi-byte characters to a block at text_[at]: of those whose first bytes are
// the set bits of `leads`, and of the remaining bytes (spill_) of a character that started in the
// previous block. The bytes of this block's last character that lie in the next block become the
// new spill_. A continuation byte that belongs to no character is in no class.
void Pretokenizer::classify_multibyte(std::size_t at, std::uint64_t leads, Block& block) {
  std::array<std::uint64_t, 4> masks = {0, spill_.letters, spill_.numbers, spill_.spaces};
  std::array<std::uint64_t, 4> spilled{};  // masks and spilled are indexed by CharClass
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
  block.multibyte_spaces = masks[3];
  spill_.letters = spilled[1];
  spill_.numbers = spilled[2];
  spill_.spaces = spilled[3];
  has_spill_ = (spilled[1] | spilled[2] | spilled[3]) != 0;
}

}  // namespace fastgpt
