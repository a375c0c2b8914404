// Merges the bytes of pieces into tokens.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include "common/bits.hpp"
#include "tokenizer/vocabulary.hpp"

namespace fastgpt {

// The merging of one short piece: repeatedly applies the possible merge of lowest rank, of several
// with that rank the leftmost, until none is left. The next merge is found by a linear search for
// the minimum, which is fastest for this few candidates.
//
// For example, the merge of "h" and "e" in "there":
//
//   position   0  1  2  3  4  5  6   0 and 6 are sentinels
//   before     -  t  h  e  r  e  -   starts_: 1111111, position 0 on the left
//   after      -  t  he .  r  e  -   starts_: 1110111
//
// The candidate at 3 is removed; those at 1 (t, he) and 2 (he, r) are looked up again.
//
// Most of the time is spent on cache misses in the vocabulary's tables and on mispredicted
// branches. Therefore each merge is split into two steps without branches: merge_next() applies the
// merge and prefetches the table entries of the new token, and look_up() reads them. The caller
// interleaves the steps of several pieces (see merge_short), so that the misses of one overlap with
// the work on the others.
class ShortMerge {
 public:
  static constexpr std::size_t kCapacity = 32;

  // Needs a piece of 1 to kCapacity bytes.
  void start(const Vocabulary& vocabulary, std::string_view piece);

  // Applies the next merge and prefetches what look_up() will read. Returns false if no merge is
  // possible.
  template <typename Isa>
  bool merge_next(const Vocabulary& vocabulary);
  // Looks up the merges of the new token with its neighbors. Must be called after each
  // merge_next() that returned true.
  void look_up(const Vocabulary& vocabulary);

  // Writes the tokens to `to`, which must have room for one per byte, and returns their number.
  template <typename Id>
  std::size_t copy_tokens(Id* to) const;

 private:
  // A candidate is a possible merge of the token at a position with the next token, encoded as rank
  // * kCapacity + position - 1. The minimum of all candidates is then the merge of lowest rank, and
  // among equal ranks the leftmost. Values >= kNone mean that the tokens do not merge: the rank
  // kNoMerge gives kNone + position - 1.
  static constexpr auto kNone = static_cast<std::int32_t>(kNoMerge * kCapacity);
  static_assert((std::uint64_t{kNoMerge} + 1) * kCapacity <=
                std::numeric_limits<std::int32_t>::max());
  static_assert(kCapacity + 2 <= 64);

  static std::int32_t candidate(Rank rank, unsigned place) {
    return static_cast<std::int32_t>(rank * unsigned{kCapacity} + place - 1);
  }
  // Returns kNoPair if the number is 0, otherwise 0; for numbers below 2^63. OR-ing the result into
  // a pair disables it. Arithmetic, so that compilers do not emit a branch.
  static MergeTable::Pair no_pair_if_zero(std::uint64_t number) {
    return (0 - ((number - 1) >> 63)) & MergeTable::kNoPair;
  }
  // Returns the position of the token after the one at `place`.
  unsigned next_start(unsigned place) const {
    return lowest_bit(starts_ & ~std::uint64_t{1} << place);
  }

  // Positions are those of bytes, counted from 1. Positions 0 and size + 1 are sentinels, so that
  // every token has a neighbor on both sides. A token is stored at the position of its first byte.
  std::uint64_t starts_;  // bit i: a token starts at position i; the sentinels' bits are set, too
  std::array<TokenId, kCapacity + 2> ids_;
  std::array<std::int32_t, kCapacity + 1> candidates_;  // [0] is written but never read

  // Passed from merge_next() to look_up(): the positions of the new token and of the one before it,
  // and the pairs that the new token forms with its neighbors.
  unsigned changed_;
  unsigned previous_;
  MergeTable::Pair with_next_;
  MergeTable::Pair with_previous_;
};

// The tokens of a piece of up to ShortMerge::kCapacity bytes.
template <typename Id>
struct ShortTokens {
  std::array<Id, ShortMerge::kCapacity> ids;
  std::size_t count;
};

// Merges `count` pieces of 1 to ShortMerge::kCapacity bytes each, several of them interleaved,
// which is faster than one by one (see ShortMerge). Writes the tokens of pieces[i] to *tokens[i].
template <typename Id>
void merge_short(const Vocabulary& vocabulary, const std::string_view* pieces,
                 ShortTokens<Id>* const* tokens, std::size_t count);

// Merges pieces of any size. Reuses its buffers from piece to piece; not thread-safe.
//
// Pieces longer than ShortMerge::kCapacity are merged with a doubly linked list of tokens and a
// binary heap of candidates.
class Merger {
 public:
  explicit Merger(const Vocabulary& vocabulary) : vocabulary_(vocabulary) {}

  // Returns the tokens of the piece, valid until the next call. Time: O(n log n). Throws
  // std::length_error for a piece of 4 GiB.
  const std::vector<TokenId>& merge(std::string_view piece);

 private:
  // A token of a long piece, as a node of a doubly linked list. Nodes are identified by the index
  // of the token's first byte.
  struct Node {
    TokenId id;
    Rank rank;  // of the merge with the next token, or kNoMerge
    std::uint32_t previous;
    std::uint32_t next;
  };
  static constexpr std::uint32_t kNoNode = std::numeric_limits<std::uint32_t>::max();

  void merge_by_heap(std::string_view piece);
  void link(std::string_view piece);
  void unlink_next(std::uint32_t at);
  void update(std::uint32_t at);
  Rank rank_at(std::uint32_t at) const;
  std::uint64_t candidate(std::uint32_t at) const;

  const Vocabulary& vocabulary_;
  std::vector<TokenId> tokens_;
  ShortMerge short_merge_;
  std::vector<Node> nodes_;
  std::vector<std::uint64_t> candidates_;  // a min-heap, which may contain outdated entries
};

}  // namespace fastgpt
