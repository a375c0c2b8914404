#include "tokenizer/piece_counter.hpp"

#include "common/prefetch.hpp"
#include "tokenizer/pretokenizer.hpp"

namespace fastgpt {
namespace {

constexpr std::uint32_t kLong = PieceKey::kMaxSize + 1;
constexpr int kFirstBits = 12;

}  // namespace

PieceCounter::PieceCounter() : slots_(std::size_t{1} << kFirstBits), shift_(64 - kFirstBits) {}

void PieceCounter::count(std::string_view text) {
  Pending pending;
  Pretokenizer pretokenizer(text);
  std::size_t begin = 0;
  for (Ends ends = pretokenizer.next(); !ends.empty(); ends = pretokenizer.next()) {
    for (const std::size_t end : ends) {
      add(text, begin, end, pending);
      begin = end;
    }
    total_ += ends.size();
  }
  add_all(pending);
}

void PieceCounter::count(const PieceCounter& other) {
  for (const Slot& slot : other.slots_) {
    if (slot.count == 0) continue;
    if (slot.key.size == kLong) {
      add_long(other.piece_of(slot.key), slot.count);
    } else {
      add_short(slot.key, slot.key.words.hash(), slot.count);
    }
  }
  total_ += other.total_;
}

void PieceCounter::add(std::string_view text, std::size_t begin, std::size_t end,
                       Pending& pending) {
  const std::size_t size = end - begin;
  if (size > PieceKey::kMaxSize) {
    add_long(text.substr(begin, size), 1);
    return;
  }
  Key& key = pending.keys[pending.size];
  key = {key_at(text, begin, size), static_cast<std::uint32_t>(size)};
  const std::uint64_t hash = key.words.hash();
  pending.hashes[pending.size] = hash;
  prefetch(&slots_[hash >> shift_]);
  if (++pending.size == Pending::kSize) add_all(pending);
}

void PieceCounter::add_all(Pending& pending) {
  for (std::size_t i = 0; i < pending.size; ++i) add_short(pending.keys[i], pending.hashes[i], 1);
  pending.size = 0;
}

void PieceCounter::add_short(const Key& key, std::uint64_t hash, std::uint64_t count) {
  Slot& slot = slots_[slot_of(key, hash)];
  slot.count += count;
  if (slot.count == count) fill(slot, key);
}

// Long pieces are rare, so they are added without prefetching.
void PieceCounter::add_long(std::string_view piece, std::uint64_t count) {
  const std::uint64_t hash = hash_of(piece);
  std::size_t at = hash >> shift_;
  for (; slots_[at].count > 0; at = (at + 1) & (slots_.size() - 1)) {
    const Key& key = slots_[at].key;
    if (key.size == kLong && key.words.low == hash && long_pieces_[key.words.high] == piece) break;
  }
  slots_[at].count += count;
  if (slots_[at].count > count) return;
  long_pieces_.emplace_back(piece);
  fill(slots_[at], {{hash, long_pieces_.size() - 1}, kLong});
}

// Returns the index of the slot that holds the key, or of the free slot where it would be inserted.
std::size_t PieceCounter::slot_of(const Key& key, std::uint64_t hash) const {
  std::size_t at = hash >> shift_;
  while (slots_[at].count > 0 && !(slots_[at].key == key)) at = (at + 1) & (slots_.size() - 1);
  return at;
}

// Stores the key in a slot that was free, and grows the table if more than half of the slots are
// used.
void PieceCounter::fill(Slot& free, const Key& key) {
  free.key = key;
  if (2 * ++distinct_ > slots_.size()) grow();
}

void PieceCounter::grow() {
  std::vector<Slot> old(2 * slots_.size());
  old.swap(slots_);
  --shift_;
  for (const Slot& slot : old) {
    if (slot.count == 0) continue;
    const Key& key = slot.key;
    // Long pieces with the same hash have different keys, since their indices differ.
    slots_[slot_of(key, key.size == kLong ? key.words.low : key.words.hash())] = slot;
  }
}

std::string_view PieceCounter::piece_of(const Key& key) const {
  if (key.size == kLong) return long_pieces_[key.words.high];
  return {reinterpret_cast<const char*>(&key.words), key.size};
}

}  // namespace fastgpt
