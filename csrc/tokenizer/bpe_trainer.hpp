// Learns the merges of a byte-pair encoding from text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/bpe.hpp"
#include "tokenizer/piece_counter.hpp"

namespace fastgpt {

// Hash table from a pair of tokens to how often it occurs, and where. Open addressing, linear
// probing; pairs are never taken out one by one.
class PairTable {
 public:
  struct Entry {
    std::uint64_t pair;
    std::uint64_t count;
    std::size_t begin;  // of the pair's places, in a list that the table's user keeps
    std::size_t size;
  };

  PairTable() { clear(); }

  void clear();
  // Returns the pair's entry, new and all zeros if there was none. Valid until the next insertion.
  Entry& insert(std::uint64_t pair);
  Entry* find(std::uint64_t pair);
  void prefetch_slot(std::uint64_t pair) const;
  std::size_t size() const { return size_; }

  template <typename Visit>
  void for_each(const Visit& visit) {
    for (Entry& entry : entries_) {
      if (entry.pair != kFree) visit(entry);
    }
  }

 private:
  static constexpr std::uint64_t kFree = ~std::uint64_t{0};

  std::size_t slot_of(std::uint64_t pair) const;
  void grow();

  std::vector<Entry> entries_;
  int shift_;
  std::size_t size_;
};

// Merges the most frequent pair of neighbouring tokens of a set of words, again and again.
//
// All words stand in one array, a token at the place of its first byte, so that a merge changes
// three or four numbers of one word and nothing moves:
//
//   | n |  h  e  r  e |   a word's bytes, and before them its number
//   | n | he he re re |   after two merges: a token's id is at its first and its last byte,
//   | n | X  -  -  X  |   and what lies between belongs to no token
//
// so the token after the one at p starts at p + (its length), and the one before ends at p - 1.
//
// Of a pair that is too rare to be the most frequent for long, nothing is kept; when none is left
// that is not, the words are gone through once more for the next that are frequent enough.
class PairMerger {
 public:
  PairMerger(const PieceCounter& pieces, std::uint64_t min_count);

  // Makes one merge: of the pair with the highest count, and of several such, that of the smallest
  // ids. A count includes pairs that overlap ("aaa" holds two). Returns nothing when no pair
  // occurs `min_count` times.
  std::optional<Merge> merge_next();

 private:
  using Count = std::uint64_t;

  // The slot where a pair's left token starts, and the number of its word.
  struct Place {
    std::uint32_t at;
    std::uint32_t word;
  };
  struct Candidate {
    Count count;  // not less than the pair's count of now
    std::uint64_t pair;

    // Whether the other is to be merged first.
    bool operator<(const Candidate& other) const {
      return count != other.count ? count < other.count : pair > other.pair;
    }
  };
  // What a merge does to the pairs that a token makes with it on one of its sides.
  struct Neighbour {
    Count count = 0;
    std::size_t n_places = 0;
    std::size_t next_place = 0;  // where the next place is written, or kNowhere
  };
  struct Event {
    TokenId neighbour;
    Place place;
  };
  struct Side {
    std::vector<Neighbour> by_token;
    std::vector<TokenId> touched;
    std::vector<Event> events;

    void add(TokenId neighbour, Place place, Count count);
  };

  void lay_out(const PieceCounter& pieces);

  bool find_candidate();
  void collect_pairs();
  std::vector<Count> bound_counts() const;
  void collect_pairs_from(Count threshold, const std::vector<Count>& bounds);
  template <typename Visit>
  void for_each_pair(const Visit& visit) const;

  void replace(const PairTable::Entry& entry, Merge merge);
  void replace_at(Place place, Merge merge);
  void update_counts(Merge merge);
  void take_away(std::uint64_t pair, Count count);
  void add_pair(std::uint64_t pair, Neighbour& neighbour, Count count);
  void write_places(Side& side);

  Count min_count_;
  std::vector<std::uint32_t> slots_;
  std::vector<Count> word_counts_;
  std::vector<std::uint32_t> lengths_;  // of each token, in bytes

  // Pairs at least as frequent are in the table: at first none.
  Count threshold_ = std::numeric_limits<Count>::max();
  PairTable pairs_;
  std::vector<Place> places_;
  std::vector<Candidate> heap_;
  Side left_, right_;  // of the merge that is being made
};

// Takes text in blocks of any size, then makes merges. The number of threads changes none of them.
class BpeTrainer {
 public:
  // Counts each block on up to `threads` threads, each of which has a table of its own.
  explicit BpeTrainer(unsigned threads) : counters_(threads > 1 ? threads : 1) {}

  // Takes the next block of a text. Throws std::invalid_argument once merging has begun.
  void feed(std::string_view block);
  // Says that the text is over, so that the next block starts another: no piece spans both.
  void end_text();
  // How many pieces were counted, but for those that the next block may go on with. 0 once merging
  // has begun.
  std::uint64_t n_pieces() const;

  // Makes one merge (see PairMerger) of all that was fed, the first call's `min_count` holding for
  // all; returns false when no pair is left.
  bool merge_next(std::uint64_t min_count);

  const std::vector<Merge>& merges() const { return merges_; }

 private:
  void count(std::string_view text);
  void start_merging(std::uint64_t min_count);

  std::vector<PieceCounter> counters_;  // one a thread
  std::string unfinished_;              // the end of the last block, which the next may go on with
  std::optional<PairMerger> merger_;
  std::vector<Merge> merges_;
};

}  // namespace fastgpt
