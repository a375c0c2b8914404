// Turns text into token ids and back.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string_view>

#include "tokenizer/id_buffer.hpp"
#include "tokenizer/vocabulary.hpp"

namespace fastgpt {

template <typename Id>
class PieceEncoder;

// Lends what a thread needs while it encodes, and keeps it for the next one: a PieceEncoder, whose
// memory of pieces makes the second text quick. Without locks, so that a child that was forked
// while another thread encoded can go on.
template <typename Id>
class PieceEncoderPool {
 public:
  PieceEncoderPool() = default;
  ~PieceEncoderPool();
  PieceEncoderPool(const PieceEncoderPool&) = delete;
  PieceEncoderPool& operator=(const PieceEncoderPool&) = delete;

  // Returns one that nobody uses; a new one if there is none.
  std::unique_ptr<PieceEncoder<Id>> take(const Vocabulary& vocabulary);
  void give_back(std::unique_ptr<PieceEncoder<Id>> encoder);

 private:
  std::array<std::atomic<PieceEncoder<Id>*>, 64> idle_{};
};

// Byte-pair encoding. Threads may share one freely: the vocabulary never changes, and each call has
// a PieceEncoder of its own.
class BytePairEncoder {
 public:
  explicit BytePairEncoder(Vocabulary vocabulary);
  ~BytePairEncoder();

  // Appends the ids of any bytes, UTF-8 or not: cut into pieces (pretokenizer.hpp), each merged
  // (merger.hpp). Time: linear, but for pieces that are made to fool PieceEncoder::encode_long.
  // Id is std::uint16_t, if the vocabulary has no more than 65,536 tokens, or std::uint32_t.
  // `threads` is how many work at it, this one included, each at parts of the text that are worth
  // a thread; the ids are the same.
  template <typename Id>
  void encode(std::string_view text, unsigned threads, IdBuffer<Id>& ids) const;

  // Returns how many bytes the ids stand for, or kInvalid if one of them has no token.
  template <typename Id>
  std::size_t decoded_size(const Id* ids, std::size_t count) const;
  // Writes those bytes: `size` is what decoded_size returned.
  template <typename Id>
  void decode(const Id* ids, std::size_t count, char* to, std::size_t size) const;

  static constexpr std::size_t kInvalid = static_cast<std::size_t>(-1);

  const Vocabulary& vocabulary() const { return vocabulary_; }

 private:
  template <typename Id>
  void encode_part(std::string_view text, IdBuffer<Id>& ids) const;
  template <typename Id>
  PieceEncoderPool<Id>& pool() const;

  Vocabulary vocabulary_;
  mutable PieceEncoderPool<std::uint16_t> narrow_pool_;
  mutable PieceEncoderPool<std::uint32_t> wide_pool_;
};

}  // namespace fastgpt
