// Lookup of tokens by their bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

#include "common/lazy_array.hpp"
#include "common/prefetch.hpp"
#include "tokenizer/piece_key.hpp"
#include "tokenizer/token_bytes.hpp"

namespace fastgpt {

// Hash table from the bytes of tokens to their ids. Open addressing, linear probing. An entry has
// only four bytes, to keep the table small: the id, and some bits of the hash, which nearly always
// avoid comparing the bytes of a different token.
class TokenIndex {
 public:
  TokenIndex() : entries_(kMinSize) {}

  // The hash of a token's bytes, as the functions below expect it.
  using Hash = std::uint64_t;
  static Hash hash(PieceKey key) { return key.hash(); }
  static Hash hash(std::string_view bytes) { return hash_of(bytes); }

  // Returns the id of the token with these bytes, or kNoToken if there is none. `tokens` must be
  // the list whose ids were inserted.
  TokenId find(const TokenBytes& tokens, PieceKey key, std::size_t size) const {
    return search(hash(key), [&](TokenId id) {
      return tokens.size_of(id) == size && PieceKey::load(tokens.data(id), size) == key;
    });
  }
  TokenId find(const TokenBytes& tokens, Hash hash, std::string_view bytes) const {
    return search(hash, [&](TokenId id) { return tokens[id] == bytes; });
  }
  // Prefetches the entry that find() will read first.
  void ask_for(Hash hash) const { prefetch(&entries_[home(hash)]); }

  // Inserts a token, which must not be in the table yet.
  void insert(const TokenBytes& tokens, Hash hash, TokenId id) {
    if (2 * ++count_ > entries_.size()) grow(tokens);
    put(hash, id);
  }

 private:
  static constexpr std::size_t kMinSize = std::size_t{1} << 17;  // 512 KB; enough for GPT-2
  static constexpr std::uint32_t kIdMask = (std::uint32_t{1} << kIdBits) - 1;

  // Returns an entry: the id plus 1 in the kIdBits low bits, so that 0 means free, and bits of the
  // hash above it.
  static std::uint32_t entry(Hash hash, TokenId id) {
    return (static_cast<std::uint32_t>(hash >> 16) & ~kIdMask) | (id + 1);
  }
  std::size_t home(Hash hash) const { return static_cast<std::size_t>(hash >> shift_); }
  std::size_t mask() const { return entries_.size() - 1; }

  template <typename Same>
  TokenId search(Hash hash, const Same& same) const {
    for (std::size_t at = home(hash); entries_[at] != 0; at = (at + 1) & mask()) {
      const TokenId id = (entries_[at] & kIdMask) - 1;
      if (entries_[at] == entry(hash, id) && same(id)) return id;
    }
    return kNoToken;
  }

  void put(Hash hash, TokenId id) {
    std::size_t at = home(hash);
    while (entries_[at] != 0) at = (at + 1) & mask();
    entries_[at] = entry(hash, id);
  }

  void grow(const TokenBytes& tokens) {
    const LazyArray<std::uint32_t> old =
        std::exchange(entries_, LazyArray<std::uint32_t>(2 * entries_.size()));
    --shift_;
    for (std::size_t i = 0; i < old.size(); ++i) {
      if (old[i] == 0) continue;
      const TokenId id = (old[i] & kIdMask) - 1;
      put(hash(tokens[id]), id);
    }
  }

  LazyArray<std::uint32_t> entries_;
  std::size_t count_ = 0;
  int shift_ = 64 - 17;
};

}  // namespace fastgpt
