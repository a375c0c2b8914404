#include "tokenizer/vocabulary.hpp"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

#include "tokenizer/merger.hpp"

namespace fastgpt {
namespace {

std::string numbered(const char* what, std::size_t number) {
  return std::string(what) + " " + std::to_string(number);
}

// Returns the merges. Throws std::invalid_argument if ids or ranks do not fit into their bits of
// the packed tables, or if a merge refers to an id that is out of range.
std::vector<Merge> checked_size(std::vector<Merge> merges, const TokenBytes& tokens) {
  const auto check_size = [](std::size_t size, std::size_t most, const char* what) {
    if (size <= most) return;
    throw std::invalid_argument("a vocabulary can have at most " + std::to_string(most) + what +
                                ", not " + std::to_string(size));
  };
  check_size(tokens.size(), kMaxTokens, " tokens");
  check_size(merges.size(), kNoMerge - 1, " merges");
  for (std::size_t i = 0; i < merges.size(); ++i) {
    const Merge& merge = merges[i];
    if (std::max({merge.left, merge.right, merge.merged}) >= tokens.size()) {
      throw std::invalid_argument(numbered("merge", i) + " refers to an id that has no token");
    }
  }
  return merges;
}

}  // namespace

MergeTable::MergeTable(const std::vector<Merge>& merges) {
  int bits = 2;
  while ((std::size_t{2} << bits) < merges.size()) ++bits;  // keep at least half of the slots free
  const Bucket free = {{kFree, kFree, kFree, kFree}};
  buckets_.assign(std::size_t{1} << bits, free);
  mask_ = buckets_.size() - 1;
  shift_ = 64 - bits;
  constexpr std::size_t kAhead = 16;  // prefetch distance, in merges
  for (std::size_t i = 0; i < merges.size(); ++i) {
    if (i + kAhead < merges.size())
      ask_for(pair(merges[i + kAhead].left, merges[i + kAhead].right));
    const auto [left, right, merged] = merges[i];
    if (const Rank other = rank(pair(left, right)); other != kNoMerge) {
      throw std::invalid_argument(numbered("merge", i) + " repeats " + numbered("merge", other));
    }
    const std::uint64_t slot = pair(left, right) | i;
    std::size_t at = home(slot);
    while (buckets_[at].slots.back() != kFree) at = (at + 1) & mask_;
    *std::find(buckets_[at].slots.begin(), buckets_[at].slots.end(), kFree) = slot;
  }
}

void TokenBytes::push_back(std::string_view token) {
  const std::size_t begin = begins_.back();
  const std::size_t end = begin + token.size();
  if (end > std::numeric_limits<std::uint32_t>::max()) {
    throw std::invalid_argument("the tokens of a vocabulary can have at most 4 GiB in total");
  }
  if (end + kPadding > bytes_.size()) bytes_.resize(2 * (end + kPadding));
  std::memcpy(bytes_.data() + begin, token.data(), token.size());
  begins_.push_back(static_cast<std::uint32_t>(end));
}

Vocabulary::Vocabulary(TokenBytes tokens, std::vector<Merge> merges)
    : Vocabulary(std::move(tokens), std::move(merges), TokenIndex()) {
  check_merges();
  index_whole_tokens();
}

Vocabulary::Vocabulary(TokenBytes tokens, std::vector<Merge> merges, TokenIndex whole_tokens)
    : tokens_(std::move(tokens)),
      merges_(checked_size(std::move(merges), tokens_)),
      ranks_(merges_),
      whole_tokens_(std::move(whole_tokens)) {
  index_bytes();
  index_merges();
}

// Checks that the merged token of each merge is the concatenation of its parts.
void Vocabulary::check_merges() const {
  for (std::size_t i = 0; i < merges_.size(); ++i) {
    const std::string_view left = tokens_[merges_[i].left];
    const std::string_view right = tokens_[merges_[i].right];
    const std::string_view merged = tokens_[merges_[i].merged];
    if (merged.size() != left.size() + right.size() || merged.substr(0, left.size()) != left ||
        merged.substr(left.size()) != right) {
      throw std::invalid_argument(numbered("merge", i) +
                                  " produces a token that is not the concatenation of its parts");
    }
  }
}

// Sets of_byte_. Checks that no token is empty, and that each byte is exactly one token.
void Vocabulary::index_bytes() {
  of_byte_.fill(kNoToken);
  for (TokenId id = 0; id < tokens_.size(); ++id) {
    const std::string_view bytes = tokens_[id];
    if (bytes.empty()) throw std::invalid_argument(numbered("token", id) + " is empty");
    if (bytes.size() > 1) continue;
    TokenId& of_byte = of_byte_[static_cast<unsigned char>(bytes[0])];
    if (of_byte != kNoToken) {
      throw std::invalid_argument(numbered("token", id) + " is the same byte as " +
                                  numbered("token", of_byte));
    }
    of_byte = id;
  }
  const auto* missing = std::find(of_byte_.begin(), of_byte_.end(), kNoToken);
  if (missing != of_byte_.end()) {
    const auto byte = static_cast<std::size_t>(missing - of_byte_.begin());
    throw std::invalid_argument("no token for " + numbered("byte", byte));
  }
}

// Sets joins_, rank_of_bytes_ and first_merged_.
void Vocabulary::index_merges() {
  rank_of_bytes_.assign(65536, kNoMerge);
  first_merged_ = merges_.empty() ? kNoToken : merges_[0].merged;
  for (std::size_t i = 0; i < merges_.size(); ++i) {
    const std::string_view left = tokens_[merges_[i].left];
    const std::string_view right = tokens_[merges_[i].right];
    const std::size_t pair = pair_of(left.back(), right.front());
    joins_[pair / 64] |= std::uint64_t{1} << pair % 64;
    if (left.size() + right.size() == 2) rank_of_bytes_[pair] = static_cast<Rank>(i);
    if (merges_[i].merged != merges_[0].merged + i) first_merged_ = kNoToken;
  }
}

// Sets whole_tokens_. Merging the bytes of a token need not result in this token: it does not for
// special tokens, and in some vocabularies not for others either. So each token's bytes are merged,
// and only the tokens that result from it are indexed.
void Vocabulary::index_whole_tokens() {
  Merger merger(*this);
  for (TokenId id = 0; id < tokens_.size(); ++id) {
    const std::vector<TokenId>& ids = merger.merge(tokens_[id]);
    if (ids.size() != 1 || ids[0] != id) continue;
    whole_tokens_.insert(tokens_, TokenIndex::hash(tokens_[id]), id);
  }
}

}  // namespace fastgpt
