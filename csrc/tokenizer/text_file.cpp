#include "tokenizer/text_file.hpp"

#include <cstdint>
#include <cstring>

namespace fastgpt {
namespace {

// Returns the size of the character at text[at] in bytes, or 0 if it is invalid.
std::size_t character_size(std::string_view text, std::size_t at) {
  const auto byte = [&](std::size_t i) -> unsigned {
    return at + i < text.size() ? static_cast<unsigned char>(text[at + i]) : 0;
  };
  const auto continues = [&](std::size_t i) { return (byte(i) & 0xC0U) == 0x80U; };
  const unsigned first = byte(0);
  if (first < 0x80) return 1;
  if (first < 0xC2 || first > 0xF4 || !continues(1)) return 0;
  if (first < 0xE0) return 2;
  // Some first bytes restrict the range of the second byte.
  const unsigned second = byte(1);
  const bool overlong = (first == 0xE0 && second < 0xA0) || (first == 0xF0 && second < 0x90);
  const bool surrogate = first == 0xED && second >= 0xA0;
  const bool too_large = first == 0xF4 && second >= 0x90;
  if (overlong || surrogate || too_large || !continues(2)) return 0;
  if (first < 0xF0) return 3;
  return continues(3) ? 4 : 0;
}

}  // namespace

std::size_t valid_utf8(std::string_view text) {
  std::size_t at = 0;
  while (at < text.size()) {
    if (text.size() - at >= sizeof(std::uint64_t)) {
      std::uint64_t word;
      std::memcpy(&word, text.data() + at, sizeof word);
      if ((word & 0x8080808080808080) == 0) {  // eight ASCII characters
        at += sizeof word;
        continue;
      }
    }
    const std::size_t size = character_size(text, at);
    if (size == 0) break;
    at += size;
  }
  return at;
}

std::size_t unix_newlines(std::string_view text, char* to) {
  char* const first = to;
  const auto copy = [&](std::size_t begin, std::size_t end) {
    std::memcpy(to, text.data() + begin, end - begin);
    to += end - begin;
  };
  std::size_t begin = 0;
  for (std::size_t at = text.find('\r'); at != text.npos; at = text.find('\r', at + 1)) {
    if (at + 1 == text.size() || text[at + 1] != '\n') continue;
    copy(begin, at);
    begin = at + 1;
  }
  copy(begin, text.size());
  return static_cast<std::size_t>(to - first);
}

}  // namespace fastgpt
