#include "tokenizer/merger.hpp"

#include <algorithm>
#include <functional>
#include <stdexcept>

#include "common/bits.hpp"
#include "common/processor.hpp"

#if defined(FASTGPT_HAS_AVX2)
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

#if defined(FASTGPT_HAS_AVX2)
struct Avx2 {
  template <std::size_t kCount>
  FASTGPT_AVX2 static std::int32_t lowest(const std::int32_t* numbers) {
    __m256i eight = load(numbers);
    for (std::size_t i = 8; i < kCount; i += 8) eight = _mm256_min_epi32(eight, load(numbers + i));
    __m128i four = _mm_min_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
    four = _mm_min_epi32(four, _mm_shuffle_epi32(four, 0x4E));  // the other half
    four = _mm_min_epi32(four, _mm_shuffle_epi32(four, 0xB1));  // the neighbour
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
  starts_ = (std::uint64_t{4} << size) - 1;
  candidates_.fill(kNone);
  ids_[0] = ids_[size + 1] = 0;  // any
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
  const unsigned gone = next_start(place);
  candidates_[gone] = kNone;
  ids_[place] = id;
  starts_ ^= std::uint64_t{1} << gone;

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
  // All starts but the two that are beside the piece.
  const std::uint64_t all = starts_ ^ 1;
  for (std::uint64_t rest = all; (rest & (rest - 1)) != 0; rest &= rest - 1) {
    *to++ = static_cast<Id>(ids_[lowest_bit(rest)]);
  }
  return static_cast<std::size_t>(to - first);
}

namespace {

// A piece that is done makes room for the next one at once, so that there are always as many on the
// way, and loops over them have a length that the processor foresees.
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

#if defined(FASTGPT_HAS_AVX2)
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
#if defined(FASTGPT_HAS_AVX2)
  if (has_avx2()) return merge_all_with_avx2(vocabulary, pieces, tokens, count);
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
  if (node.next == kNoNode) return kNoMerge;
  return vocabulary_.ranks().rank(MergeTable::pair(node.id, nodes_[node.next].id));
}

// Rank and place in one number, so that the smallest is the lowest rank, then the leftmost.
std::uint64_t Merger::candidate(std::uint32_t at) const {
  return static_cast<std::uint64_t>(nodes_[at].rank) << 32 | at;
}

}  // namespace fastgpt
