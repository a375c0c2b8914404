// Turns one piece after the other into token ids.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

#include "tokenizer/id_buffer.hpp"
#include "tokenizer/merger.hpp"
#include "tokenizer/piece_cache.hpp"
#include "tokenizer/pretokenizer.hpp"
#include "tokenizer/vocabulary.hpp"

namespace fastgpt {

// Merges a piece that it sees for the first time and looks it up after that. The ids are the same
// whatever it has seen. For one thread at a time.
template <typename Id>
class PieceEncoder {
 public:
  explicit PieceEncoder(const Vocabulary& vocabulary)
      : vocabulary_(vocabulary), merger_(vocabulary) {}

  // Appends the ids of all pieces of a text.
  void encode(std::string_view text, IdBuffer<Id>& ids);

 private:
  static constexpr std::size_t kGroup = 64;  // pieces that are looked up together
  static constexpr std::size_t kBatch = 64;  // and merged

  // A piece that is missing before the id at this place.
  struct Hole {
    Hole(PieceKey missing_key, std::string_view missing, std::size_t place)
        : key(missing_key), piece(missing), at(place) {}

    bool in_cache() const { return piece.size() <= PieceKey::kMaxSize; }
    bool is_short() const { return piece.size() <= ShortMerge::kCapacity; }

    PieceKey key;  // if it is for the cache
    std::string_view piece;
    std::size_t at;
    ShortTokens<Id> tokens;   // of a short one, once they are known
    bool ends_apart = false;  // a chunk that ends where no merge crosses
  };

  void encode_stretch(std::string_view text, std::size_t begin, Ends ends, IdBuffer<Id>& ids);
  Id* look_up_group(std::string_view text, std::size_t begin, const std::size_t* ends,
                    std::size_t count, const Id* first, Id* to);
  std::size_t find_or_note(std::string_view text, std::size_t at, std::size_t size, const Id* first,
                           Id* to);
  void learn(Hole* hole, Hole* end);
  bool is_known(Hole& hole);
  void merge_holes(Hole* const* holes, std::size_t count);
  void fill_holes(IdBuffer<Id>& ids);
  void encode_long(std::string_view piece, IdBuffer<Id>& ids);
  void encode_chunks(std::string_view piece, IdBuffer<Id>& ids);
  std::size_t cut_chunks(std::string_view piece, std::size_t at, std::size_t count);
  bool append_chunk(std::string_view piece, const Hole& chunk, std::size_t fence,
                    IdBuffer<Id>& ids);
  bool mend(std::string_view piece, std::size_t at, std::size_t fence, std::size_t seam,
            IdBuffer<Id>& ids);
  const std::vector<Id>& merge_again(std::string_view bytes);
  bool stand_side_by_side(TokenId left, TokenId right);

  const Vocabulary& vocabulary_;
  PieceCache<Id> cache_;
  LongPieceCache<Id> long_cache_;
  Merger merger_;
  std::vector<Hole> holes_;                  // of a stretch
  std::vector<Id> looked_up_;                // what follows its first hole
  std::vector<Hole> chunks_;                 // some of a long piece
  std::vector<Id> merged_again_;             // by merge_again
  std::vector<std::uint64_t> side_by_side_;  // what stand_side_by_side has found, by hash
};

}  // namespace fastgpt
