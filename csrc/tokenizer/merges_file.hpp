// Reads OpenAI's vocab.bpe, from which GPT-2's whole vocabulary follows.
#pragma once

#include <string_view>
#include <vector>

#include "tokenizer/vocabulary.hpp"

namespace fastgpt {

struct MergesFile {
  TokenBytes tokens;
  std::vector<Merge> merges;
  TokenIndex index;  // of all tokens
};

// Parses the bytes of such a file: a line "#version: ..." if there is one, then a merge a line,
// "left right", with each byte written as a letter. Ids are given out as in GPT-2: the 256 bytes,
// printable ones first, then what each merge makes. Throws std::invalid_argument that names the
// line which is malformed, merges what no line before it makes, or makes a token again.
MergesFile parse_merges_file(std::string_view file);

}  // namespace fastgpt
