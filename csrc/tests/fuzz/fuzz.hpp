// Helpers shared by the fuzz programs. Each program defines LLVMFuzzerTestOneInput, which libFuzzer
// or standalone.cpp calls with many inputs, and which aborts if the tokenizer's core is wrong.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "tokenizer/bpe.hpp"
#include "tokenizer/id_buffer.hpp"

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

namespace fastgpt {

// Aborts with a message if a property does not hold. `what` describes the property.
inline void check(bool holds, const char* what) {
  if (holds) return;
  std::fprintf(stderr, "check failed: %s\n", what);
  std::abort();
}

// A sequence of numbers derived from the input's bytes, so that small mutations of the input change
// the sequence only a little.
class Numbers {
 public:
  explicit Numbers(std::string_view bytes) : bytes_(bytes) {}

  std::size_t left() const { return bytes_.size(); }
  // Returns a number less than `count`, which is 1 to 65,536; 0 where no bytes are left.
  std::size_t below(std::size_t count) {
    return (count <= 256 ? byte() : byte() << 8 | byte()) % count;
  }

 private:
  std::size_t byte() {
    if (bytes_.empty()) return 0;
    const auto first = static_cast<unsigned char>(bytes_[0]);
    bytes_.remove_prefix(1);
    return first;
  }

  std::string_view bytes_;
};

// Returns a hash of the text (FNV-1a), to select a fraction of the inputs for slow checks.
inline std::uint64_t number_of(std::string_view text) {
  std::uint64_t hash = 0xCBF29CE484222325;
  for (const char c : text) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3;
  return hash ^ hash >> 32;
}

template <typename Id>
std::vector<TokenId> to_vector(IdBuffer<Id>& ids) {
  return {ids.data(), ids.data() + ids.size()};
}

template <typename Id>
std::vector<TokenId> encode(const BytePairEncoder& encoder, std::string_view text,
                            unsigned threads) {
  IdBuffer<Id> ids;
  encoder.encode(text, threads, ids);
  return to_vector(ids);
}

inline std::string decode(const BytePairEncoder& encoder, const std::vector<TokenId>& ids) {
  const std::size_t size = encoder.decoded_size(ids.data(), ids.size());
  check(size != BytePairEncoder::kInvalid, "all encoded ids have a token");
  std::string text(size, '\0');
  encoder.decode(ids.data(), ids.size(), text.data(), size);
  return text;
}

}  // namespace fastgpt
