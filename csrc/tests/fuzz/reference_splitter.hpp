// Reference implementation of GPT-2's pre-tokenization, character by character, for comparison with
// the bit masks of Pretokenizer.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string_view>
#include <vector>

namespace fastgpt::reference {

enum class CharClass : std::uint8_t { kOther, kLetter, kNumber, kSpace };

struct ClassRange {
  std::uint32_t first;
  std::uint32_t last;
  CharClass char_class;
};

constexpr ClassRange kRanges[] = {
#include "tokenizer/unicode_tables.inc"
};

inline CharClass class_of(std::uint32_t code_point) {
  const auto* range =
      std::lower_bound(std::begin(kRanges), std::end(kRanges), code_point,
                       [](const ClassRange& r, std::uint32_t point) { return r.last < point; });
  const bool inside = range != std::end(kRanges) && range->first <= code_point;
  return inside ? range->char_class : CharClass::kOther;
}

struct Char {
  CharClass char_class;
  std::size_t size;  // in bytes
  bool valid = true;
};

// Decodes the character at text[at]: valid UTF-8 (RFC 3629), or a single invalid byte.
inline Char char_at(std::string_view text, std::size_t at) {
  constexpr Char kInvalid{CharClass::kOther, 1, false};
  constexpr std::uint32_t kSmallest[] = {0, 0, 0x80, 0x800, 0x10000};  // by size
  const auto first = static_cast<unsigned char>(text[at]);
  if (first < 0x80) return {class_of(first), 1};

  const std::size_t size = first < 0xC0 ? 0 : first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  if (size == 0 || first >= 0xF8 || text.size() - at < size) return kInvalid;
  std::uint32_t code_point = first & (0x7FU >> size);
  for (std::size_t i = 1; i < size; ++i) {
    const auto byte = static_cast<unsigned char>(text[at + i]);
    if ((byte & 0xC0U) != 0x80U) return kInvalid;
    code_point = code_point << 6 | (byte & 0x3FU);
  }
  const bool surrogate = code_point >= 0xD800 && code_point < 0xE000;
  if (code_point < kSmallest[size] || surrogate || code_point > 0x10FFFF) return kInvalid;
  return {class_of(code_point), size};
}

// Returns the size of the longest prefix that is valid UTF-8.
inline std::size_t valid_size(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size() && char_at(text, at).valid) at += char_at(text, at).size;
  return at;
}

// Returns the end of the longest run of characters of the given class that starts at `at`.
inline std::size_t run_end(std::string_view text, std::size_t at, CharClass char_class) {
  while (at < text.size()) {
    const Char c = char_at(text, at);
    if (c.char_class != char_class) break;
    at += c.size;
  }
  return at;
}

// Matches \s+(?!\S)|\s+ : a run of white space, without its last character if other text follows
// and the run has more than one character.
inline std::size_t space_end(std::string_view text, std::size_t begin) {
  std::size_t last = begin;
  std::size_t end = begin;
  while (end < text.size()) {
    const Char c = char_at(text, end);
    if (c.char_class != CharClass::kSpace) return last == begin ? end : last;
    last = end;
    end += c.size;
  }
  return end;
}

// Returns the length of the contraction ('s 'd 'm 't 'll 've 're) at text[begin], or 0.
inline std::size_t contraction_size(std::string_view text, std::size_t begin) {
  const std::string_view rest = text.substr(begin, 3);
  if (rest.size() < 2 || rest[0] != '\'') return 0;
  if (rest[1] == 's' || rest[1] == 'd' || rest[1] == 'm' || rest[1] == 't') return 2;
  return rest == "'ll" || rest == "'ve" || rest == "'re" ? 3 : 0;
}

// Returns where the piece that starts at text[begin] ends.
inline std::size_t piece_end(std::string_view text, std::size_t begin) {
  if (const std::size_t size = contraction_size(text, begin); size > 0) return begin + size;
  const bool led_by_space = text[begin] == ' ' && begin + 1 < text.size();
  const std::size_t at = led_by_space ? begin + 1 : begin;
  const Char c = char_at(text, at);
  if (c.char_class == CharClass::kSpace) return space_end(text, begin);
  return run_end(text, at + c.size, c.char_class);
}

inline std::vector<std::string_view> split(std::string_view text) {
  std::vector<std::string_view> pieces;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = piece_end(text, begin);
    pieces.push_back(text.substr(begin, end - begin));
    begin = end;
  }
  return pieces;
}

}  // namespace fastgpt::reference
