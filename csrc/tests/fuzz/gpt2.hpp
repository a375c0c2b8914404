// GPT-2's vocabulary for the fuzz programs.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <string>
#include <utility>

#include "tokenizer/merges_file.hpp"
#include "tokenizer/vocabulary.hpp"

namespace fastgpt {

// Reads the file given by the environment variable FASTGPT_MERGES, or by default the one in the
// repository.
inline std::string read_gpt2_merges() {
  const char* path = std::getenv("FASTGPT_MERGES");
  if (path == nullptr) path = FASTGPT_MERGES_FILE;
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "%s cannot be read: set FASTGPT_MERGES to GPT-2's vocab.bpe\n", path);
    std::exit(2);
  }
  return {std::istreambuf_iterator<char>(file), {}};
}

inline Vocabulary gpt2_vocabulary() {
  MergesFile parsed = parse_merges_file(read_gpt2_merges());
  return {std::move(parsed.tokens), std::move(parsed.merges), std::move(parsed.index)};
}

}  // namespace fastgpt
