// Byte-pair encoding: converts text to token ids and back.
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

// A pool of idle PieceEncoders, one of which each call of BytePairEncoder::encode_part uses.
// Reusing an encoder keeps its caches of pieces, which makes later texts faster.
//
// The pool is lock-free: a process that is forked while another thread encodes must not inherit a
// lock that nobody releases. Each slot holds null or a pointer to an idle encoder, which the slot
// owns. take() exchanges the pointer for null, so only one thread can get it; give_back() stores it
// into a slot that is null. The release store of give_back() synchronizes with the acquire load of
// take(): everything that one thread wrote to the encoder is visible to the next one.
template <typename Id>
class PieceEncoderPool {
 public:
  PieceEncoderPool() = default;
  ~PieceEncoderPool();
  PieceEncoderPool(const PieceEncoderPool&) = delete;
  PieceEncoderPool& operator=(const PieceEncoderPool&) = delete;

  // Returns an idle encoder, or a new one if there is none.
  std::unique_ptr<PieceEncoder<Id>> take(const Vocabulary& vocabulary);
  // Returns an encoder to the pool; destroys it if the pool is full.
  void give_back(std::unique_ptr<PieceEncoder<Id>> encoder);

 private:
  std::array<std::atomic<PieceEncoder<Id>*>, 64> idle_{};
};

// Byte-pair encoding. Thread-safe: the vocabulary is immutable, and each call uses a PieceEncoder
// of its own.
class BytePairEncoder {
 public:
  explicit BytePairEncoder(Vocabulary vocabulary);
  ~BytePairEncoder();

  // Appends the ids of a text, which can be any bytes, valid UTF-8 or not. The text is split into
  // pieces (pretokenizer.hpp), and each piece is merged (merger.hpp). Runs in linear time, except
  // for pieces constructed to defeat PieceEncoder::encode_long.
  //
  // Id is std::uint16_t, which requires a vocabulary of at most 65,536 tokens, or std::uint32_t.
  // `threads` is the maximum number of threads, including the calling one; a text too short to be
  // worth that many uses fewer. The ids do not depend on it.
  template <typename Id>
  void encode(std::string_view text, unsigned threads, IdBuffer<Id>& ids) const;

  // Returns the number of bytes that the ids decode to, or kInvalid if an id is out of range.
  template <typename Id>
  std::size_t decoded_size(const Id* ids, std::size_t count) const;
  // Writes the decoded bytes to `to`. `size` must be the result of decoded_size().
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
