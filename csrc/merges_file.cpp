#include "merges_file.hpp"

#include <array>
#include <cstddef>
#include <stdexcept>
#include <unordered_map>

namespace fastgpt {
namespace {

// The letter for a printable byte is the character of that number. The letters for the others are
// the characters from U+0100 on, in the order of the bytes; a space is U+0120.
constexpr std::size_t kOtherLetters = 0x100;
constexpr std::size_t kLetters = kOtherLetters + 68;

constexpr bool printable(std::size_t byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xFF && byte != 0xAD);
}

// Returns the byte of each letter, or -1 for a character that is none.
constexpr std::array<int, kLetters> make_byte_of_letter() {
  std::array<int, kLetters> bytes{};
  std::size_t next_other = kOtherLetters;
  for (std::size_t byte = 0; byte < 256; ++byte) {
    if (!printable(byte)) bytes[byte] = -1;
    bytes[printable(byte) ? byte : next_other++] = static_cast<int>(byte);
  }
  return bytes;
}

constexpr std::array<int, kLetters> kByteOfLetter = make_byte_of_letter();

[[noreturn]] void fail(std::size_t line, const std::string& what) {
  throw std::invalid_argument("line " + std::to_string(line) + ": " + what);
}

// Returns the bytes that a token's letters (each one or two bytes of UTF-8) stand for.
std::string to_bytes(std::string_view letters, std::size_t line) {
  std::string bytes;
  for (std::size_t i = 0; i < letters.size(); ++i) {
    std::size_t letter = static_cast<unsigned char>(letters[i]);
    if (letter >= 0xC2 && letter <= 0xC5 && i + 1 < letters.size()) {
      const auto next = static_cast<unsigned char>(letters[i + 1]);
      const bool continues = (next & 0xC0U) == 0x80U;
      letter = continues ? (letter & 0x1FU) << 6 | (next & 0x3FU) : kLetters;
      ++i;
    } else if (letter >= 0x80) {
      letter = kLetters;
    }
    if (letter >= kLetters || kByteOfLetter[letter] < 0) {
      fail(line, "holds a character that stands for no byte (a line ends in a plain newline)");
    }
    bytes += static_cast<char>(kByteOfLetter[letter]);
  }
  return bytes;
}

class Parser {
 public:
  Parser() {
    for (const bool wanted : {true, false}) {
      for (std::size_t byte = 0; byte < 256; ++byte) {
        if (printable(byte) == wanted) add(std::string(1, static_cast<char>(byte)));
      }
    }
  }

  void parse_line(std::string_view text, std::size_t line) {
    const std::size_t space = text.find(' ');
    if (space == 0 || space >= text.size() - 1 || text.find(' ', space + 1) != text.npos) {
      fail(line, "is not two tokens with one space between them");
    }
    const std::string left = to_bytes(text.substr(0, space), line);
    const std::string right = to_bytes(text.substr(space + 1), line);
    const TokenId left_id = find(left, line);
    const TokenId right_id = find(right, line);
    const auto merged_id = static_cast<TokenId>(file_.tokens.size());
    if (!add(left + right)) fail(line, "makes a token that an earlier line makes");
    file_.merges.push_back({left_id, right_id, merged_id});
  }

  MergesFile take() { return std::move(file_); }

 private:
  // Returns false for a token that is there already.
  bool add(std::string token) {
    const auto id = static_cast<TokenId>(file_.tokens.size());
    if (!ids_.emplace(token, id).second) return false;
    file_.tokens.push_back(std::move(token));
    return true;
  }

  TokenId find(const std::string& token, std::size_t line) const {
    const auto found = ids_.find(token);
    if (found == ids_.end()) fail(line, "merges a token that no line before it makes");
    return found->second;
  }

  MergesFile file_;
  std::unordered_map<std::string, TokenId> ids_;
};

}  // namespace

MergesFile parse_merges_file(std::string_view file) {
  constexpr std::string_view kVersion = "#version";
  Parser parser;
  for (std::size_t begin = 0, line = 1; begin < file.size(); ++line) {
    const std::size_t end = file.find('\n', begin);
    if (end == file.npos) fail(line, "has no newline at its end: is the file cut short?");
    const std::string_view text = file.substr(begin, end - begin);
    const bool version = line == 1 && text.substr(0, kVersion.size()) == kVersion;
    if (!version) parser.parse_line(text, line);
    begin = end + 1;
  }
  return parser.take();
}

}  // namespace fastgpt
