// Parser for OpenAI's vocab.bpe, which defines GPT-2's vocabulary except for its special token.
#pragma once

#include <string_view>
#include <vector>

#include "tokenizer/vocabulary.hpp"

namespace fastgpt {

struct MergesFile {
  TokenBytes tokens;
  std::vector<Merge> merges;
  TokenIndex index;  // contains all tokens
};

// Parses the contents of a vocab.bpe file: an optional line "#version: ...", then one merge per
// line, "left right", with each byte represented by a printable character. Ids are assigned as in
// GPT-2: first the 256 bytes, printable ones first, then the token that each merge produces. Throws
// std::invalid_argument with the line number if a line is malformed, merges a token that no earlier
// line produces, or produces a token that already exists.
MergesFile parse_merges_file(std::string_view file);

}  // namespace fastgpt
