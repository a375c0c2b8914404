// Training of a byte-pair encoding: learns the merges from text.
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

// Hash table from a pair of tokens to its count and its places. Open addressing, linear probing.
// Single pairs cannot be removed.
class PairTable {
 public:
  struct Entry {
    std::uint64_t pair;
    std::uint64_t count;
    std::size_t begin;  // the pair's places are [begin : begin + size] of a list kept by the user
    std::size_t size;
  };

  PairTable() { clear(); }

  void clear();
  // Returns the pair's entry; inserts one with zero counts if there is none. Valid until the next
  // insertion.
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

// Repeatedly merges the most frequent pair of neighboring tokens in a set of words with counts.
//
// All words are stored in one array of slots, with one slot per byte. A token is stored at the
// slots of its bytes, so that a merge changes at most four slots of a word and moves nothing:
//
//   | n |  h  e  r  e |   the number of a word, followed by its bytes
//   | n | he he re re |   after two merges: a token's id is at its first and its last byte,
//   | n | X  -  -  X  |   and the slots in between are kInsideToken
//
// Therefore the token after the one at p starts at p + (its length), and the one before ends at
// p - 1.
//
// Counts and places are kept only for pairs with a count of at least `threshold_`. When no such
// pair is left, the threshold is lowered, and the words are scanned again for the pairs that reach
// it.
class PairMerger {
 public:
  PairMerger(const PieceCounter& pieces, std::uint64_t min_count);

  // Merges the pair with the highest count; of several such pairs, the one with the smallest ids.
  // Counts include overlapping pairs ("aaa" contains two). Returns nullopt if no pair occurs at
  // least `min_count` times.
  std::optional<Merge> merge_next();

 private:
  using Count = std::uint64_t;

  // An occurrence of a pair: the slot where its left token starts, and the number of the word. May
  // be outdated, if another merge has taken one of the tokens since (see replace_at).
  struct Place {
    std::uint32_t at;
    std::uint32_t word;
  };
  // An entry of a max-heap. Its count may be outdated, see find_candidate().
  struct Candidate {
    Count count;  // upper bound of the pair's current count
    std::uint64_t pair;

    // Returns whether the other candidate has priority.
    bool operator<(const Candidate& other) const {
      return count != other.count ? count < other.count : pair > other.pair;
    }
  };
  // The changes that a merge makes to the pairs of the merged token with one particular neighbor
  // on one of its sides.
  struct Neighbor {
    Count count = 0;
    std::size_t n_places = 0;
    std::size_t next_place = 0;  // index in places_ to write the next place to, or kNowhere
  };
  struct Event {
    TokenId neighbor;
    Place place;
  };
  // All changes on one side of a merge.
  struct Side {
    std::vector<Neighbor> by_token;
    std::vector<TokenId> touched;  // the neighbors with changes
    std::vector<Event> events;     // the places of the new pairs, in order

    void add(TokenId neighbor, Place place, Count count);
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
  void subtract_count(std::uint64_t pair, Count count);
  void add_pair(std::uint64_t pair, Neighbor& neighbor, Count count);
  void write_places(Side& side);

  Count min_count_;
  std::vector<std::uint32_t> slots_;
  std::vector<Count> word_counts_;
  std::vector<std::uint32_t> lengths_;  // of each token, in bytes

  // Pairs with at least this count are in the table; initially none.
  Count threshold_ = std::numeric_limits<Count>::max();
  PairTable pairs_;
  std::vector<Place> places_;
  std::vector<Candidate> heap_;
  Side left_, right_;  // of the current merge
};

// Trains on texts, which are fed in blocks of any size, then makes merges. The merges do not depend
// on the number of threads.
class BpeTrainer {
 public:
  // `threads`: the maximum number of threads that count a block. Each has a table of its own.
  explicit BpeTrainer(unsigned threads) : counters_(threads > 1 ? threads : 1) {}

  // Counts the next block of a text. Throws std::invalid_argument after merging has started.
  void feed(std::string_view block);
  // Ends the current text: the next block starts a new one, and no piece spans both.
  void end_text();
  // Returns the number of pieces counted, without the end of the last block, which the next block
  // may continue. Returns 0 after merging has started.
  std::uint64_t n_pieces() const;

  // Makes one merge (see PairMerger::merge_next). The first call ends feeding, and its `min_count`
  // applies to all calls. Returns false if no pair is left.
  bool merge_next(std::uint64_t min_count);

  const std::vector<Merge>& merges() const { return merges_; }

 private:
  void count(std::string_view text);
  void start_merging(std::uint64_t min_count);

  std::vector<PieceCounter> counters_;  // one per thread
  std::string unfinished_;              // the end of the last block, which the next may continue
  std::optional<PairMerger> merger_;
  std::vector<Merge> merges_;
};

}  // namespace fastgpt
