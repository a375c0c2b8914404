// Counts of the distinct pieces of a text, which is all that BPE training needs of it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/piece_key.hpp"

namespace fastgpt {

// Hash table from pieces to their counts. Open addressing, linear probing. Pieces of up to 16
// bytes, which are most of any text, are stored in the table itself, so that a lookup usually
// accesses only one cache line. Memory grows with the number of distinct pieces only.
class PieceCounter {
 public:
  PieceCounter();

  // Splits the text into pieces (pretokenizer.hpp) and adds them to the counts.
  void count(std::string_view text);

  // Adds all counts of the other counter.
  void count(const PieceCounter& other);

  // Returns the number of pieces counted, including repetitions.
  std::uint64_t total() const { return total_; }

  // Calls visit(std::string_view piece, std::uint64_t count) for each distinct piece.
  template <typename Visit>
  void for_each(const Visit& visit) const {
    for (const Slot& slot : slots_) {
      if (slot.count > 0) visit(piece_of(slot.key), slot.count);
    }
  }

 private:
  // A piece of up to 16 bytes and its size; or, for a longer piece, its hash (low word) and its
  // index in long_pieces_ (high word), with kLong as the size.
  struct Key {
    PieceKey words;
    std::uint32_t size;

    bool operator==(const Key& other) const { return words == other.words && size == other.size; }
  };
  struct Slot {
    Key key;
    std::uint64_t count;  // 0: the slot is free
  };

  // A batch of pieces whose slots have been prefetched and whose counts are yet to be added.
  struct Pending {
    static constexpr std::size_t kSize = 16;
    std::array<Key, kSize> keys;
    std::array<std::uint64_t, kSize> hashes;
    std::size_t size = 0;
  };

  void add(std::string_view text, std::size_t begin, std::size_t end, Pending& pending);
  void add_all(Pending& pending);
  void add_long(std::string_view piece, std::uint64_t count);
  void add_short(const Key& key, std::uint64_t hash, std::uint64_t count);
  std::size_t slot_of(const Key& key, std::uint64_t hash) const;
  void fill(Slot& free, const Key& key);
  void grow();
  std::string_view piece_of(const Key& key) const;

  std::vector<Slot> slots_;
  int shift_;  // the slot of a hash is hash >> shift_
  std::size_t distinct_ = 0;
  std::uint64_t total_ = 0;
  std::vector<std::string> long_pieces_;
};

}  // namespace fastgpt
