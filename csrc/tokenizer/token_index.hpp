// Finds tokens by their bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <utility>

#include "common/prefetch.hpp"
#include "tokenizer/lazy_array.hpp"
#include "tokenizer/piece_key.hpp"
#include "tokenizer/token_bytes.hpp"

namespace fastgpt {

// Hash table of tokens. An entry is four bytes, so that the table is small: the token's id, and
// some bits of its hash, which tell nearly always whether it is worth while to look at its bytes.
class TokenIndex {
 public:
  TokenIndex() : entries_(kMinSize) {}

  // The hash of a token: what all functions below want to know it by.
  using Hash = std::uint64_t;
  static Hash hash(PieceKey key) { return key.hash(); }
  static Hash hash(std::string_view bytes) { return hash_of(bytes); }

  // Returns kNoToken if there is no such token. `tokens` are those whose ids were inserted.
  TokenId find(const TokenBytes& tokens, PieceKey key, std::size_t size) const {
    return search(hash(key), [&](TokenId id) {
      return tokens.size_of(id) == size && PieceKey::load(tokens.data(id), size) == key;
    });
  }
  TokenId find(const TokenBytes& tokens, Hash hash, std::string_view bytes) const {
    return search(hash, [&](TokenId id) { return tokens[id] == bytes; });
  }
  // Has the processor fetch what find() will look at.
  void ask_for(Hash hash) const { prefetch(&entries_[home(hash)]); }

  // Needs a token that is not there.
  void insert(const TokenBytes& tokens, Hash hash, TokenId id) {
    if (2 * ++count_ > entries_.size()) grow(tokens);
    put(hash, id);
  }

 private:
  static constexpr std::size_t kMinSize = std::size_t{1} << 17;  // GPT-2's fit: 512 KB
  static constexpr std::uint32_t kIdMask = (std::uint32_t{1} << kIdBits) - 1;

  // An entry: the id plus 1, so that 0 is free, below the bits of the hash.
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
