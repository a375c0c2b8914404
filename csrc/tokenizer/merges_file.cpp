#include "tokenizer/merges_file.hpp"

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

namespace fastgpt {
namespace {

// The file represents each byte by a character, its "letter". The letter of a printable byte is the
// character with that code point. The letters of the other bytes are the characters from U+0100 on,
// in the order of the bytes; that of the space is U+0120.
constexpr std::size_t kOtherLetters = 0x100;
constexpr std::size_t kLetters = 0x180;  // number of code points with a UTF-8 lead byte <= 0xC5

constexpr bool printable(std::size_t byte) {
  return (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xFF && byte != 0xAD);
}

// Returns the byte that each character represents, or -1 if it is not a letter.
constexpr std::array<std::int16_t, kLetters> make_byte_of_letter() {
  std::array<std::int16_t, kLetters> bytes{};
  for (std::int16_t& byte : bytes) byte = -1;
  std::size_t next_other = kOtherLetters;
  for (std::size_t byte = 0; byte < 256; ++byte) {
    bytes[printable(byte) ? byte : next_other++] = static_cast<std::int16_t>(byte);
  }
  return bytes;
}

constexpr std::array<std::int16_t, kLetters> kByteOfLetter = make_byte_of_letter();

[[noreturn]] void fail(std::size_t line, const std::string& what) {
  throw std::invalid_argument("line " + std::to_string(line) + ": " + what);
}

// Parses in two passes. The first one reads all tokens, which takes no lookups: a line's token is
// the concatenation of its parts. The second one (add_merges) looks up the ids of the parts, in
// batches whose table entries are prefetched.
class Parser {
 public:
  explicit Parser(std::string_view file) : file_(file), token_(new char[file.size() + 1]) {
    for (const bool wanted : {true, false}) {
      for (std::size_t byte = 0; byte < 256; ++byte) {
        const auto token = static_cast<char>(byte);
        if (printable(byte) == wanted) parsed_.tokens.push_back({&token, 1});
      }
    }
  }

  MergesFile parse() {
    constexpr std::string_view kVersion = "#version";
    if (file_.substr(0, kVersion.size()) == kVersion) {
      at_ = std::min(file_.find('\n'), file_.size() - 1) + 1;
      first_line_ = 2;
      if (file_[at_ - 1] != '\n') fail_at(0);
    }
    while (at_ < file_.size()) read_line();
    add_merges();
    return std::move(parsed_);
  }

 private:
  // Reads a line "left right\n" and adds the concatenated token.
  void read_line() {
    const std::size_t begin = at_;
    const std::size_t left = read_letters(token_.get());
    if (left == 0 || !read(' ')) fail_at(begin);
    const std::size_t right = read_letters(token_.get() + left);
    if (right == 0 || !read('\n')) fail_at(begin);
    left_sizes_.push_back(static_cast<std::uint32_t>(left));
    parsed_.tokens.push_back({token_.get(), left + right});
  }

  bool read(char wanted) {
    if (at_ == file_.size() || file_[at_] != wanted) return false;
    ++at_;
    return true;
  }

  // Decodes letters (of one or two bytes of UTF-8 each) up to the first character that is not a
  // letter, writes the bytes that they represent, and returns the number of bytes.
  std::size_t read_letters(char* to) {
    const char* const first = to;
    // Local copies of file_ and at_, which stores through `to` cannot alias.
    const std::string_view file = file_;
    std::size_t at = at_;
    for (std::size_t size = 0; at < file.size(); at += size) {
      std::size_t letter = static_cast<unsigned char>(file[at]);
      size = 1;
      if (letter >= 0x80) {
        if (letter < 0xC2 || letter > 0xC5 || at + 1 == file.size()) break;
        const auto next = static_cast<unsigned char>(file[at + 1]);
        if ((next & 0xC0U) != 0x80U) break;
        letter = (letter & 0x1FU) << 6 | (next & 0x3FU);
        size = 2;
      }
      if (kByteOfLetter[letter] < 0) break;
      *to++ = static_cast<char>(kByteOfLetter[letter]);
    }
    at_ = at;
    return static_cast<std::size_t>(to - first);
  }

  // Throws the error for the malformed line that starts at `begin`. Errors of the lines before it,
  // which add_merges() finds, take precedence.
  [[noreturn]] void fail_at(std::size_t begin) {
    add_merges();
    const std::size_t line = begin == 0 ? 1 : line_of(left_sizes_.size());
    const std::size_t end = file_.find('\n', begin);
    if (end == file_.npos) fail(line, "has no newline at its end; the file may be truncated");
    const std::string_view text = file_.substr(begin, end - begin);
    const std::size_t space = text.find(' ');
    if (space == 0 || space >= text.size() - 1 || text.find(' ', space + 1) != text.npos) {
      fail(line, "does not consist of two tokens separated by one space");
    }
    fail(line, "contains a character that represents no byte (lines must end in LF, not CRLF)");
  }

  std::size_t line_of(std::size_t merge) const { return merge + first_line_; }

  // A token or a part of one, with its hash.
  struct Part {
    const char* bytes;
    std::size_t size;
    TokenIndex::Hash hash;
  };
  struct Line {
    Part left;
    Part right;
    Part merged;
  };

  // Adds the merge of each line read so far. Prefetches the index entries of a batch of lines
  // before it looks up the first of them.
  void add_merges() {
    if (tokens().size() > kMaxTokens) {
      throw std::invalid_argument("defines more than " + std::to_string(kMaxTokens) + " tokens");
    }
    for (TokenId id = 0; id < kBytes; ++id) parsed_.index.insert(tokens(), part(id).hash, id);
    parsed_.merges.reserve(left_sizes_.size());
    std::array<Line, 32> lines;
    for (std::size_t first = 0; first < left_sizes_.size(); first += lines.size()) {
      const std::size_t count = std::min(lines.size(), left_sizes_.size() - first);
      for (std::size_t i = 0; i < count; ++i) lines[i] = ask_for(first + i);
      for (std::size_t i = 0; i < count; ++i) add_merge(first + i, lines[i]);
    }
  }

  Line ask_for(std::size_t merge) const {
    const auto id = static_cast<TokenId>(kBytes + merge);
    const std::size_t left = left_sizes_[merge];
    const Line line{part(id, 0, left), part(id, left, tokens().size_of(id) - left), part(id)};
    for (const Part& part : {line.left, line.right, line.merged}) parsed_.index.ask_for(part.hash);
    return line;
  }

  void add_merge(std::size_t merge, const Line& line) {
    const auto id = static_cast<TokenId>(kBytes + merge);
    const TokenId left = find(line.left);
    const TokenId right = find(line.right);
    if (left == kNoToken || right == kNoToken) {
      fail(line_of(merge), "merges a token that no earlier line produces");
    }
    if (find(line.merged) != kNoToken) {
      fail(line_of(merge), "produces the same token as an earlier line");
    }
    parsed_.merges.push_back({left, right, id});
    parsed_.index.insert(tokens(), line.merged.hash, id);
  }

  Part part(TokenId id) const { return part(id, 0, tokens().size_of(id)); }
  Part part(TokenId id, std::size_t begin, std::size_t size) const {
    const char* const bytes = tokens().data(id) + begin;
    if (size > PieceKey::kMaxSize) return {bytes, size, TokenIndex::hash({bytes, size})};
    // PieceKey::load is faster than hashing a string_view; the padding of TokenBytes allows it.
    return {bytes, size, TokenIndex::hash(PieceKey::load(bytes, size))};
  }

  TokenId find(const Part& part) const {
    const auto& [bytes, size, hash] = part;
    if (size > PieceKey::kMaxSize) return parsed_.index.find(tokens(), hash, {bytes, size});
    return parsed_.index.find(tokens(), PieceKey::load(bytes, size), size);
  }

  const TokenBytes& tokens() const { return parsed_.tokens; }

  static constexpr std::size_t kBytes = 256;

  std::string_view file_;
  std::size_t at_ = 0;
  std::size_t first_line_ = 1;             // number of the first line with a merge
  std::unique_ptr<char[]> token_;          // buffer for one token, as large as the file
  std::vector<std::uint32_t> left_sizes_;  // size in bytes of each merge's left part
  MergesFile parsed_;
};

}  // namespace

MergesFile parse_merges_file(std::string_view file) { return Parser(file).parse(); }

}  // namespace fastgpt
