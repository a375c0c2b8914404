// Byte-pair encoding over an immutable vocabulary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

namespace fastgpt {

using TokenId = std::uint32_t;

// Two tokens that, side by side, become one. A merge's rank is its place in the vocabulary's list.
struct Merge {
  TokenId left;
  TokenId right;
  TokenId merged;
};

// The place of a merge in the list: of several possible merges, the lowest rank goes first.
using Rank = std::uint32_t;
constexpr Rank kNoMerge = std::numeric_limits<Rank>::max();

// Hash table from a pair of tokens to the rank of their merge. Open addressing, linear probing.
class MergeTable {
 public:
  explicit MergeTable(const std::vector<Merge>& merges);

  // Returns kNoMerge for a pair that does not merge.
  Rank rank(TokenId left, TokenId right) const;

 private:
  struct Slot {
    std::uint64_t pair;
    Rank rank;
  };

  std::size_t slot_of(std::uint64_t pair) const;

  std::vector<Slot> slots_;
  int shift_;
};

// All tokens' bytes in one block.
class TokenBytes {
 public:
  explicit TokenBytes(const std::vector<std::string>& tokens);

  std::size_t size() const { return begins_.size() - 1; }
  std::string_view operator[](TokenId id) const {
    return std::string_view(bytes_).substr(begins_[id], begins_[id + 1] - begins_[id]);
  }

 private:
  std::string bytes_;
  std::vector<std::size_t> begins_;  // token i is bytes_[begins_[i] : begins_[i + 1]]
};

// Hash table from a token's bytes to its id. Open addressing, linear probing. It refers to the
// TokenBytes it was built with, which must outlive it.
class TokenTable {
 public:
  explicit TokenTable(const TokenBytes& tokens);

  void insert(TokenId id);
  // Returns whether `bytes` is a token of the table, and if so, sets `id`.
  bool find(std::string_view bytes, TokenId& id) const;

 private:
  struct Slot {
    std::uint64_t hash;
    TokenId id;
  };

  const TokenBytes& tokens_;
  std::vector<Slot> slots_;
  std::size_t longest_ = 0;
};

// Turns bytes into token ids and back. Nothing changes after construction, so threads may share
// one encoder freely, and a forked child may go on using its parent's.
class BytePairEncoder {
 public:
  // `tokens` are the bytes of each id and must hold all 256 single bytes. A token that is neither
  // a byte nor made by a merge (a special token) is decoded but never encoded. Throws
  // std::invalid_argument where the two lists are not a vocabulary.
  BytePairEncoder(const std::vector<std::string>& tokens, std::vector<Merge> merges);
  BytePairEncoder(const BytePairEncoder&) = delete;
  BytePairEncoder& operator=(const BytePairEncoder&) = delete;

  // Appends the ids of any bytes, UTF-8 or not: cut into pieces (pretokenizer.hpp), and in each,
  // of the merges that are possible, the one of lowest rank, then leftmost, until none is left.
  // Time: n log n in the longest piece and linear in everything else.
  void encode(std::string_view text, std::vector<TokenId>& ids) const;

  // Returns the bytes of `count` ids. Throws std::out_of_range for an id without a token.
  std::string decode(const TokenId* ids, std::size_t count) const;

  const TokenBytes& tokens() const { return tokens_; }
  const std::vector<Merge>& merges() const { return merges_; }

 private:
  class PieceMerger;

  void check() const;
  void index_bytes();
  void index_whole_pieces();

  TokenBytes tokens_;
  std::vector<Merge> merges_;
  MergeTable ranks_;
  TokenId byte_ids_[256];
  TokenTable whole_pieces_;
};

}  // namespace fastgpt
