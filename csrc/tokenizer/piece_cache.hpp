// Caches of the tokens of pieces that were encoded before.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>
#include <utility>
#include <vector>

#include "common/lazy_array.hpp"
#include "common/prefetch.hpp"
#include "tokenizer/piece_key.hpp"
#include "tokenizer/token_bytes.hpp"

namespace fastgpt {

// Hash table from pieces of up to 16 bytes to their tokens. Its size is bounded: when it is full,
// it is cleared. Not thread-safe.
//
// The cost of a lookup is dominated by cache misses, so the table is dense: each bucket is half a
// cache line (32 bytes) and holds two short pieces or one long piece, with their tokens. A piece is
// stored in the bucket that it hashes to or, if that is full, in one of the following buckets (see
// place()).
template <typename Id>
class PieceCache {
 public:
  // A short piece has at most 8 bytes and at most kShortIds tokens: 3 of 16 bits, or 1 of 32 bits.
  static constexpr std::size_t kShortSize = 8;
  static constexpr std::size_t kShortIds = 6 / sizeof(Id);
  static constexpr std::size_t kLongIds = 2 * kShortIds;

  // A short piece. `key` holds its bytes, zero-padded. `rest` packs the remaining fields, from the
  // lowest bits on:
  //
  //   bits 0-7     size of the piece in bytes, or 0 if the slot is free
  //   bits 8-15    number of tokens
  //   bits 16-63   kShortIds tokens; 32-bit tokens are at bits 32-63 (see kIdsAt)
  struct Slot {
    std::uint64_t key;
    std::uint64_t rest;

    std::size_t size() const { return rest & 0xFF; }
    std::size_t count() const { return rest >> 8 & 0xFF; }
    bool holds(std::uint64_t piece, std::size_t piece_size) const {
      return key == piece && size() == piece_size;
    }
    // Copies kShortIds tokens with a single 8-byte store, which may write zeros after them. Returns
    // count(), which for the first slot of a long piece may be more than kShortIds.
    std::size_t copy(Id* to) const {
      const std::uint64_t ids = rest >> kIdsAt;
      std::memcpy(to, &ids, sizeof ids);
      return count();
    }
  };

  // A bucket: two short pieces, or one long piece, which uses both slots:
  //
  //   slot    key            size field                 tokens
  //   first   bytes 0-7      size + kLong (+ kMany)     the first kShortIds
  //   second  bytes 8-15     kLong                      the next kShortIds
  //
  // The number of tokens is in the first slot. If it is more than kLongIds, kMany is added to the
  // size field of the first slot, and bits 32-63 of the second slot's `rest` are an index into
  // more_, where all tokens are stored. Size fields with kLong are larger than any short piece, so
  // comparing the size field also distinguishes the layouts. A piece of up to 8 bytes with more
  // than kShortIds tokens is stored as a long piece.
  struct HalfLine {
    Slot slots[2];

    // Returns the slot that holds the short piece, if it is in this bucket. There is one exception:
    // it is in the second slot, and the first one holds a piece with an equal key, that is, one
    // that differs from it only in trailing NUL bytes. find() finds it even then.
    const Slot& slot_for(std::uint64_t piece) const { return slots[slots[0].key == piece ? 0 : 1]; }
    bool is_long() const { return slots[1].size() == kLong; }
    bool holds_long(PieceKey piece, std::size_t marked_size) const {
      return slots[0].holds(piece.low, marked_size) && slots[1].key == piece.high;
    }
  };
  static_assert(sizeof(HalfLine) == 32);

  // Copies the tokens of a piece of up to PieceKey::kMaxSize bytes to `to`, which must have room
  // for kWrittenIds, and returns their number. Returns 0 if the piece is not in this bucket as a
  // long piece with at most kLongIds tokens.
  static std::size_t copy_long(const HalfLine& half, PieceKey piece, std::size_t size, Id* to) {
    if (!half.holds_long(piece, size + kLong)) return 0;
    const std::size_t count = half.slots[0].copy(to);
    half.slots[1].copy(to + kShortIds);
    return count;
  }
  static constexpr std::size_t kWrittenIds = PieceKey::kMaxSize;
  static_assert(kWrittenIds >= kShortIds + 8 / sizeof(Id));

  // `size`: the initial number of buckets, a power of two.
  explicit PieceCache(std::size_t size = kMinSize) : table_(size), mask_(size - 1), shift_(64) {
    for (; size > 1; size /= 2) --shift_;
  }

  // Computes the addresses of home buckets, from a copy of the table's address and shift. Valid
  // until the next insert().
  class Homes {
   public:
    // Returns the home bucket of the piece and prefetches it. Shifting by kBits less and masking
    // gives the byte offset of the bucket: its index times sizeof(HalfLine).
    const HalfLine* ask_for(PieceKey key) const {
      const auto* half = reinterpret_cast<const HalfLine*>(table_ + (key.hash() >> shift_ & kMask));
      prefetch(half);
      return half;
    }

   private:
    friend class PieceCache;
    Homes(const HalfLine* table, int shift)
        : table_(reinterpret_cast<const char*>(table)), shift_(shift - kBits) {}

    static constexpr int kBits = 5;  // log2(sizeof(HalfLine))
    static constexpr std::uint64_t kMask = ~std::uint64_t{sizeof(HalfLine) - 1};
    const char* table_;
    int shift_;
  };
  Homes homes() const { return {table_.data(), shift_}; }

  // Copies the tokens of the piece to `to`, which must have room for kWrittenIds, and returns their
  // number, or 0 if the piece is not in the cache.
  //
  // The search ends at the first empty bucket; insert() keeps at least one. A bucket is empty if
  // its first slot is free, since a short piece takes the first free slot and a long piece takes
  // both.
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

  // Inserts a piece. `ids` must have kWrittenIds readable elements, of which `count` are used.
  // Inserting a piece that is already in the cache wastes a slot: find() returns the first entry.
  void insert(PieceKey key, std::size_t size, const Id* ids, std::size_t count) {
    if (used_ + 2 > table_.size()) grow_or_clear();  // keep at least half of the slots free
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
      more_.resize(more_.size() + PieceKey::kMaxSize - count);  // find() copies a fixed size
    }
    put_long(half);
  }

 private:
  static constexpr std::size_t kMinSize = std::size_t{1} << 15;  // buckets: 1 MB
  static constexpr std::size_t kMaxSize = std::size_t{1} << 19;  // buckets: 16 MB
  static constexpr std::size_t kLong = 0x40;
  static constexpr std::size_t kMany = 0x80;
  static constexpr int kIdsAt = sizeof(Id) == 2 ? 16 : 32;

  // Returns a slot's `rest`: the size field, the count, and the first `packed` of the ids. Reads 8
  // bytes of ids.
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

  // Grows the table and reinserts all pieces; clears a table that has reached kMaxSize.
  void grow_or_clear() {
    if (table_.size() == kMaxSize) {
      *this = PieceCache(kMaxSize);
      return;
    }
    // Grow by a factor of four while the table is small, to rehash it less often, and by two after
    // that, to save memory.
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

  // Returns the index of the bucket to probe at the given step: the home bucket, the other half of
  // its cache line, then both halves of the next line, and so on. Probing the other half first
  // costs no further cache miss.
  std::size_t place(std::size_t home, std::size_t step) const {
    return ((home ^ (step & 1)) + (step & ~std::size_t{1})) & mask_;
  }
  std::size_t home(PieceKey key) const { return static_cast<std::size_t>(key.hash() >> shift_); }

  LazyArray<HalfLine> table_;
  std::vector<Id> more_;  // token lists of more than kLongIds, PieceKey::kMaxSize elements each
  std::size_t used_ = 0;  // number of slots in use
  std::size_t mask_;
  int shift_;
};

// Direct-mapped cache of the tokens of pieces of more than 16 bytes: rows of dashes, indentation,
// long names, which recur in source code. A new piece replaces an old one with the same hash bits.
// Bytes and tokens are appended to two buffers; the cache is cleared when these are full.
template <typename Id>
class LongPieceCache {
 public:
  static constexpr std::size_t kMaxPiece = 256;  // bytes; longer pieces rarely recur

  // Copies the tokens of the piece to `to` and returns their number, or 0 if it is not in the
  // cache.
  std::size_t find(std::string_view piece, Id* to) const {
    if (entries_.empty()) return 0;
    const Entry& entry = entries_[home(piece)];
    if (std::string_view(bytes_.data() + entry.bytes_at, entry.size) != piece) return 0;
    std::copy_n(ids_.data() + entry.ids_at, entry.count, to);
    return entry.count;
  }

  // Inserts a piece and replaces the one with the same home, if any.
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
