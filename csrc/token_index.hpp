// Finds tokens by their bytes.
#pragma once

#include <array>
#include <cstddef>
#include <string>
#include <string_view>
#include <unordered_map>

#include "piece_cache.hpp"
#include "token_bytes.hpp"

namespace fastgpt {

// A table of tokens. All but a few are short enough to be looked up as pieces are.
class TokenIndex {
 public:
  TokenIndex() : short_(kMinSize) {}

  // Returns kNoToken if there is no such token.
  TokenId find(std::string_view bytes) const {
    if (bytes.size() <= PieceKey::kMaxSize) {
      return find(PieceKey::load_exactly(bytes), bytes.size());
    }
    const auto found = long_.find(std::string(bytes));
    return found == long_.end() ? kNoToken : found->second;
  }
  TokenId find(PieceKey bytes, std::size_t size) const {
    std::array<TokenId, PieceCache<TokenId>::kWrittenIds> ids;
    return short_.find(bytes, size, ids.data()) == 0 ? kNoToken : ids[0];
  }
  // Has the processor fetch what find() will look at.
  void ask_for(PieceKey bytes) const { short_.homes().ask_for(bytes); }
  void ask_for(std::string_view bytes) const {
    if (bytes.size() <= PieceKey::kMaxSize) ask_for(PieceKey::load_exactly(bytes));
  }

  // Needs a token that is not there.
  void insert(std::string_view bytes, TokenId id) {
    if (bytes.size() <= PieceKey::kMaxSize) {
      short_.insert(PieceKey::load_exactly(bytes), bytes.size(), &id, 1);
    } else {
      long_.emplace(bytes, id);
    }
  }

 private:
  static constexpr std::size_t kMinSize = std::size_t{1} << 16;  // GPT-2's fit: 2 MB

  PieceCache<TokenId> short_;
  std::unordered_map<std::string, TokenId> long_;
};

}  // namespace fastgpt
