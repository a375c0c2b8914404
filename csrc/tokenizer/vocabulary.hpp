// What a byte-pair vocabulary is: tokens, the merges that make them, and quick ways to look both
// up.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include "common/prefetch.hpp"
#include "tokenizer/token_bytes.hpp"
#include "tokenizer/token_index.hpp"

namespace fastgpt {

// Two tokens that, side by side, become one. A merge's rank is its place in the vocabulary's list.
struct Merge {
  TokenId left;
  TokenId right;
  TokenId merged;
};

// The place of a merge in the list: of several possible merges, the lowest rank goes first.
using Rank = std::uint32_t;

constexpr int kRankBits = 64 - 2 * kIdBits;  // a pair of ids and a rank share 64 bits
constexpr Rank kNoMerge = (Rank{1} << kRankBits) - 1;

// Hash table from a pair of tokens to the rank of their merge. A bucket of four is searched without
// a branch; a pair whose bucket was full is in one that follows.
class MergeTable {
 public:
  // The ids must be less than kMaxTokens. Throws std::invalid_argument for a pair that merges
  // twice.
  explicit MergeTable(const std::vector<Merge>& merges);

  // Two tokens in one number.
  using Pair = std::uint64_t;
  static Pair pair(TokenId left, TokenId right) {
    return (static_cast<std::uint64_t>(left) << kIdBits | right) << kRankBits;
  }
  // No such tokens: what merges with nothing.
  static constexpr Pair kNoPair = ~std::uint64_t{0} << kRankBits;

  // Returns kNoMerge for a pair that does not merge.
  Rank rank(Pair pair) const {
    for (std::size_t at = home(pair);; at = (at + 1) & mask_) {
      const auto& bucket = buckets_[at].slots;
      std::uint64_t lowest = kNoMerge;
      // Only the pair's own slot differs from it by no more than a rank.
      for (const std::uint64_t slot : bucket) lowest = std::min(lowest, slot ^ pair);
      // In this order the first question nearly always settles it.
      if (bucket.back() == kFree || lowest != kNoMerge) return static_cast<Rank>(lowest);
    }
  }
  // Has the processor fetch what rank() will look at.
  void ask_for(Pair pair) const { prefetch(&buckets_[home(pair)]); }

 private:
  // A slot is a pair above its rank in the low bits. No bucket lies across two cache lines.
  struct alignas(32) Bucket {
    std::array<std::uint64_t, 4> slots;
  };
  static constexpr std::uint64_t kFree = std::numeric_limits<std::uint64_t>::max();

  std::size_t home(Pair pair) const {
    // 2^64 divided by the golden ratio: multiplying by it spreads nearby keys over the high bits.
    return static_cast<std::size_t>((pair >> kRankBits) * 0x9E3779B97F4A7C15 >> shift_);
  }

  std::vector<Bucket> buckets_;
  std::size_t mask_;
  int shift_;
};

// Tokens by id and merges by rank, checked. Nothing changes after construction.
class Vocabulary {
 public:
  // `tokens` must hold all 256 single bytes. A token that is neither a byte nor made by a merge (a
  // special token) is decoded but never encoded. Throws std::invalid_argument where the two lists
  // are not a vocabulary.
  Vocabulary(TokenBytes tokens, std::vector<Merge> merges);

  // The same, for the caller who knows that `whole_tokens` is what it has to be, and that merges
  // make tokens of their parts. Finding it out takes most of the time that the other constructor
  // does.
  Vocabulary(TokenBytes tokens, std::vector<Merge> merges, TokenIndex whole_tokens);

  const TokenBytes& tokens() const { return tokens_; }
  const std::vector<Merge>& merges() const { return merges_; }

  TokenId of_byte(char byte) const { return of_byte_[static_cast<unsigned char>(byte)]; }
  const MergeTable& ranks() const { return ranks_; }
  Rank rank_of_bytes(char left, char right) const { return rank_of_bytes_[pair_of(left, right)]; }
  TokenId merged(Rank rank) const {
    return first_merged_ == kNoToken ? merges_[rank].merged : first_merged_ + rank;
  }

  // The tokens that their own bytes are encoded to: a piece that is one of them needs no merging.
  TokenId whole_token(PieceKey piece, std::size_t size) const {
    return whole_tokens_.find(tokens_, piece, size);
  }
  // Has the processor fetch what whole_token() will look at.
  void ask_for_whole_token(PieceKey piece) const { whole_tokens_.ask_for(TokenIndex::hash(piece)); }

  // Whether some merge joins tokens at a place between these two bytes. Where none does, what lies
  // left and right of the place can be encoded apart.
  bool joins(char left, char right) const {
    const std::size_t pair = pair_of(left, right);
    return (joins_[pair / 64] >> pair % 64 & 1) != 0;
  }

 private:
  static std::size_t pair_of(char left, char right) {
    return static_cast<std::size_t>(static_cast<unsigned char>(left)) << 8 |
           static_cast<unsigned char>(right);
  }

  void check_merges() const;
  void index_bytes();
  void index_merges();
  void index_whole_tokens();

  TokenBytes tokens_;
  std::vector<Merge> merges_;
  MergeTable ranks_;
  TokenIndex whole_tokens_;
  TokenId first_merged_;  // where merge i makes token first_merged_ + i; else kNoToken
  std::array<TokenId, 256> of_byte_;
  std::vector<Rank> rank_of_bytes_;                // by pair of bytes
  std::array<std::uint64_t, 65536 / 64> joins_{};  // a bit a pair of bytes
};

}  // namespace fastgpt
