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

// Merges one short piece: of the merges that are possible, the one of lowest rank, then leftmost,
// until none is left. Looks through all of them for the next one, which for few is quickest.
//
// Most of its time goes by waiting for the vocabulary's tables to come from memory, and for
// branches that the processor did not foresee. So the work is in two steps, between which one does
// those of other pieces, and neither has a branch.
class ShortMerge {
 public:
  static constexpr std::size_t kCapacity = 32;

  // Needs a piece of 1 to kCapacity bytes.
  void start(const Vocabulary& vocabulary, std::string_view piece);

  // Does the next merge, and asks for what look_up() will need. Returns false if there is none.
  template <typename Isa>
  bool merge_next(const Vocabulary& vocabulary);
  // Looks up how the token just made merges with its neighbours.
  void look_up(const Vocabulary& vocabulary);

  // Writes the tokens, and returns how many they are.
  template <typename Id>
  std::size_t copy_tokens(Id* to) const;

 private:
  // A candidate is rank * kCapacity + place - 1 of a merge with the next token, so that the
  // smallest is the lowest rank, then leftmost; kNone or more if there is no such merge.
  static constexpr auto kNone = static_cast<std::int32_t>(kNoMerge * kCapacity);
  static_assert((std::uint64_t{kNoMerge} + 1) * kCapacity <=
                std::numeric_limits<std::int32_t>::max());
  static_assert(kCapacity + 2 <= 64);

  static std::int32_t candidate(Rank rank, unsigned place) {
    return static_cast<std::int32_t>(rank * unsigned{kCapacity} + place - 1);
  }
  // Written so that no compiler makes a branch of it.
  static MergeTable::Pair no_pair_if_zero(std::uint64_t number) {
    return (0 - ((number - 1) >> 63)) & MergeTable::kNoPair;
  }
  unsigned next_start(unsigned place) const {
    return lowest_bit(starts_ & ~std::uint64_t{1} << place);
  }

  // Every byte is a place, counted from 1; so that every token has neighbours, there is a place
  // before and one behind the piece.
  std::uint64_t starts_;  // a bit for each place where a token starts, and for these two
  std::array<TokenId, kCapacity + 2> ids_;
  std::array<std::int32_t, kCapacity + 1> candidates_;

  // Of the token just made.
  unsigned changed_;
  unsigned previous_;
  MergeTable::Pair with_next_;
  MergeTable::Pair with_previous_;
};

// The tokens of a short piece.
template <typename Id>
struct ShortTokens {
  std::array<Id, ShortMerge::kCapacity> ids;
  std::size_t count;
};

// Merges pieces of 1 to ShortMerge::kCapacity bytes, some at a time: quicker than one by one.
template <typename Id>
void merge_short(const Vocabulary& vocabulary, const std::string_view* pieces,
                 ShortTokens<Id>* const* tokens, std::size_t count);

// Merges pieces of any size. Keeps its buffers from piece to piece; for one thread at a time.
class Merger {
 public:
  explicit Merger(const Vocabulary& vocabulary) : vocabulary_(vocabulary) {}

  // Returns the tokens of the piece, valid until the next call. Time: n log n.
  const std::vector<TokenId>& merge(std::string_view piece);

 private:
  // A token of a long piece, in a doubly linked list.
  struct Node {
    TokenId id;
    Rank rank;  // of merging it with the next
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
  std::vector<std::uint64_t> candidates_;  // a heap, smallest first
};

}  // namespace fastgpt
