#include "pretokenizer.hpp"

#include <algorithm>
#include <array>
#include <cstdint>

namespace fastgpt {
namespace {

enum class CharClass : std::uint8_t { kOther, kLetter, kNumber, kSpace };

struct ClassRange {
  std::uint32_t first;
  std::uint32_t last;
  CharClass char_class;
};

constexpr ClassRange kRanges[] = {
#include "unicode_tables.inc"
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
  std::size_t size;  // in bytes
};

// Reads the character at text[at], whose first byte is 0x80 or above.
Char multibyte_char_at(std::string_view text, std::size_t at) {
  constexpr Char kInvalid{CharClass::kOther, 1};
  constexpr std::uint32_t kSmallest[] = {0, 0, 0x80, 0x800, 0x10000};  // by size: no overlong forms

  const auto first = static_cast<unsigned char>(text[at]);
  const std::size_t size = first < 0xE0 ? 2 : first < 0xF0 ? 3 : 4;
  if (first < 0xC2 || first > 0xF4 || text.size() - at < size) return kInvalid;

  std::uint32_t code_point = first & (0x7FU >> size);
  for (std::size_t i = 1; i < size; ++i) {
    const auto byte = static_cast<unsigned char>(text[at + i]);
    if ((byte & 0xC0U) != 0x80U) return kInvalid;
    code_point = code_point << 6 | (byte & 0x3FU);
  }
  // Surrogates and numbers past U+10FFFF, invalid too, need no check: no class is theirs either.
  if (code_point < kSmallest[size]) return kInvalid;
  return {kClasses[code_point], size};
}

Char char_at(std::string_view text, std::size_t at) {
  const auto first = static_cast<unsigned char>(text[at]);
  return first < 0x80 ? Char{kClasses[first], 1} : multibyte_char_at(text, at);
}

// Returns the end of the longest run of characters of one class that starts at `at`.
std::size_t run_end(std::string_view text, std::size_t at, CharClass char_class) {
  while (at < text.size()) {
    const Char c = char_at(text, at);
    if (c.char_class != char_class) break;
    at += c.size;
  }
  return at;
}

// \s+(?!\S)|\s+ : white space, but its last character is left to the word that follows (of which
// a space becomes a part), unless it is the only one.
std::size_t space_end(std::string_view text, std::size_t begin) {
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
std::size_t contraction_size(std::string_view text, std::size_t begin) {
  const std::string_view rest = text.substr(begin, 3);
  if (rest.size() < 2 || rest[0] != '\'') return 0;
  if (rest[1] == 's' || rest[1] == 'd' || rest[1] == 'm' || rest[1] == 't') return 2;
  return rest == "'ll" || rest == "'ve" || rest == "'re" ? 3 : 0;
}

}  // namespace

std::size_t piece_end(std::string_view text, std::size_t begin) {
  if (const std::size_t size = contraction_size(text, begin); size > 0) return begin + size;

  const bool led_by_space = text[begin] == ' ' && begin + 1 < text.size();
  const std::size_t at = led_by_space ? begin + 1 : begin;
  const Char c = char_at(text, at);
  if (c.char_class == CharClass::kSpace) return space_end(text, begin);
  return run_end(text, at + c.size, c.char_class);
}

}  // namespace fastgpt
