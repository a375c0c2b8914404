#include "tokenizer/piece_encoder.hpp"

#include <algorithm>
#include <array>
#include <cstring>
#include <string>
#include <utility>

#include "tokenizer/pretokenizer.hpp"

#if defined(__GNUC__)
#define FASTGPT_NOINLINE __attribute__((noinline))
#else
#define FASTGPT_NOINLINE
#endif

namespace fastgpt {
namespace {

// Long pieces are split into chunks of at most this size, which fit into PieceCache.
constexpr std::size_t kChunk = PieceKey::kMaxSize;

// Returns the size of the first chunk of a piece. Prefers the last position within kChunk bytes
// that no merge can cross (the end of the piece, or one where Vocabulary::joins is false), and sets
// `apart` to true for it; otherwise returns the last character boundary, and sets `apart` to false.
std::size_t chunk_size(const Vocabulary& vocabulary, std::string_view piece, bool& apart) {
  apart = true;
  if (piece.size() <= kChunk) return piece.size();
  for (std::size_t size = kChunk; size > 0; --size) {
    if (!vocabulary.joins(piece[size - 1], piece[size])) return size;
  }
  apart = false;
  for (std::size_t size = kChunk; size > kChunk - 4; --size) {
    if ((static_cast<unsigned char>(piece[size]) & 0xC0U) != 0x80U) return size;
  }
  return kChunk;
}

}  // namespace

template <typename Id>
void PieceEncoder<Id>::encode(std::string_view text, IdBuffer<Id>& ids) {
  Pretokenizer pretokenizer(text);
  std::size_t begin = 0;
  for (Ends ends = pretokenizer.next(); !ends.empty(); ends = pretokenizer.next()) {
    encode_stretch(text, begin, ends, ids);
    begin = ends.end()[-1];
  }
}

// Looks up all pieces of the stretch first and then encodes the few that are not in the cache:
// merging several pieces at a time is faster than one by one (see ShortMerge).
//
// The ids are written directly to the end of `ids`. If pieces are missing, the ids after the first
// hole are moved to looked_up_ and appended again by insert_missing().
template <typename Id>
void PieceEncoder<Id>::encode_stretch(std::string_view text, std::size_t begin, Ends ends,
                                      IdBuffer<Id>& ids) {
  missing_.clear();
  Id* const first = ids.reserve(PieceCache<Id>::kWrittenIds * (ends.size() + 1));
  Id* to = first;
  for (const std::size_t* end = ends.begin(); end != ends.end(); begin = end[-1]) {
    const std::size_t count = std::min(static_cast<std::size_t>(ends.end() - end), kGroup);
    to = look_up_group(text, begin, end, count, first, to);
    end += count;
  }
  if (missing_.empty()) return ids.extend_to(to);
  learn(missing_.data(), missing_.data() + missing_.size());
  looked_up_.assign(first + missing_[0].at, to);
  ids.extend_to(first + missing_[0].at);
  insert_missing(ids);
}

// Writes the ids of the pieces that are in the cache to `to`, returns the end of the ids written,
// and adds the other pieces to missing_. The first piece starts at `begin`; the pieces end at the
// `count` offsets in `ends`. `first` points to the first id of the stretch.
//
// Most of the time is spent on cache misses. Therefore a first pass computes the home buckets of
// all pieces and prefetches them, and a second pass reads them, so that the misses overlap.
template <typename Id>
Id* PieceEncoder<Id>::look_up_group(std::string_view text, std::size_t begin,
                                    const std::size_t* ends, std::size_t count, const Id* first,
                                    Id* to) {
  using Cache = PieceCache<Id>;
  // PieceKey::load reads 16 bytes, which near the end of the text would be beyond it.
  if (text.size() - ends[count - 1] < PieceKey::kMaxSize) {
    for (std::size_t i = 0, at = begin; i < count; at = ends[i++]) {
      to += find_or_add_missing(text, at, ends[i] - at, first, to);
    }
    return to;
  }
  std::array<std::uint64_t, kGroup> lows;  // the first word of each key
  std::array<const typename Cache::HalfLine*, kGroup> halves;
  const auto homes = cache_.homes();
  for (std::size_t i = 0, at = begin; i < count; at = ends[i++]) {
    const std::size_t size = ends[i] - at;
    if (size > PieceKey::kMaxSize) continue;
    const PieceKey key = PieceKey::load(text.data() + at, size);
    lows[i] = key.low;
    halves[i] = homes.ask_for(key);
  }
  for (std::size_t i = 0, at = begin; i < count; at = ends[i++]) {
    const std::size_t size = ends[i] - at;
    if (size <= Cache::kShortSize) {
      const auto& slot = halves[i]->slot_for(lows[i]);
      if (slot.holds(lows[i], size)) {
        to += slot.copy(to);
        continue;
      }
    } else if (size <= PieceKey::kMaxSize) {
      const std::size_t tokens =
          Cache::copy_long(*halves[i], PieceKey::load(text.data() + at, size), size, to);
      if (tokens != 0) {
        to += tokens;
        continue;
      }
    }
    to += find_or_add_missing(text, at, size, first, to);
  }
  return to;
}

// Writes the ids of the piece if it is anywhere in the cache and returns their number; otherwise
// adds the piece to missing_ and returns 0. Not inlined, to keep the loop of look_up_group small.
template <typename Id>
FASTGPT_NOINLINE std::size_t PieceEncoder<Id>::find_or_add_missing(std::string_view text,
                                                                   std::size_t at, std::size_t size,
                                                                   const Id* first, Id* to) {
  const bool is_short = size <= PieceKey::kMaxSize;
  const PieceKey key = is_short ? key_at(text, at, size) : PieceKey{};
  const std::size_t tokens = is_short ? cache_.find(key, size, to) : 0;
  if (tokens == 0) {
    if (is_short) vocabulary_.ask_for_whole_token(key);  // prefetch for learn()
    missing_.emplace_back(key, text.substr(at, size), static_cast<std::size_t>(to - first));
  }
  return tokens;
}

// Sets the tokens of the short pieces among the holes, and inserts them into the caches.
template <typename Id>
void PieceEncoder<Id>::learn(MissingPiece* hole, MissingPiece* end) {
  std::array<MissingPiece*, kBatch> unknown;
  std::size_t unknowns = 0;
  for (; hole != end; ++hole) {
    if (!hole->is_short() || is_known(*hole)) continue;
    unknown[unknowns++] = hole;
    if (unknowns == kBatch) merge_missing(unknown.data(), std::exchange(unknowns, 0));
  }
  merge_missing(unknown.data(), unknowns);
}

// Sets the tokens of a piece that needs no merging and returns true: one that has been inserted
// into a cache since the lookup that missed it, or one that is a single token. Returns false for
// others.
template <typename Id>
bool PieceEncoder<Id>::is_known(MissingPiece& hole) {
  auto& [ids, count] = hole.tokens;
  if (!hole.in_cache()) {
    count = long_cache_.find(hole.piece, ids.data());
    return count != 0;
  }
  count = cache_.find(hole.key, hole.piece.size(), ids.data());
  if (count != 0) return true;
  const TokenId whole = vocabulary_.whole_token(hole.key, hole.piece.size());
  if (whole == kNoToken) return false;
  ids[0] = static_cast<Id>(whole);
  count = 1;
  cache_.insert(hole.key, hole.piece.size(), ids.data(), 1);
  return true;
}

// Merges the pieces together (see merge_short), sets their tokens and inserts them into the caches.
template <typename Id>
void PieceEncoder<Id>::merge_missing(MissingPiece* const* holes, std::size_t count) {
  std::array<std::string_view, kBatch> pieces;
  std::array<ShortTokens<Id>*, kBatch> tokens{};
  for (std::size_t i = 0; i < count; ++i) {
    pieces[i] = holes[i]->piece;
    tokens[i] = &holes[i]->tokens;
  }
  merge_short(vocabulary_, pieces.data(), tokens.data(), count);
  for (std::size_t i = 0; i < count; ++i) {
    const MissingPiece& hole = *holes[i];
    if (hole.in_cache()) {
      cache_.insert(hole.key, hole.piece.size(), hole.tokens.ids.data(), hole.tokens.count);
    } else {
      long_cache_.insert(hole.piece, hole.tokens.ids.data(), hole.tokens.count);
    }
  }
}

// Appends the ids in looked_up_, with the ids of the missing pieces inserted.
template <typename Id>
void PieceEncoder<Id>::insert_missing(IdBuffer<Id>& ids) {
  const std::size_t first = missing_[0].at;
  std::size_t at = first;
  for (const MissingPiece& hole : missing_) {
    ids.append(looked_up_.data() + (at - first), hole.at - at);
    if (hole.is_short()) {
      const auto& [tokens, count] = hole.tokens;
      // Copying the whole array is faster than a copy of variable size.
      std::copy(tokens.begin(), tokens.end(), ids.reserve(tokens.size()));
      ids.extend_by(count);
    } else {
      encode_long(hole.piece, ids);
    }
    at = hole.at;
  }
  ids.append(looked_up_.data() + (at - first), looked_up_.size() - (at - first));
}

// Appends the ids of a piece of more than ShortMerge::kCapacity bytes.
template <typename Id>
void PieceEncoder<Id>::encode_long(std::string_view piece, IdBuffer<Id>& ids) {
  const bool cached = piece.size() <= LongPieceCache<Id>::kMaxPiece;
  if (cached) {
    const std::size_t count = long_cache_.find(piece, ids.reserve(piece.size()));
    if (count != 0) return ids.extend_by(count);
  }
  const std::size_t first = ids.size();
  encode_chunks(piece, ids);
  if (cached) long_cache_.insert(piece, ids.data() + first, ids.size() - first);
}

// Encodes a long piece chunk by chunk. The result is exact if no merge can cross the ends of the
// chunks, or if the two tokens at each seam between chunks can stand side by side (see
// is_stable_pair). Otherwise the tokens around the seam are merged again (see mend). If that
// fails, the whole piece is merged at once.
template <typename Id>
void PieceEncoder<Id>::encode_chunks(std::string_view piece, IdBuffer<Id>& ids) {
  const std::size_t first = ids.size();
  std::size_t fence = first;  // index of an id before which no merge can cross
  // Many long pieces repeat the same few bytes. Start with few chunks at a time, so that they are
  // in the cache by the time that the following ones are looked up.
  std::size_t count = 1;
  for (std::size_t at = 0; at < piece.size(); count = std::min(2 * count, kBatch)) {
    at = cut_chunks(piece, at, count);
    learn(chunks_.data(), chunks_.data() + chunks_.size());
    for (const MissingPiece& chunk : chunks_) {
      if (!append_chunk(piece, chunk, fence, ids)) {
        ids.truncate(first);
        const std::vector<TokenId>& tokens = merger_.merge(piece);
        ids.append(tokens.data(), tokens.size());
        return;
      }
      if (chunk.ends_apart) fence = ids.size();
    }
  }
}

// Splits up to `count` chunks off piece[at :] into chunks_, and returns the offset after them.
template <typename Id>
std::size_t PieceEncoder<Id>::cut_chunks(std::string_view piece, std::size_t at,
                                         std::size_t count) {
  chunks_.clear();
  while (at < piece.size() && chunks_.size() < count) {
    bool apart;
    const std::size_t size = chunk_size(vocabulary_, piece.substr(at), apart);
    const PieceKey key = key_at(piece, at, size);
    vocabulary_.ask_for_whole_token(key);
    chunks_.emplace_back(key, piece.substr(at, size), at);
    chunks_.back().ends_apart = apart;
    at += size;
  }
  return at;
}

// Appends the ids of a chunk, and merges again across the seam before it if necessary. Returns
// false if that fails.
template <typename Id>
bool PieceEncoder<Id>::append_chunk(std::string_view piece, const MissingPiece& chunk,
                                    std::size_t fence, IdBuffer<Id>& ids) {
  const std::size_t seam = ids.size();
  ids.append(chunk.tokens.ids.data(), chunk.tokens.count);
  if (seam == fence || is_stable_pair(ids.data()[seam - 1], ids.data()[seam])) return true;
  return merge_across_seam(piece, chunk.at, fence, seam, ids);
}

// Repairs a seam between chunks, which is at offset `at` of the piece and before ids[seam]. Takes
// one token on each side of the seam and merges their bytes again. If a token next to the new ones
// cannot stand side by side with them, doubles the number of tokens taken on that side and tries
// again, up to kMostTaken tokens on the left. Never takes tokens before ids[fence], since no merge
// can cross that position. Returns false, with `ids` unchanged, if this limit is exceeded.
template <typename Id>
bool PieceEncoder<Id>::merge_across_seam(std::string_view piece, std::size_t at, std::size_t fence,
                                         std::size_t seam, IdBuffer<Id>& ids) {
  constexpr std::size_t kMostTaken = 64;
  const auto size_of = [&](std::size_t i) { return vocabulary_.tokens().size_of(ids.data()[i]); };
  std::size_t begin = seam;  // ids[begin : end] are merged again
  std::size_t end = seam;
  std::size_t bytes_left = 0;
  std::size_t bytes_right = 0;
  std::size_t take_left = 1;
  std::size_t take_right = 1;
  while (take_left <= kMostTaken) {
    for (; begin > fence && seam - begin < take_left; --begin) bytes_left += size_of(begin - 1);
    for (; end < ids.size() && end - seam < take_right; ++end) bytes_right += size_of(end);
    const std::vector<Id>& tokens =
        merge_again(piece.substr(at - bytes_left, bytes_left + bytes_right));
    const bool left_stands =
        begin == fence || is_stable_pair(ids.data()[begin - 1], tokens.front());
    const bool right_stands = end == ids.size() || is_stable_pair(tokens.back(), ids.data()[end]);
    if (left_stands && right_stands) {
      merged_again_.insert(merged_again_.end(), ids.data() + end, ids.data() + ids.size());
      ids.truncate(begin);
      ids.append(merged_again_.data(), merged_again_.size());
      return true;
    }
    if (!left_stands) take_left *= 2;
    if (!right_stands) take_right *= 2;
  }
  return false;
}

// Returns the tokens of the bytes, from long_cache_ if they are there. Valid until the next call.
template <typename Id>
const std::vector<Id>& PieceEncoder<Id>::merge_again(std::string_view bytes) {
  merged_again_.resize(bytes.size());
  const bool cached = bytes.size() <= LongPieceCache<Id>::kMaxPiece;
  std::size_t count = cached ? long_cache_.find(bytes, merged_again_.data()) : 0;
  if (count == 0) {
    const std::vector<TokenId>& tokens = merger_.merge(bytes);
    count = tokens.size();
    for (std::size_t i = 0; i < count; ++i) merged_again_[i] = static_cast<Id>(tokens[i]);
    if (cached) long_cache_.insert(bytes, merged_again_.data(), count);
  }
  merged_again_.resize(count);
  return merged_again_;
}

// Returns whether the concatenated bytes of the two tokens are encoded to exactly these two tokens.
//
// If this holds for every two neighbors in a list of tokens, then the list is the encoding of the
// concatenation of all of them. Proof: suppose that encoding the concatenation makes a merge across
// a boundary between tokens of the list, and consider the first such merge. All merges before it
// were within tokens, and those within the two tokens at this boundary are the same, in the same
// order, as when only these two are encoded together. So the merge would be made there as well, and
// the two tokens could not stand side by side.
//
// Results are kept in a direct-mapped cache. An entry is the pair, shifted left by one, with the
// result in the lowest bit; kKnown distinguishes the pair (0, 0) from an empty entry.
template <typename Id>
bool PieceEncoder<Id>::is_stable_pair(TokenId left, TokenId right) {
  constexpr std::size_t kSlots = 4096;
  constexpr std::uint64_t kKnown = std::uint64_t{1} << 62;
  if (stable_pairs_.empty()) stable_pairs_.resize(kSlots);
  const std::uint64_t pair = kKnown | static_cast<std::uint64_t>(left) << kIdBits | right;
  std::uint64_t& known = stable_pairs_[(pair * 0x9E3779B97F4A7C15) >> 52];
  if (known >> 1 != pair) {
    const TokenBytes& bytes = vocabulary_.tokens();
    std::string both(bytes[left]);
    both += bytes[right];
    const std::vector<TokenId>& tokens = merger_.merge(both);
    const bool stand = tokens.size() == 2 && tokens[0] == left && tokens[1] == right;
    known = pair << 1 | (stand ? 1 : 0);
  }
  return (known & 1) != 0;
}

template class PieceEncoder<std::uint16_t>;
template class PieceEncoder<std::uint32_t>;

}  // namespace fastgpt
