#include "tokenizer/bpe.hpp"

#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#include "common/parallel.hpp"
#include "tokenizer/piece_encoder.hpp"
#include "tokenizer/pretokenizer.hpp"

namespace fastgpt {

template <typename Id>
PieceEncoderPool<Id>::~PieceEncoderPool() {
  for (auto& slot : idle_) std::unique_ptr<PieceEncoder<Id>>(slot.load());
}

template <typename Id>
std::unique_ptr<PieceEncoder<Id>> PieceEncoderPool<Id>::take(const Vocabulary& vocabulary) {
  for (auto& slot : idle_) {
    std::unique_ptr<PieceEncoder<Id>> idle(slot.exchange(nullptr, std::memory_order_acquire));
    if (idle) return idle;
  }
  return std::make_unique<PieceEncoder<Id>>(vocabulary);
}

template <typename Id>
void PieceEncoderPool<Id>::give_back(std::unique_ptr<PieceEncoder<Id>> encoder) {
  for (auto& slot : idle_) {
    PieceEncoder<Id>* free = nullptr;
    if (slot.compare_exchange_strong(free, encoder.get(), std::memory_order_release,
                                     std::memory_order_relaxed)) {
      static_cast<void>(encoder.release());  // the slot owns it now
      return;
    }
  }
}

BytePairEncoder::BytePairEncoder(Vocabulary vocabulary) : vocabulary_(std::move(vocabulary)) {}
BytePairEncoder::~BytePairEncoder() = default;

template <typename Id>
void BytePairEncoder::encode(std::string_view text, unsigned threads, IdBuffer<Id>& ids) const {
  if (threads <= 1 || text.size() < 2 * kMinPart) return encode_part(text, ids);
  const std::vector<std::string_view> texts = split_for_threads(text, threads);
  std::vector<IdBuffer<Id>> others(texts.size() - 1);
  run_concurrently(texts.size(),
                   [&](std::size_t i) { encode_part(texts[i], i == 0 ? ids : others[i - 1]); });
  for (const IdBuffer<Id>& part : others) ids.append(part.data(), part.size());
}

template <typename Id>
void BytePairEncoder::encode_part(std::string_view text, IdBuffer<Id>& ids) const {
  std::unique_ptr<PieceEncoder<Id>> encoder = pool<Id>().take(vocabulary_);
  encoder->encode(text, ids);
  pool<Id>().give_back(std::move(encoder));
}

template <typename Id>
PieceEncoderPool<Id>& BytePairEncoder::pool() const {
  if constexpr (std::is_same_v<Id, std::uint16_t>) {
    return narrow_pool_;
  } else {
    return wide_pool_;
  }
}

template <typename Id>
std::size_t BytePairEncoder::decoded_size(const Id* ids, std::size_t count) const {
  const TokenBytes& tokens = vocabulary_.tokens();
  std::size_t size = 0;
  for (std::size_t i = 0; i < count; ++i) {
    // As unsigned, negative ids become large ones, so a single comparison rejects both.
    const auto id = static_cast<std::make_unsigned_t<Id>>(ids[i]);
    if (id >= tokens.size()) return kInvalid;
    size += tokens.size_of(static_cast<TokenId>(id));
  }
  return size;
}

template <typename Id>
void BytePairEncoder::decode(const Id* ids, std::size_t count, char* to, std::size_t size) const {
  const TokenBytes& tokens = vocabulary_.tokens();
  const char* const end = to + size;
  for (std::size_t i = 0; i < count; ++i) {
    const auto id = static_cast<TokenId>(ids[i]);
    const std::size_t length = tokens.size_of(id);
    if (length <= TokenBytes::kPadding && end - to >= std::ptrdiff_t{TokenBytes::kPadding}) {
      // A copy of fixed size takes two instructions. The bytes after the token are overwritten by
      // the next one, or lie before `end`.
      std::memcpy(to, tokens.data(id), TokenBytes::kPadding);
    } else {
      std::memcpy(to, tokens.data(id), length);
    }
    to += length;
  }
}

#define FASTGPT_ENCODES(Id)            \
  template class PieceEncoderPool<Id>; \
  template void BytePairEncoder::encode(std::string_view, unsigned, IdBuffer<Id>&) const;
FASTGPT_ENCODES(std::uint16_t)
FASTGPT_ENCODES(std::uint32_t)

#define FASTGPT_DECODES(Id)                                                         \
  template std::size_t BytePairEncoder::decoded_size(const Id*, std::size_t) const; \
  template void BytePairEncoder::decode(const Id*, std::size_t, char*, std::size_t) const;
FASTGPT_DECODES(std::uint16_t)
FASTGPT_DECODES(std::uint32_t)
FASTGPT_DECODES(std::int32_t)
FASTGPT_DECODES(std::uint64_t)
FASTGPT_DECODES(std::int64_t)

}  // namespace fastgpt
