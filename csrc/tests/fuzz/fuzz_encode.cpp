// Encodes and decodes arbitrary bytes with GPT-2's vocabulary, and compares with references.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/gpt2.hpp"
#include "tests/fuzz/reference_splitter.hpp"
#include "tokenizer/merger.hpp"
#include "tokenizer/piece_encoder.hpp"
#include "tokenizer/pretokenizer.hpp"
#include "tokenizer/text_file.hpp"

namespace fastgpt {
namespace {

std::vector<std::string_view> cut(std::string_view text, bool vectorized) {
  std::vector<std::string_view> pieces;
  Pretokenizer pretokenizer(text, vectorized);
  std::size_t begin = 0;
  for (Ends ends = pretokenizer.next(); !ends.empty(); ends = pretokenizer.next()) {
    for (const std::size_t end : ends) {
      check(begin < end && end <= text.size(), "pieces are not empty and are within the text");
      pieces.push_back(text.substr(begin, end - begin));
      begin = end;
    }
  }
  return pieces;
}

std::vector<std::string_view> check_pieces(std::string_view text) {
  const std::vector<std::string_view> pieces = reference::split(text);
  check(cut(text, true) == pieces, "the vectorized pre-tokenizer matches the reference");
  check(cut(text, false) == pieces, "the portable pre-tokenizer matches the reference");
  return pieces;
}

std::vector<TokenId> merge_each(const Vocabulary& vocabulary,
                                const std::vector<std::string_view>& pieces) {
  Merger merger(vocabulary);
  std::vector<TokenId> ids;
  for (const std::string_view piece : pieces) {
    const std::vector<TokenId>& tokens = merger.merge(piece);
    ids.insert(ids.end(), tokens.begin(), tokens.end());
  }
  return ids;
}

// Encodes twice with a new encoder, whose caches are empty at first, so that a failure does not
// depend on earlier inputs.
template <typename Id>
void check_cold_and_warm(const Vocabulary& vocabulary, std::string_view text,
                         const std::vector<TokenId>& expected) {
  PieceEncoder<Id> encoder(vocabulary);
  for (const char* what : {"ids with empty caches", "ids with filled caches"}) {
    IdBuffer<Id> ids;
    encoder.encode(text, ids);
    check(to_vector(ids) == expected, what);
  }
}

// Repeats the text until it is long enough to be split between two threads.
void check_long(const BytePairEncoder& encoder, std::string_view text) {
  std::string many;
  while (many.size() < std::size_t{1} << 19) many += text;
  const std::vector<TokenId> ids = encode<std::uint16_t>(encoder, many, 1);
  check(encode<std::uint16_t>(encoder, many, 2) == ids, "two threads give the ids of one");
  check(decode(encoder, ids) == many, "a long text is decoded to itself");
}

void check_as_a_file(std::string_view text) {
  check(valid_utf8(text) == reference::valid_size(text), "valid_utf8 matches the reference");
  std::string expected;
  for (std::size_t i = 0; i < text.size(); ++i) {
    if (text.substr(i, 2) != "\r\n") expected += text[i];
  }
  std::string converted(text.size(), '\0');
  converted.resize(unix_newlines(text, converted.data()));
  check(converted == expected, "each CRLF becomes LF");
}

void check_text(const BytePairEncoder& encoder, std::string_view text) {
  const Vocabulary& vocabulary = encoder.vocabulary();
  const std::vector<TokenId> expected = merge_each(vocabulary, check_pieces(text));
  check_cold_and_warm<std::uint16_t>(vocabulary, text, expected);
  check_cold_and_warm<std::uint32_t>(vocabulary, text, expected);
  check(encode<std::uint16_t>(encoder, text, 1) == expected, "ids after many other texts");
  check(encode<std::uint32_t>(encoder, text, 2) == expected, "wide ids after many other texts");
  check(decode(encoder, expected) == text, "the text is decoded to itself");
  check_as_a_file(text);
}

}  // namespace
}  // namespace fastgpt

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const fastgpt::BytePairEncoder encoder(fastgpt::gpt2_vocabulary());
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  fastgpt::check_text(encoder, text);
  const std::uint64_t number = fastgpt::number_of(text);
  // Check the text again at another offset, with respect to the pre-tokenizer's blocks of 64 bytes.
  const std::string moved = std::string(1 + number % 70, 'x') + std::string(text);
  static_cast<void>(fastgpt::check_pieces(moved));
  fastgpt::check_as_a_file(moved);
  if (size > 0 && number % 256 == 0) fastgpt::check_long(encoder, text);
  return 0;
}
