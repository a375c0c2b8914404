// Remembers the tokens of pieces that were seen before.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include "common/prefetch.hpp"
#include "tokenizer/lazy_array.hpp"
#include "tokenizer/piece_key.hpp"
#include "tokenizer/token_bytes.hpp"

namespace fastgpt {

// Hash table from pieces of up to 16 bytes to their tokens. Bounded: when it is full, it starts
// anew. For one thread at a time.
//
// What a lookup costs is the memory it has to wait for, so the table is dense: half a cache line
// holds two short pieces or one long piece, with their tokens. A piece is in the half line that it
// hashes to, unless there was no room: then in one that follows.
template <typename Id>
class PieceCache {
 public:
  // A short piece has up to 8 bytes and kShortIds tokens.
  static constexpr std::size_t kShortSize = 8;
  static constexpr std::size_t kShortIds = 6 / sizeof(Id);
  static constexpr std::size_t kLongIds = 2 * kShortIds;

  // A short piece: its bytes, and in one word its size, how many tokens it has, and these.
  struct Slot {
    std::uint64_t key;
    std::uint64_t rest;

    std::size_t size() const { return rest & 0xFF; }  // 0: the slot is free
    std::size_t count() const { return rest >> 8 & 0xFF; }
    bool holds(std::uint64_t piece, std::size_t piece_size) const {
      return key == piece && size() == piece_size;
    }
    // Writes kShortIds tokens and what may follow them in 8 bytes, and returns count().
    std::size_t copy(Id* to) const {
      const std::uint64_t ids = rest >> kIdsAt;
      std::memcpy(to, &ids, sizeof ids);
      return count();
    }
  };

  // Or a long piece: the first slot has its first 8 bytes, its size with kLong added, and its first
  // tokens; the second has the rest, and kLong alone. If the tokens are more than kLongIds, kMany
  // is added to the first slot's size, and the second slot's tokens are the place of all in more_.
  struct HalfLine {
    Slot slots[2];

    // The only slot that may hold the short piece.
    const Slot& slot_for(std::uint64_t piece) const { return slots[slots[0].key == piece ? 0 : 1]; }
    bool is_long() const { return slots[1].size() == kLong; }
    bool holds_long(PieceKey piece, std::size_t marked_size) const {
      return slots[0].holds(piece.low, marked_size) && slots[1].key == piece.high;
    }
  };
  static_assert(sizeof(HalfLine) == 32);

  // Writes the tokens of the piece of up to kShortSize bytes, and up to kWrittenIds in all, and
  // returns how many it has; 0 if it is not in this half line, or in the second slot with a piece
  // in the first that differs from it in NULs at the end only: find() tells.
  static std::size_t copy_short(const HalfLine& half, std::uint64_t piece, std::size_t size,
                                Id* to) {
    const Slot& slot = half.slot_for(piece);
    return slot.holds(piece, size) ? slot.copy(to) : 0;
  }

  // The same for a piece of any size up to PieceKey::kMaxSize.
  static std::size_t copy_long(const HalfLine& half, PieceKey piece, std::size_t size, Id* to) {
    if (!half.holds_long(piece, size + kLong)) return 0;
    const std::size_t count = half.slots[0].copy(to);
    half.slots[1].copy(to + kShortIds);
    return count;
  }
  static constexpr std::size_t kWrittenIds = PieceKey::kMaxSize;
  static_assert(kWrittenIds >= kShortIds + 8 / sizeof(Id));

  // `size`: half lines to begin with, a power of two.
  explicit PieceCache(std::size_t size = kMinSize) : table_(size), mask_(size - 1), shift_(64) {
    for (; size > 1; size /= 2) --shift_;
  }

  // Where pieces should be, until the next insert().
  class Homes {
   public:
    // Returns where this one should be, and has the processor fetch it.
    const HalfLine* ask_for(PieceKey key) const {
      const auto* half = reinterpret_cast<const HalfLine*>(table_ + (key.hash() >> shift_ & kMask));
      prefetch(half);
      return half;
    }

   private:
    friend class PieceCache;
    Homes(const HalfLine* table, int shift)
        : table_(reinterpret_cast<const char*>(table)), shift_(shift - kBits) {}

    static constexpr int kBits = 5;  // of an offset within a HalfLine
    static constexpr std::uint64_t kMask = ~std::uint64_t{sizeof(HalfLine) - 1};
    const char* table_;
    int shift_;
  };
  Homes homes() const { return {table_.data(), shift_}; }

  // Writes the tokens of the piece, and up to kWrittenIds in all, and returns how many it has; 0 if
  // it is not there.
  std::size_t find(PieceKey key, std::size_t size, Id* to) const {
    const std::size_t first = home(key);
    for (std::size_t step = 0;; ++step) {
      const HalfLine& half = table_[place(first, step)];
      if (half.slots[0].size() == 0) return 0;
      for (const Slot& slot : half.slots) {
        if (size > kShortSize || !slot.holds(key.low, size)) continue;
        return slot.copy(to);
      }
      if (const std::size_t count = copy_long(half, key, size, to); count != 0) return count;
      if (half.holds_long(key, size + kLong + kMany)) {
        std::memcpy(to, &more_[half.slots[1].rest >> 32], PieceKey::kMaxSize * sizeof(Id));
        return half.slots[0].count();
      }
    }
  }

  // Reads kWrittenIds of `ids`. A piece that is there already is found as it was, and takes room
  // twice.
  void insert(PieceKey key, std::size_t size, const Id* ids, std::size_t count) {
    if (used_ + 2 > table_.size()) make_room();  // half of the slots stay free
    if (size <= kShortSize && count <= kShortIds) {
      used_ += 1;
      put_short({key.low, pack(size, count, ids, count)});
      return;
    }
    used_ += 2;
    const std::size_t first = std::min(count, kShortIds);
    HalfLine half{{{key.low, pack(size + kLong, count, ids, first)}, {key.high, kLong}}};
    if (count <= kLongIds) {
      half.slots[1].rest = pack(kLong, 0, ids + first, count - first);
    } else {
      half.slots[0].rest += kMany;
      half.slots[1].rest |= static_cast<std::uint64_t>(more_.size()) << 32;
      more_.insert(more_.end(), ids, ids + count);
      more_.resize(more_.size() + PieceKey::kMaxSize - count);  // all are of one size
    }
    put_long(half);
  }

 private:
  static constexpr std::size_t kMinSize = std::size_t{1} << 15;  // 1 MB
  static constexpr std::size_t kMaxSize = std::size_t{1} << 19;  // 16 MB
  static constexpr std::size_t kLong = 0x40;
  static constexpr std::size_t kMany = 0x80;
  static constexpr int kIdsAt = sizeof(Id) == 2 ? 16 : 32;

  static std::uint64_t pack(std::size_t size, std::size_t count, const Id* ids,
                            std::size_t packed) {
    std::uint64_t word;
    std::memcpy(&word, ids, sizeof word);
    word &= (std::uint64_t{1} << 8 * sizeof(Id) * packed) - 1;
    return size | count << 8 | word << kIdsAt;
  }

  void put_short(Slot slot) {
    const std::size_t first = home({slot.key, 0});
    for (std::size_t step = 0;; ++step) {
      for (Slot& free : table_[place(first, step)].slots) {
        if (free.size() != 0) continue;
        free = slot;
        return;
      }
    }
  }

  void put_long(const HalfLine& half) {
    const std::size_t first = home({half.slots[0].key, half.slots[1].key});
    std::size_t step = 0;
    while (table_[place(first, step)].slots[0].size() != 0) ++step;
    table_[place(first, step)] = half;
  }

  void make_room() {
    if (table_.size() == kMaxSize) {
      *this = PieceCache(kMaxSize);
      return;
    }
    // Few steps while it is small, and no more memory than it takes after that.
    const int bits = table_.size() < kMaxSize / 4 ? 2 : 1;
    LazyArray<HalfLine> old = std::exchange(table_, LazyArray<HalfLine>(table_.size() << bits));
    mask_ = table_.size() - 1;
    shift_ -= bits;
    for (const HalfLine& half : old) {
      if (half.is_long()) {
        put_long(half);
      } else {
        if (half.slots[0].size() != 0) put_short(half.slots[0]);
        if (half.slots[1].size() != 0) put_short(half.slots[1]);
      }
    }
  }

  // The half lines where a piece may be: its home, the other half of that line, and so on, line by
  // line.
  std::size_t place(std::size_t home, std::size_t step) const {
    return ((home ^ (step & 1)) + (step & ~std::size_t{1})) & mask_;
  }
  std::size_t home(PieceKey key) const { return static_cast<std::size_t>(key.hash() >> shift_); }

  LazyArray<HalfLine> table_;
  std::vector<Id> more_;
  std::size_t used_ = 0;  // slots
  std::size_t mask_;
  int shift_;
};

// The same for pieces of more than 16 bytes: rules of dashes, indents, long names, which come again
// and again in source code.
template <typename Id>
class LongPieceCache {
 public:
  static constexpr std::size_t kMaxPiece = 256;  // longer ones are rarely seen twice

  // Writes the tokens of the piece, and returns how many it has; 0 if it is not there.
  std::size_t find(std::string_view piece, Id* to) const {
    if (entries_.empty()) return 0;
    const Entry& entry = entries_[home(piece)];
    if (std::string_view(bytes_.data() + entry.bytes_at, entry.size) != piece) return 0;
    std::copy_n(ids_.data() + entry.ids_at, entry.count, to);
    return entry.count;
  }

  // Takes the place of another piece with the same home.
  void insert(std::string_view piece, const Id* ids, std::size_t count) {
    if (entries_.empty() || bytes_.size() > kMaxBytes) {
      entries_.assign(kEntries, Entry{});
      bytes_.clear();
      ids_.clear();
    }
    entries_[home(piece)] = {
        static_cast<std::uint32_t>(bytes_.size()), static_cast<std::uint32_t>(ids_.size()),
        static_cast<std::uint16_t>(piece.size()), static_cast<std::uint16_t>(count)};
    bytes_.insert(bytes_.end(), piece.begin(), piece.end());
    ids_.insert(ids_.end(), ids, ids + count);
  }

 private:
  struct Entry {
    std::uint32_t bytes_at;
    std::uint32_t ids_at;
    std::uint16_t size;
    std::uint16_t count;
  };
  static constexpr std::size_t kEntries = std::size_t{1} << 14;
  static constexpr std::size_t kMaxBytes = std::size_t{1} << 20;

  static std::size_t home(std::string_view piece) {
    return static_cast<std::size_t>(hash_of(piece) >> 50);
  }

  std::vector<Entry> entries_;
  std::vector<char> bytes_;
  std::vector<Id> ids_;
};

}  // namespace fastgpt
