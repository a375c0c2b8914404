// A byte-pair vocabulary: its tokens, its merges, and tables for fast lookups of both.
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

// A merge: the neighboring tokens `left` and `right` are replaced by `merged`.
struct Merge {
  TokenId left;
  TokenId right;
  TokenId merged;
};

// The index of a merge in the vocabulary's list. Of several possible merges, the one of lowest rank
// is applied first.
using Rank = std::uint32_t;

constexpr int kRankBits = 64 - 2 * kIdBits;  // two ids and a rank are packed into 64 bits
constexpr Rank kNoMerge = (Rank{1} << kRankBits) - 1;

// Hash table from a pair of tokens to the rank of their merge, with buckets of four slots. A bucket
// is searched without branches. A pair whose bucket is full is stored in one of the next buckets.
class MergeTable {
 public:
  // The ids must be less than kMaxTokens. Throws std::invalid_argument if a pair occurs in two
  // merges.
  explicit MergeTable(const std::vector<Merge>& merges);

  // Two ids packed into the high bits of a word; the kRankBits low bits are zero.
  using Pair = std::uint64_t;
  static Pair pair(TokenId left, TokenId right) {
    return (static_cast<std::uint64_t>(left) << kIdBits | right) << kRankBits;
  }
  // A pair of reserved ids, which never merges.
  static constexpr Pair kNoPair = ~std::uint64_t{0} << kRankBits;

  // Returns the rank of the pair's merge, or kNoMerge if it does not merge.
  Rank rank(Pair pair) const {
    for (std::size_t at = home(pair);; at = (at + 1) & mask_) {
      const auto& bucket = buckets_[at].slots;
      std::uint64_t lowest = kNoMerge;
      // slot ^ pair is the rank if the slot holds this pair: its high bits cancel. For any other
      // slot a bit above the rank remains, so the value is larger than kNoMerge.
      for (const std::uint64_t slot : bucket) lowest = std::min(lowest, slot ^ pair);
      // Slots are filled from the front, so if the last one is free, the pair is in no other
      // bucket. Most buckets are not full: testing this first makes the branch predictable.
      if (bucket.back() == kFree || lowest != kNoMerge) return static_cast<Rank>(lowest);
    }
  }
  // Prefetches the bucket that rank() will read.
  void ask_for(Pair pair) const { prefetch(&buckets_[home(pair)]); }

 private:
  // A slot is the pair OR-ed with the rank in the low bits. The alignment keeps a bucket within one
  // cache line.
  struct alignas(32) Bucket {
    std::array<std::uint64_t, 4> slots;
  };
  static constexpr std::uint64_t kFree = std::numeric_limits<std::uint64_t>::max();

  std::size_t home(Pair pair) const {
    // Multiplicative hashing with 2^64 divided by the golden ratio, which spreads nearby keys over
    // the high bits.
    return static_cast<std::size_t>((pair >> kRankBits) * 0x9E3779B97F4A7C15 >> shift_);
  }

  std::vector<Bucket> buckets_;
  std::size_t mask_;
  int shift_;
};

// Validated tokens (by id) and merges (by rank). Immutable after construction.
class Vocabulary {
 public:
  // `tokens` must contain all 256 single bytes. A token that is neither a single byte nor the
  // result of a merge (a special token) can be decoded, but is never the result of encoding. Throws
  // std::invalid_argument if the two lists are not a valid vocabulary.
  Vocabulary(TokenBytes tokens, std::vector<Merge> merges);

  // Constructs a vocabulary without the two steps that take most of the other constructor's time.
  // Not checked: the merged token of each merge must be the concatenation of its parts, and
  // `whole_tokens` must contain exactly the tokens that the encoding of their own bytes results in.
  Vocabulary(TokenBytes tokens, std::vector<Merge> merges, TokenIndex whole_tokens);

  const TokenBytes& tokens() const { return tokens_; }
  const std::vector<Merge>& merges() const { return merges_; }

  TokenId of_byte(char byte) const { return of_byte_[static_cast<unsigned char>(byte)]; }
  const MergeTable& ranks() const { return ranks_; }
  Rank rank_of_bytes(char left, char right) const { return rank_of_bytes_[pair_of(left, right)]; }
  TokenId merged(Rank rank) const {
    return first_merged_ == kNoToken ? merges_[rank].merged : first_merged_ + rank;
  }

  // Returns the token that the piece is encoded to if that is a single token, so that it needs no
  // merging; otherwise kNoToken.
  TokenId whole_token(PieceKey piece, std::size_t size) const {
    return whole_tokens_.find(tokens_, piece, size);
  }
  // Prefetches the entry that whole_token() will read first.
  void ask_for_whole_token(PieceKey piece) const { whole_tokens_.ask_for(TokenIndex::hash(piece)); }

  // Returns whether there is a merge whose left token ends in byte `left` and whose right token
  // starts with byte `right`. If not, no merge can cross a position between these two bytes, and
  // the text before and after it can be encoded separately.
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
  TokenId first_merged_;  // if merge i produces token first_merged_ + i for all i, else kNoToken
  std::array<TokenId, 256> of_byte_;
  std::vector<Rank> rank_of_bytes_;                // indexed by pair_of()
  std::array<std::uint64_t, 65536 / 64> joins_{};  // bit set, indexed by pair_of()
};

}  // namespace fastgpt
