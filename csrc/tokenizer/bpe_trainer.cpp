#include "tokenizer/bpe_trainer.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>

#include "common/parallel.hpp"
#include "common/prefetch.hpp"
#include "tokenizer/merges_file.hpp"
#include "tokenizer/pretokenizer.hpp"

namespace fastgpt {
namespace {

// Slots with values below kBoundary hold token ids. The slot before each word holds kBoundary plus
// the number of the word, and ends the word before it.
constexpr std::uint32_t kBoundary = std::uint32_t{1} << 31;
constexpr std::uint32_t kInsideToken = std::numeric_limits<std::uint32_t>::max();

constexpr std::size_t kNowhere = std::numeric_limits<std::size_t>::max();

// Pairs are collected whose count is at least the highest bound divided by this. With 8, the words
// are scanned too often; with 8192, too many rare pairs are kept. The merges do not depend on it.
constexpr std::uint64_t kCollectedFraction = 512;

// Binary logarithm of the number of bounds (see bound_counts): few enough to stay in the cache.
constexpr int kBoundBits = 18;

// Prefetch distance, in steps.
constexpr std::size_t kAhead = 16;

std::uint64_t pair_of(TokenId left, TokenId right) {
  return static_cast<std::uint64_t>(left) << 32 | right;
}

// Returns the hash of a pair.
std::uint64_t spread(std::uint64_t pair) {
  pair *= 0x9E3779B97F4A7C15;  // 2^64 divided by the golden ratio
  return (pair ^ pair >> 32) * 0xD6E8FEB86659FD93;
}

std::size_t bound_of(std::uint64_t pair) { return spread(pair) >> (64 - kBoundBits); }

// Returns the id of each byte in GPT-2's order.
std::array<TokenId, 256> gpt2_byte_ids() {
  const TokenBytes bytes = parse_merges_file("").tokens;
  std::array<TokenId, 256> ids{};
  for (TokenId id = 0; id < bytes.size(); ++id) {
    ids[static_cast<unsigned char>(bytes[id].front())] = id;
  }
  return ids;
}

// Returns the last offset at which starts_piece() holds, or 0 if there is none.
std::size_t last_start(std::string_view text) {
  for (std::size_t at = text.size(); at-- > 1;) {
    if (starts_piece(text, at)) return at;
  }
  return 0;
}

}  // namespace

void PairTable::clear() {
  constexpr int kFirstBits = 12;
  entries_.assign(std::size_t{1} << kFirstBits, Entry{kFree, 0, 0, 0});
  shift_ = 64 - kFirstBits;
  size_ = 0;
}

PairTable::Entry& PairTable::insert(std::uint64_t pair) {
  std::size_t at = slot_of(pair);
  if (entries_[at].pair == pair) return entries_[at];
  if (2 * ++size_ > entries_.size()) {
    grow();
    at = slot_of(pair);
  }
  entries_[at].pair = pair;
  return entries_[at];
}

PairTable::Entry* PairTable::find(std::uint64_t pair) {
  Entry& entry = entries_[slot_of(pair)];
  return entry.pair == pair ? &entry : nullptr;
}

void PairTable::prefetch_slot(std::uint64_t pair) const {
  prefetch(&entries_[spread(pair) >> shift_]);
}

// Returns the index of the slot that holds the pair, or of the free slot where it would be
// inserted.
std::size_t PairTable::slot_of(std::uint64_t pair) const {
  std::size_t at = spread(pair) >> shift_;
  while (entries_[at].pair != pair && entries_[at].pair != kFree) {
    at = (at + 1) & (entries_.size() - 1);
  }
  return at;
}

void PairTable::grow() {
  std::vector<Entry> old(2 * entries_.size(), Entry{kFree, 0, 0, 0});
  old.swap(entries_);
  --shift_;
  for (const Entry& entry : old) {
    if (entry.pair != kFree) entries_[slot_of(entry.pair)] = entry;
  }
}

PairMerger::PairMerger(const PieceCounter& pieces, std::uint64_t min_count)
    : min_count_(std::max<std::uint64_t>(min_count, 1)), lengths_(256, 1) {
  left_.by_token.resize(256);
  right_.by_token.resize(256);
  lay_out(pieces);
}

std::optional<Merge> PairMerger::merge_next() {
  while (!find_candidate()) {
    if (threshold_ <= min_count_) return std::nullopt;
    collect_pairs();
  }
  const PairTable::Entry entry = *pairs_.find(heap_.front().pair);
  std::pop_heap(heap_.begin(), heap_.end());
  heap_.pop_back();

  const Merge merge{static_cast<TokenId>(entry.pair >> 32), static_cast<TokenId>(entry.pair),
                    static_cast<TokenId>(lengths_.size())};
  lengths_.push_back(lengths_[merge.left] + lengths_[merge.right]);
  left_.by_token.emplace_back();
  right_.by_token.emplace_back();
  replace(entry, merge);
  update_counts(merge);
  return merge;
}

// Fills slots_ and word_counts_. Pieces of a single byte contain no pair and are left out.
void PairMerger::lay_out(const PieceCounter& pieces) {
  const std::array<TokenId, 256> byte_ids = gpt2_byte_ids();
  pieces.for_each([&](std::string_view piece, Count count) {
    if (piece.size() < 2) return;
    if (slots_.size() + piece.size() >= std::numeric_limits<std::uint32_t>::max()) {
      throw std::length_error("the distinct words of the text exceed 4 GiB; train on less text");
    }
    slots_.push_back(kBoundary + static_cast<std::uint32_t>(word_counts_.size()));
    word_counts_.push_back(count);
    for (const char byte : piece) slots_.push_back(byte_ids[static_cast<unsigned char>(byte)]);
  });
  slots_.push_back(kBoundary);  // ends the last word
}

// Moves the pair to merge next to the front of the heap. Returns false if no pair in the table has
// a count of at least threshold_, so that others may be more frequent.
//
// A pair's count never increases after its insertion (see add_pair), so the counts in the heap are
// upper bounds. They are updated only when they reach the front: if the front's count is current,
// no other pair has a higher one.
bool PairMerger::find_candidate() {
  while (!heap_.empty() && heap_.front().count >= threshold_) {
    const Candidate front = heap_.front();
    const Count count = pairs_.find(front.pair)->count;
    if (count == front.count) return true;
    std::pop_heap(heap_.begin(), heap_.end());
    heap_.back().count = count;
    std::push_heap(heap_.begin(), heap_.end());
  }
  return false;
}

// Lowers the threshold until at least one pair reaches it or it is min_count_, and collects the
// pairs.
void PairMerger::collect_pairs() {
  const std::vector<Count> bounds = bound_counts();
  Count threshold = *std::max_element(bounds.begin(), bounds.end());
  do {
    threshold = std::max(threshold / kCollectedFraction, min_count_);
    collect_pairs_from(threshold, bounds);
  } while (heap_.empty() && threshold > min_count_);
}

// Returns upper bounds of the pairs' counts, indexed by bound_of(pair): the sum of the counts of
// all pairs with the same hash. Most pairs are rare, and these sums, which are far fewer than the
// pairs, exclude most of them before they are inserted into the table.
std::vector<PairMerger::Count> PairMerger::bound_counts() const {
  std::vector<Count> bounds(std::size_t{1} << kBoundBits);
  for_each_pair(
      [&](std::uint64_t pair, Place place) { bounds[bound_of(pair)] += word_counts_[place.word]; });
  return bounds;
}

// Rebuilds pairs_, heap_ and places_ with the pairs whose count is at least `threshold`, in two
// scans of the words: the first one counts, the second one writes the places into ranges of that
// size.
void PairMerger::collect_pairs_from(Count threshold, const std::vector<Count>& bounds) {
  threshold_ = threshold;
  pairs_.clear();
  for_each_pair([&](std::uint64_t pair, Place place) {
    if (bounds[bound_of(pair)] < threshold) return;
    PairTable::Entry& entry = pairs_.insert(pair);
    entry.count += word_counts_[place.word];
    ++entry.size;
  });

  heap_.clear();
  std::size_t n_places = 0;
  pairs_.for_each([&](PairTable::Entry& entry) {
    if (entry.count < threshold) return;
    heap_.push_back({entry.count, entry.pair});
    entry.begin = n_places;
    n_places += entry.size;
    entry.size = 0;  // counts up again while the places are written
  });
  std::make_heap(heap_.begin(), heap_.end());

  places_.resize(n_places);
  for_each_pair([&](std::uint64_t pair, Place place) {
    if (bounds[bound_of(pair)] < threshold) return;
    PairTable::Entry& entry = *pairs_.find(pair);
    if (entry.count >= threshold) places_[entry.begin + entry.size++] = place;
  });
}

// Calls visit(pair, place) for each pair in all words, from left to right.
template <typename Visit>
void PairMerger::for_each_pair(const Visit& visit) const {
  std::size_t at = 0;
  while (at + 1 < slots_.size()) {
    const std::uint32_t word = slots_[at++] - kBoundary;
    while (true) {
      const TokenId token = slots_[at];
      const std::size_t next_at = at + lengths_[token];
      const TokenId next = slots_[next_at];
      if (next < kBoundary) visit(pair_of(token, next), {static_cast<std::uint32_t>(at), word});
      at = next_at;
      if (next >= kBoundary) break;
    }
  }
}

// Applies the merge at all places of the pair, and collects the changes in left_ and right_.
void PairMerger::replace(const PairTable::Entry& entry, Merge merge) {
  const Place* const begin = places_.data() + entry.begin;
  const Place* const end = begin + entry.size;
  for (const Place* place = begin; place < end; ++place) {
    if (place + kAhead < end) {
      prefetch(&slots_[place[kAhead].at]);
      prefetch(&word_counts_[place[kAhead].word]);
    }
    replace_at(*place, merge);
  }
}

void PairMerger::replace_at(Place place, Merge merge) {
  const std::size_t left_at = place.at;
  const std::size_t right_at = left_at + lengths_[merge.left];
  // Skip the place if it is outdated because another merge has taken one of the tokens. Comparing
  // ids is sufficient: the token that took it is longer, so no token with the same id can be there.
  if (slots_[left_at] != merge.left || slots_[right_at] != merge.right) return;
  const std::size_t end = right_at + lengths_[merge.right];
  slots_[right_at - 1] = slots_[right_at] = kInsideToken;
  slots_[left_at] = slots_[end - 1] = merge.merged;

  const Count count = word_counts_[place.word];
  const TokenId before = slots_[left_at - 1];
  const TokenId after = slots_[end];
  if (before < kBoundary) {
    left_.add(before, {place.at - lengths_[before], place.word}, count);
  }
  if (after < kBoundary) right_.add(after, place, count);
}

void PairMerger::Side::add(TokenId neighbor, Place place, Count count) {
  Neighbor& entry = by_token[neighbor];
  if (entry.n_places++ == 0) touched.push_back(neighbor);
  entry.count += count;
  events.push_back({neighbor, place});
}

// Updates the counts of the pairs around a merge: the neighbors now form pairs with the merged
// token instead of its left or right part.
void PairMerger::update_counts(Merge merge) {
  const auto& [left, right, merged] = merge;
  for (const TokenId before : left_.touched) pairs_.prefetch_slot(pair_of(before, left));
  for (const TokenId after : right_.touched) pairs_.prefetch_slot(pair_of(right, after));
  for (const TokenId before : left_.touched) {
    Neighbor& neighbor = left_.by_token[before];
    subtract_count(pair_of(before, left), neighbor.count);
    add_pair(pair_of(before, merged), neighbor, neighbor.count);
  }
  for (const TokenId after : right_.touched) {
    Neighbor& neighbor = right_.by_token[after];
    subtract_count(pair_of(right, after), neighbor.count);
    // In "abab", the first "ab" is followed by an "a" only until that is merged as well: these
    // occurrences were added on the right side and are counted on the left side of the second
    // merge.
    const Count merged_since = after == left ? left_.by_token[merged].count : 0;
    add_pair(pair_of(merged, after), neighbor, neighbor.count - merged_since);
  }
  write_places(left_);
  write_places(right_);
}

void PairMerger::subtract_count(std::uint64_t pair, Count count) {
  if (PairTable::Entry* entry = pairs_.find(pair)) entry->count -= count;
}

// Inserts a new pair with `neighbor.n_places` places, which write_places() fills in.
//
// A pair becomes possible only in the merge that creates the later of its two tokens, because no
// two merges create the same token: wherever the bytes of a token form a token, no token ever
// crossed their ends, so the merges inside were the same in every word. Therefore all places of the
// pair are known here, and neither their list nor the pair's count ever grows.
void PairMerger::add_pair(std::uint64_t pair, Neighbor& neighbor, Count count) {
  neighbor.next_place = kNowhere;
  if (count < threshold_) return;
  neighbor.next_place = places_.size();
  PairTable::Entry& entry = pairs_.insert(pair);
  entry = {pair, count, places_.size(), neighbor.n_places};
  places_.resize(places_.size() + neighbor.n_places);
  heap_.push_back({count, pair});
  std::push_heap(heap_.begin(), heap_.end());
}

// Writes the places of the new pairs on one side, and resets the side for the next merge.
void PairMerger::write_places(Side& side) {
  for (const Event& event : side.events) {
    std::size_t& next_place = side.by_token[event.neighbor].next_place;
    if (next_place != kNowhere) places_[next_place++] = event.place;
  }
  for (const TokenId neighbor : side.touched) side.by_token[neighbor] = Neighbor{};
  side.events.clear();
  side.touched.clear();
}

void BpeTrainer::feed(std::string_view block) {
  if (merger_) throw std::invalid_argument("text cannot be added after merging has started");
  // A block is counted up to the last offset where a piece is guaranteed to start. The rest is kept
  // and continued by the next block, up to the first such offset.
  if (!unfinished_.empty()) {
    const std::size_t begin = find_start(block, 0);
    unfinished_ += block.substr(0, begin);
    if (begin == block.size()) return;
    end_text();
    block.remove_prefix(begin);
  }
  const std::size_t end = last_start(block);
  count(block.substr(0, end));
  unfinished_ = block.substr(end);
}

void BpeTrainer::end_text() {
  count(unfinished_);
  unfinished_.clear();
}

// Counts parts of the text on several threads.
void BpeTrainer::count(std::string_view text) {
  const std::vector<std::string_view> parts = split_for_threads(text, counters_.size());
  run_concurrently(parts.size(), [&](std::size_t i) { counters_[i].count(parts[i]); });
}

std::uint64_t BpeTrainer::n_pieces() const {
  std::uint64_t total = 0;
  for (const PieceCounter& counter : counters_) total += counter.total();
  return total;
}

bool BpeTrainer::merge_next(std::uint64_t min_count) {
  if (!merger_) start_merging(min_count);
  const std::optional<Merge> merge = merger_->merge_next();
  if (merge) merges_.push_back(*merge);
  return merge.has_value();
}

void BpeTrainer::start_merging(std::uint64_t min_count) {
  end_text();
  for (; counters_.size() > 1; counters_.pop_back()) counters_[0].count(counters_.back());
  merger_.emplace(counters_[0], min_count);
  counters_[0] = PieceCounter();  // releases memory
}

}  // namespace fastgpt
