// Interprets arbitrary bytes as a vocabulary: as a vocab.bpe file, and as the recipe of a small
// vocabulary whose merges, and their order, need not be a possible result of training.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "tests/fuzz/fuzz.hpp"
#include "tests/fuzz/reference_splitter.hpp"
#include "tokenizer/merges_file.hpp"
#include "tokenizer/piece_encoder.hpp"

namespace fastgpt {
namespace {

constexpr std::size_t kMaxToken = 40;  // bytes: more than PieceKey::kMaxSize

// Reference implementation, by definition: repeatedly merges the pair of lowest rank; of several
// with that rank, the leftmost.
class NaiveMerger {
 public:
  explicit NaiveMerger(const Vocabulary& vocabulary) : vocabulary_(vocabulary) {
    for (const auto& [left, right, merged] : vocabulary.merges()) {
      ranks_.emplace(std::pair(left, right), ranks_.size());
    }
  }

  std::vector<TokenId> merge(std::string_view piece) const {
    std::vector<TokenId> ids;
    for (const char byte : piece) ids.push_back(vocabulary_.of_byte(byte));
    while (true) {
      std::size_t lowest = ranks_.size();
      std::size_t place = 0;
      for (std::size_t i = 0; i + 1 < ids.size(); ++i) {
        const auto found = ranks_.find({ids[i], ids[i + 1]});
        if (found == ranks_.end() || found->second >= lowest) continue;
        lowest = found->second;
        place = i;
      }
      if (lowest == ranks_.size()) return ids;
      ids[place] = vocabulary_.merges()[lowest].merged;
      ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(place) + 1);
    }
  }

 private:
  const Vocabulary& vocabulary_;
  std::map<std::pair<TokenId, TokenId>, std::size_t> ranks_;
};

template <typename Id>
void check_ids(const NaiveMerger& naive, PieceEncoder<Id>& encoder, std::string_view text) {
  std::vector<TokenId> expected;
  for (const std::string_view piece : reference::split(text)) {
    const std::vector<TokenId> tokens = naive.merge(piece);
    expected.insert(expected.end(), tokens.begin(), tokens.end());
  }
  for (const char* what : {"ids match the reference", "ids match the reference the second time"}) {
    IdBuffer<Id> ids;
    encoder.encode(text, ids);
    check(to_vector(ids) == expected, what);
  }
}

// A vocabulary under construction. Its tokens are made of the bytes of a small alphabet; `pool`
// contains these bytes and tokens, to draw from.
struct Recipe {
  TokenBytes tokens;
  std::vector<Merge> merges;
  std::map<std::string, TokenId> ids;
  std::vector<TokenId> pool;

  TokenId add(const std::string& token) {
    const auto id = static_cast<TokenId>(tokens.size());
    tokens.push_back(token);
    ids.emplace(token, id);
    return id;
  }
};

Recipe start_recipe(Numbers& numbers) {
  static const std::string_view kAlphabets[] = {"ab",
                                                "abc",
                                                "ab '",
                                                {"\0!", 2},
                                                {"\0\0\0.!", 5},
                                                "  \t\n",
                                                "12",
                                                "\xC3\xA9"
                                                "a",
                                                "\xE6\xBC\xA2",
                                                "\xF0\x9F\x98\x80\x81",
                                                "aa'sl "};
  Recipe recipe;
  for (std::size_t byte = 0; byte < 256; ++byte) recipe.add({static_cast<char>(byte)});
  for (const char byte : kAlphabets[numbers.below(std::size(kAlphabets))]) {
    recipe.pool.push_back(static_cast<unsigned char>(byte));
  }
  return recipe;
}

// Inserts a merge of two tokens of the pool at any position in the order, unless the pair merges
// already. The merged token may be unreachable, or produced by more than one merge.
void add_merge(Recipe& recipe, Numbers& numbers) {
  const TokenId left = recipe.pool[numbers.below(recipe.pool.size())];
  const TokenId right = recipe.pool[numbers.below(recipe.pool.size())];
  const std::size_t place = recipe.merges.size() - numbers.below(recipe.merges.size() + 1) / 4;
  const auto same = [&](const Merge& merge) { return merge.left == left && merge.right == right; };
  const std::string bytes = std::string(recipe.tokens[left]) + std::string(recipe.tokens[right]);
  if (bytes.size() > kMaxToken || std::any_of(recipe.merges.begin(), recipe.merges.end(), same)) {
    return;
  }
  const auto known = recipe.ids.find(bytes);
  const TokenId merged = known == recipe.ids.end() ? recipe.add(bytes) : known->second;
  recipe.merges.insert(recipe.merges.begin() + static_cast<std::ptrdiff_t>(place),
                       {left, right, merged});
  recipe.pool.push_back(merged);
}

// Generates a text from the recipe's tokens.
std::string write_text(const Recipe& recipe, Numbers& numbers, std::size_t max_size) {
  std::string text;
  while (numbers.left() > 0 && text.size() < max_size) {
    const std::size_t drawn = numbers.below(256);
    if (drawn == 255) {
      text += ' ';  // starts another piece
    } else {
      text += recipe.tokens[recipe.pool[drawn % recipe.pool.size()]];
    }
  }
  return text;
}

void check_recipe(Numbers numbers) {
  Recipe recipe = start_recipe(numbers);
  const std::size_t n_merges = numbers.below(64);
  for (std::size_t i = 0; i < n_merges; ++i) add_merge(recipe, numbers);
  const Vocabulary vocabulary(recipe.tokens, recipe.merges);
  const NaiveMerger naive(vocabulary);
  PieceEncoder<std::uint16_t> narrow(vocabulary);
  PieceEncoder<std::uint32_t> wide(vocabulary);
  // Short texts first, so that their pieces are in the caches when the long ones are encoded.
  constexpr std::size_t kSizes[] = {4, 10, 20, 20, 80, 300};
  for (const std::size_t size : kSizes) {
    const std::string text = write_text(recipe, numbers, size);
    check_ids(naive, narrow, text);
    check_ids(naive, wide, text);
  }
}

std::optional<MergesFile> parse(std::string_view file) {
  try {
    return parse_merges_file(file);
  } catch (const std::invalid_argument&) {
    return std::nullopt;
  }
}

// Parses the input as a vocab.bpe file, and encodes the file's own bytes, which contain many of its
// tokens.
void check_file(std::string_view file) {
  std::optional<MergesFile> parsed = parse(file);
  if (!parsed) return;
  const Vocabulary trusted(parsed->tokens, parsed->merges, std::move(parsed->index));
  const Vocabulary checked(std::move(parsed->tokens), std::move(parsed->merges));
  const NaiveMerger naive(checked);
  PieceEncoder<std::uint32_t> encoder(checked);
  check_ids(naive, encoder, file.substr(0, 500));
  for (TokenId id = 256; id < checked.tokens().size(); ++id) {
    const std::string_view token = checked.tokens()[id];
    if (token.size() <= 100) check_ids(naive, encoder, token);
    if (token.size() > PieceKey::kMaxSize) continue;
    check(trusted.whole_token(PieceKey::load_exactly(token), token.size()) == id,
          "the tokens of a file are found by their bytes");
  }
}

}  // namespace
}  // namespace fastgpt

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view bytes(reinterpret_cast<const char*>(data), size);
  fastgpt::check_file(bytes);
  fastgpt::check_recipe(fastgpt::Numbers(bytes));
  return 0;
}
