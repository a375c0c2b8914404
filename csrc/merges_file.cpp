#include "merges_file.hpp"

#include <array>
#include <cstddef>
#include <stdexcept>
#include <string>
#include <utility>

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

class Parser {
 public:
  Parser() {
    for (const bool wanted : {true, false}) {
      for (std::size_t byte = 0; byte < 256; ++byte) {
        const auto token = static_cast<char>(byte);
        if (printable(byte) == wanted) add({&token, 1});
      }
    }
  }

  // Lines are added some at a time, so that what their tokens are looked up in has come from memory
  // by then.
  void parse_line(std::string_view text, std::size_t line) {
    const std::size_t space = text.find(' ');
    if (space == 0 || space >= text.size() - 1 || text.find(' ', space + 1) != text.npos) {
      fail_after_pending(line, "is not two tokens with one space between them");
    }
    Line& read = pending_[pending_count_];
    read.number = line;
    read.bytes.resize(text.size());
    char* const bytes = read.bytes.data();
    read.left = read_letters(text.substr(0, space), bytes, line);
    read.size = read.left + read_letters(text.substr(space + 1), bytes + read.left, line);
    file_.index.ask_for({bytes, read.left});
    file_.index.ask_for({bytes + read.left, read.size - read.left});
    file_.index.ask_for({bytes, read.size});
    if (++pending_count_ == pending_.size()) add_pending();
  }

  // The first line that is wrong is to be named.
  [[noreturn]] void fail_after_pending(std::size_t line, const char* what) {
    add_pending();
    fail(line, what);
  }

  MergesFile take() {
    add_pending();
    return std::move(file_);
  }

 private:
  struct Line {
    std::size_t number;
    std::vector<char> bytes;  // of the token that the line makes, and room
    std::size_t left;         // how many of them are its left part's
    std::size_t size;
  };

  // Writes the bytes that a token's letters (each one or two bytes of UTF-8) stand for, and returns
  // how many they are.
  std::size_t read_letters(std::string_view letters, char* to, std::size_t line) {
    const char* const first = to;
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
        fail_after_pending(line,
                           "holds a character that stands for no byte (a line ends in a "
                           "plain newline)");
      }
      *to++ = static_cast<char>(kByteOfLetter[letter]);
    }
    return static_cast<std::size_t>(to - first);
  }

  void add_pending() {
    const std::size_t count = std::exchange(pending_count_, 0);
    for (std::size_t i = 0; i < count; ++i) {
      const Line& line = pending_[i];
      const std::string_view merged(line.bytes.data(), line.size);
      const Merge merge{find(merged.substr(0, line.left), line.number),
                        find(merged.substr(line.left), line.number),
                        static_cast<TokenId>(file_.tokens.size())};
      if (file_.index.find(merged) != kNoToken) {
        fail(line.number, "makes a token that an earlier line makes");
      }
      file_.merges.push_back(merge);
      add(merged);
    }
  }

  void add(std::string_view token) {
    file_.index.insert(token, static_cast<TokenId>(file_.tokens.size()));
    file_.tokens.push_back(token);
  }

  TokenId find(std::string_view token, std::size_t line) const {
    const TokenId id = file_.index.find(token);
    if (id == kNoToken) fail(line, "merges a token that no line before it makes");
    return id;
  }

  MergesFile file_;
  std::array<Line, 32> pending_;
  std::size_t pending_count_ = 0;
};

}  // namespace

MergesFile parse_merges_file(std::string_view file) {
  constexpr std::string_view kVersion = "#version";
  Parser parser;
  for (std::size_t begin = 0, line = 1; begin < file.size(); ++line) {
    const std::size_t end = file.find('\n', begin);
    if (end == file.npos)
      parser.fail_after_pending(line, "has no newline at its end: is the file cut short?");
    const std::string_view text = file.substr(begin, end - begin);
    const bool version = line == 1 && text.substr(0, kVersion.size()) == kVersion;
    if (!version) parser.parse_line(text, line);
    begin = end + 1;
  }
  return parser.take();
}

}  // namespace fastgpt
