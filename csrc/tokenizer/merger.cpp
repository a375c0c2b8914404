#include "tokenizer/merger.hpp"

#include <algorithm>
#include <functional>
#include <stdexcept>

#include "common/bits.hpp"
#include "common/processor.hpp"

#if defined(FASTGPT_X86)
#include <immintrin.h>
#endif

namespace fastgpt {
namespace {

struct Portable {
  template <std::size_t kCount>
  static std::int32_t lowest(const std::int32_t* numbers) {
    return *std::min_element(numbers, numbers + kCount);
  }
};

#if defined(FASTGPT_X86)
struct Avx2 {
  template <std::size_t kCount>
  FASTGPT_AVX2 static std::int32_t lowest(const std::int32_t* numbers) {
    __m256i eight = load(numbers);
    for (std::size_t i = 8; i < kCount; i += 8) eight = _mm256_min_epi32(eight, load(numbers + i));
    __m128i four = _mm_min_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_min_epi32(four, _mm_shuffle_epi32(four, 0x4E));  // swaps the 64-bit halves
    four = _mm_min_epi32(four, _mm_shuffle_epi32(four, 0xB1));  // swaps neighboring lanes
    return _mm_cvtsi128_si32(four);
  }

 private:
  FASTGPT_AVX2 static __m256i load(const std::int32_t* numbers) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers));
  }
};
#endif

}  // namespace

inline void ShortMerge::start(const Vocabulary& vocabulary, std::string_view piece) {
  const auto size = static_cast<unsigned>(piece.size());
  starts_ = (std::uint64_t{4} << size) - 1;  // bits 0 to size + 1
  candidates_.fill(kNone);
  ids_[0] = ids_[size + 1] = 0;  // sentinels: any id, their pairs are disabled
  ids_[1] = vocabulary.of_byte(piece[0]);
  for (unsigned i = 1; i < size; ++i) {
    ids_[i + 1] = vocabulary.of_byte(piece[i]);
    candidates_[i] = candidate(vocabulary.rank_of_bytes(piece[i - 1], piece[i]), i);
  }
}

template <typename Isa>
inline bool ShortMerge::merge_next(const Vocabulary& vocabulary) {
  const std::int32_t lowest = Isa::template lowest<kCapacity>(&candidates_[1]);
  if (lowest >= kNone) return false;
  const unsigned place = static_cast<unsigned>(lowest) % kCapacity + 1;
  const TokenId id = vocabulary.merged(static_cast<Rank>(lowest) / kCapacity);
  // The merged token replaces the one at `place`; the one after it is removed.
  const unsigned gone = next_start(place);
  candidates_[gone] = kNone;
  ids_[place] = id;
  starts_ ^= std::uint64_t{1} << gone;

  // A pair with a sentinel does not merge: `previous` is 0 for the first token, and no bit above
  // `next` is set if that is the sentinel after the piece.
  const unsigned next = next_start(place);
  const unsigned previous = highest_bit(starts_ & ((std::uint64_t{1} << place) - 1));
  with_next_ = MergeTable::pair(id, ids_[next]) | no_pair_if_zero(starts_ >> next >> 1);
  with_previous_ = MergeTable::pair(ids_[previous], id) | no_pair_if_zero(previous);
  changed_ = place;
  previous_ = previous;
  vocabulary.ranks().ask_for(with_next_);
  vocabulary.ranks().ask_for(with_previous_);
  return true;
}

inline void ShortMerge::look_up(const Vocabulary& vocabulary) {
  candidates_[changed_] = candidate(vocabulary.ranks().rank(with_next_), changed_);
  candidates_[previous_] = candidate(vocabulary.ranks().rank(with_previous_), previous_);
}

template <typename Id>
inline std::size_t ShortMerge::copy_tokens(Id* to) const {
  Id* const first = to;
  // Clear the bit of the first sentinel, and stop at the last bit, which is the other sentinel.
  const std::uint64_t all = starts_ ^ 1;
  for (std::uint64_t rest = all; (rest & (rest - 1)) != 0; rest &= rest - 1) {
    *to++ = static_cast<Id>(ids_[lowest_bit(rest)]);
  }
  return static_cast<std::size_t>(to - first);
}

namespace {

// Merges the pieces kLanes at a time. Each round first applies one merge in every lane, which
// prefetches the table entries that the lane needs next, then looks up these entries in every lane;
// by the time that a lane's entries are read, they have arrived in the cache. When a piece is done,
// its lane continues with the next piece at once, so the number of lanes stays the same until the
// end, and the branches of the loops over them are predictable. After the last piece has been
// started, `going` shrinks: a finished lane is replaced by the last one of the list.
template <typename Isa, typename Id>
inline void merge_all(const Vocabulary& vocabulary, const std::string_view* pieces,
                      ShortTokens<Id>* const* tokens, std::size_t count) {
  constexpr std::size_t kLanes = 8;
  struct Lane {
    ShortMerge merge;
    std::size_t piece;
  };
  std::array<Lane, kLanes> lanes;
  std::array<Lane*, kLanes> going;
  std::size_t next = 0;
  const auto start_next = [&](Lane& lane) {
    lane.merge.start(vocabulary, pieces[next]);
    lane.piece = next++;
  };
  std::size_t left = std::min(count, kLanes);
  for (std::size_t i = 0; i < left; ++i) {
    going[i] = &lanes[i];
    start_next(lanes[i]);
  }
  while (left > 0) {
    for (std::size_t i = 0; i < left;) {
      Lane& lane = *going[i];
      if (lane.merge.template merge_next<Isa>(vocabulary)) {
        ++i;
        continue;
      }
      tokens[lane.piece]->count = lane.merge.copy_tokens(tokens[lane.piece]->ids.data());
      if (next < count) {
        start_next(lane);
      } else {
        going[i] = going[--left];
      }
    }
    for (std::size_t i = 0; i < left; ++i) going[i]->merge.look_up(vocabulary);
  }
}

#if defined(FASTGPT_X86)
template <typename Id>
FASTGPT_AVX2_FLAT void merge_all_with_avx2(const Vocabulary& vocabulary,
                                           const std::string_view* pieces,
                                           ShortTokens<Id>* const* tokens, std::size_t count) {
  merge_all<Avx2>(vocabulary, pieces, tokens, count);
}
#endif

}  // namespace

template <typename Id>
void merge_short(const Vocabulary& vocabulary, const std::string_view* pieces,
                 ShortTokens<Id>* const* tokens, std::size_t count) {
#if defined(FASTGPT_X86)
  if (processor().avx2) return merge_all_with_avx2(vocabulary, pieces, tokens, count);
#endif
  merge_all<Portable>(vocabulary, pieces, tokens, count);
}

template void merge_short(const Vocabulary&, const std::string_view*,
                          ShortTokens<std::uint16_t>* const*, std::size_t);
template void merge_short(const Vocabulary&, const std::string_view*,
                          ShortTokens<std::uint32_t>* const*, std::size_t);

const std::vector<TokenId>& Merger::merge(std::string_view piece) {
  tokens_.clear();
  if (piece.size() > ShortMerge::kCapacity) {
    merge_by_heap(piece);
  } else {
    short_merge_.start(vocabulary_, piece);
    while (short_merge_.merge_next<Portable>(vocabulary_)) short_merge_.look_up(vocabulary_);
    tokens_.resize(piece.size());
    tokens_.resize(short_merge_.copy_tokens(tokens_.data()));
  }
  return tokens_;
}

// Applies merges in the order of the heap. Entries are not removed from the heap when a merge
// changes one of their tokens; they are recognized as outdated when they reach its front.
void Merger::merge_by_heap(std::string_view piece) {
  link(piece);
  while (!candidates_.empty()) {
    std::pop_heap(candidates_.begin(), candidates_.end(), std::greater<>());
    const auto at = static_cast<std::uint32_t>(candidates_.back());
    const auto rank = static_cast<Rank>(candidates_.back() >> 32);
    candidates_.pop_back();
    // The candidate is outdated if another merge has taken one of its tokens since; then the node's
    // rank is that of another pair, or kNoMerge.
    if (nodes_[at].rank != rank) continue;
    nodes_[at].id = vocabulary_.merged(rank);
    unlink_next(at);
    update(at);
    if (nodes_[at].previous != kNoNode) update(nodes_[at].previous);
  }
  for (std::uint32_t at = 0; at != kNoNode; at = nodes_[at].next) tokens_.push_back(nodes_[at].id);
}

// Initializes one node per byte and a candidate for each pair that merges.
void Merger::link(std::string_view piece) {
  if (piece.size() >= kNoNode) {
    throw std::length_error("the text has 4 GiB without a word boundary; split it");
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

// Removes the node after `at` from the list, and marks its candidates as outdated.
void Merger::unlink_next(std::uint32_t at) {
  Node& gone = nodes_[nodes_[at].next];
  gone.rank = kNoMerge;
  nodes_[at].next = gone.next;
  if (gone.next != kNoNode) nodes_[gone.next].previous = at;
}

// Updates the rank of a node whose token or next token has changed, and adds a candidate if they
// merge.
void Merger::update(std::uint32_t at) {
  nodes_[at].rank = rank_at(at);
  if (nodes_[at].rank == kNoMerge) return;
  candidates_.push_back(candidate(at));
  std::push_heap(candidates_.begin(), candidates_.end(), std::greater<>());
}

Rank Merger::rank_at(std::uint32_t at) const {
  const Node& node = nodes_[at];
  if (node.next == kNoNode) return kNoMerge;
  return vocabulary_.ranks().rank(MergeTable::pair(node.id, nodes_[node.next].id));
}

// Returns the rank and the position packed into one number, so that the minimum is the candidate of
// lowest rank, and among equal ranks the leftmost.
std::uint64_t Merger::candidate(std::uint32_t at) const {
  return static_cast<std::uint64_t>(nodes_[at].rank) << 32 | at;
}

}  // namespace fastgpt
