// Merges the bytes of pieces into tokens.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

#include "vocabulary.hpp"

namespace fastgpt {

// Merges one short piece: of the merges that are possible, the one of lowest rank, then leftmost,
// until none is left. Looks through all of them for the next one, which for few is quickest.
//
// Most of its time goes by waiting for the vocabulary's tables to come from memory. So the work is
// in two steps, between which one does those of other pieces.
template <unsigned kCapacity>
class ShortMerge {
 public:
  // Needs a piece of 1 to kCapacity bytes.
  void start(const Vocabulary& vocabulary, std::string_view piece);

  // Does the next merge, and asks for what look_up() will need. Returns false if there is none.
  bool merge_next(const Vocabulary& vocabulary);
  // Looks up how the token just made merges with its neighbours.
  void look_up(const Vocabulary& vocabulary);

  // Writes the tokens, and returns how many they are.
  std::size_t copy_tokens(TokenId* to) const;

 private:
  static constexpr std::uint32_t kNone =
      std::numeric_limits<std::int32_t>::max();  // quick to compare
  static_assert(std::uint64_t{kNoMerge} * kCapacity < kNone);

  std::uint32_t candidate(const Vocabulary& vocabulary, unsigned place) const;

  // Every byte is a place. The token that starts at a place reaches to the next place in use.
  unsigned size_;
  unsigned changed_;  // the place of the token just made
  std::array<TokenId, kCapacity> ids_;
  std::array<std::uint8_t, kCapacity + 1> previous_;
  std::array<std::uint8_t, kCapacity> next_;
  // By place: rank * kCapacity + place of the merge with the next token, so that the smallest is
  // the lowest rank, then leftmost; kNone if there is no such merge.
  std::array<std::uint32_t, kCapacity> candidates_;
};

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
  // Up to this many bytes, a ShortMerge is quicker than keeping a heap.
  static constexpr unsigned kShort = 64;

  void merge_by_heap(std::string_view piece);
  void link(std::string_view piece);
  void unlink_next(std::uint32_t at);
  void update(std::uint32_t at);
  Rank rank_at(std::uint32_t at) const;
  std::uint64_t candidate(std::uint32_t at) const;

  const Vocabulary& vocabulary_;
  std::vector<TokenId> tokens_;
  ShortMerge<kShort> short_merge_;
  std::vector<Node> nodes_;
  std::vector<std::uint64_t> candidates_;  // a heap, smallest first
};

}  // namespace fastgpt
