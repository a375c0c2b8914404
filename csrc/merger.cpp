#include "merger.hpp"

#include <algorithm>
#include <functional>
#include <stdexcept>

namespace fastgpt {

template <unsigned kCapacity>
void ShortMerge<kCapacity>::start(const Vocabulary& vocabulary, std::string_view piece) {
  size_ = static_cast<unsigned>(piece.size());
  for (unsigned i = 0; i < size_; ++i) {
    ids_[i] = vocabulary.of_byte(piece[i]);
    next_[i] = static_cast<std::uint8_t>(i + 1);
    previous_[i + 1] = static_cast<std::uint8_t>(i);
  }
  candidates_.fill(kNone);
  for (unsigned i = 0; i + 1 < size_; ++i) {
    const Rank rank = vocabulary.rank_of_bytes(piece[i], piece[i + 1]);
    candidates_[i] = rank == kNoMerge ? kNone : rank * kCapacity + i;
  }
}

template <unsigned kCapacity>
bool ShortMerge<kCapacity>::merge_next(const Vocabulary& vocabulary) {
  std::uint32_t lowest = kNone;
  for (const std::uint32_t candidate : candidates_) lowest = std::min(lowest, candidate);
  if (lowest == kNone) return false;
  changed_ = lowest % kCapacity;
  ids_[changed_] = vocabulary.merged(lowest / kCapacity);
  candidates_[next_[changed_]] = kNone;
  const unsigned next = next_[next_[changed_]];
  next_[changed_] = static_cast<std::uint8_t>(next);
  previous_[next] = static_cast<std::uint8_t>(changed_);
  if (next < size_) vocabulary.ask_for_rank(ids_[changed_], ids_[next]);
  if (changed_ > 0) vocabulary.ask_for_rank(ids_[previous_[changed_]], ids_[changed_]);
  return true;
}

template <unsigned kCapacity>
void ShortMerge<kCapacity>::look_up(const Vocabulary& vocabulary) {
  candidates_[changed_] = candidate(vocabulary, changed_);
  if (changed_ == 0) return;
  const unsigned previous = previous_[changed_];
  candidates_[previous] = candidate(vocabulary, previous);
}

template <unsigned kCapacity>
std::uint32_t ShortMerge<kCapacity>::candidate(const Vocabulary& vocabulary, unsigned place) const {
  const unsigned next = next_[place];
  if (next == size_) return kNone;
  const Rank rank = vocabulary.rank(ids_[place], ids_[next]);
  return rank == kNoMerge ? kNone : rank * kCapacity + place;
}

template <unsigned kCapacity>
std::size_t ShortMerge<kCapacity>::copy_tokens(TokenId* to) const {
  TokenId* const first = to;
  for (unsigned place = 0; place < size_; place = next_[place]) *to++ = ids_[place];
  return static_cast<std::size_t>(to - first);
}

template class ShortMerge<16>;

const std::vector<TokenId>& Merger::merge(std::string_view piece) {
  tokens_.clear();
  if (piece.size() > kShort) {
    merge_by_heap(piece);
  } else {
    short_merge_.start(vocabulary_, piece);
    while (short_merge_.merge_next(vocabulary_)) short_merge_.look_up(vocabulary_);
    tokens_.resize(piece.size());
    tokens_.resize(short_merge_.copy_tokens(tokens_.data()));
  }
  return tokens_;
}

void Merger::merge_by_heap(std::string_view piece) {
  link(piece);
  while (!candidates_.empty()) {
    std::pop_heap(candidates_.begin(), candidates_.end(), std::greater<>());
    const auto at = static_cast<std::uint32_t>(candidates_.back());
    const auto rank = static_cast<Rank>(candidates_.back() >> 32);
    candidates_.pop_back();
    // A candidate is out of date when another merge has taken one of its tokens since.
    if (nodes_[at].rank != rank) continue;
    nodes_[at].id = vocabulary_.merged(rank);
    unlink_next(at);
    update(at);
    if (nodes_[at].previous != kNoNode) update(nodes_[at].previous);
  }
  for (std::uint32_t at = 0; at != kNoNode; at = nodes_[at].next) tokens_.push_back(nodes_[at].id);
}

// Sets up one node a byte, and a candidate for each pair that merges.
void Merger::link(std::string_view piece) {
  if (piece.size() >= kNoNode) {
    throw std::length_error("a run of 4 GiB without a break between words: split the text");
  }
  const auto count = static_cast<std::uint32_t>(piece.size());
  nodes_.resize(count);
  for (std::uint32_t i = 0; i < count; ++i) {
    nodes_[i] = {vocabulary_.of_byte(piece[i]), kNoMerge, i == 0 ? kNoNode : i - 1,
                 i + 1 == count ? kNoNode : i + 1};
  }
  candidates_.clear();
  for (std::uint32_t i = 0; i < count; ++i) {
    nodes_[i].rank = rank_at(i);
    if (nodes_[i].rank != kNoMerge) candidates_.push_back(candidate(i));
  }
  std::make_heap(candidates_.begin(), candidates_.end(), std::greater<>());
}

void Merger::unlink_next(std::uint32_t at) {
  Node& gone = nodes_[nodes_[at].next];
  gone.rank = kNoMerge;
  nodes_[at].next = gone.next;
  if (gone.next != kNoNode) nodes_[gone.next].previous = at;
}

// Looks up the merge of a node whose token or neighbour has changed.
void Merger::update(std::uint32_t at) {
  nodes_[at].rank = rank_at(at);
  if (nodes_[at].rank == kNoMerge) return;
  candidates_.push_back(candidate(at));
  std::push_heap(candidates_.begin(), candidates_.end(), std::greater<>());
}

Rank Merger::rank_at(std::uint32_t at) const {
  const Node& node = nodes_[at];
  return node.next == kNoNode ? kNoMerge : vocabulary_.rank(node.id, nodes_[node.next].id);
}

// Rank and place in one number, so that the smallest is the lowest rank, then the leftmost.
std::uint64_t Merger::candidate(std::uint32_t at) const {
  return static_cast<std::uint64_t>(nodes_[at].rank) << 32 | at;
}

}  // namespace fastgpt
