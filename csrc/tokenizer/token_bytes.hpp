// Token ids, and a container for the bytes of all tokens.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>
#include <vector>

namespace fastgpt {

using TokenId = std::uint32_t;
constexpr TokenId kNoToken = std::numeric_limits<TokenId>::max();

// The number of bits of an id in packed tables, which limits the size of a vocabulary.
constexpr int kIdBits = 21;
constexpr std::size_t kMaxTokens = (std::size_t{1} << kIdBits) - 1;  // the highest id is reserved

// The bytes of all tokens in one contiguous block, followed by kPadding bytes, so that a copy can
// read chunks of that size without a check for the end.
class TokenBytes {
 public:
  static constexpr std::size_t kPadding = 16;

  TokenBytes() : bytes_(kPadding, '\0'), begins_(1, 0) {}

  void push_back(std::string_view token);

  std::size_t size() const { return begins_.size() - 1; }
  const char* data(TokenId id) const { return bytes_.data() + begins_[id]; }
  std::size_t size_of(TokenId id) const { return begins_[id + 1] - begins_[id]; }
  std::string_view operator[](TokenId id) const { return {data(id), size_of(id)}; }

 private:
  std::vector<char> bytes_;            // with spare room at the end, at least kPadding bytes
  std::vector<std::uint32_t> begins_;  // token i is bytes_[begins_[i] : begins_[i + 1]]
};

}  // namespace fastgpt
