// Counts how often each distinct piece of a text occurs: all that BPE training needs of the text.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/piece_key.hpp"

namespace fastgpt {

// Hash table from a piece to its count. Open addressing, linear probing; pieces of up to 16 bytes,
// most of any text, lie in the table itself, so that one cache line tells all about them. Memory
// grows with the distinct pieces only.
class PieceCounter {
 public:
  PieceCounter();

  // Cuts the text into pieces (pretokenizer.hpp) and counts each of them once more.
  void count(std::string_view text);

  // Counts all that the other has counted.
  void count(const PieceCounter& other);

  // How many pieces were counted.
  std::uint64_t total() const { return total_; }

  // Calls visit(std::string_view piece, std::uint64_t count) for each distinct piece.
  template <typename Visit>
  void for_each(const Visit& visit) const {
    for (const Slot& slot : slots_) {
      if (slot.count > 0) visit(piece_of(slot.key), slot.count);
    }
  }

 private:
  // A piece of up to 16 bytes; or the hash of a longer one and its place in
  // long_pieces_, with kLong for its size.
  struct Key {
    PieceKey words;
    std::uint32_t size;

    bool operator==(const Key& other) const { return words == other.words && size == other.size; }
  };
  struct Slot {
    Key key;
    std::uint64_t count;  // 0: the slot is free
  };

  // Pieces whose slots are on their way into the cache.
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
  int shift_;  // a hash without its lowest `shift_` bits is a slot
  std::size_t distinct_ = 0;
  std::uint64_t total_ = 0;
  std::vector<std::string> long_pieces_;
};

}  // namespace fastgpt
