// Encodes the pieces of a text to token ids, with caches of the pieces encoded before.
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

// Encodes texts piece by piece: a piece that occurs for the first time is merged, later ones are
// looked up in a cache. The ids do not depend on the contents of the caches. Not thread-safe.
//
// The ends that one call of Pretokenizer::next() returns are called a stretch. It is encoded in
// three steps: look up all its pieces and note the missing ones as holes (look_up_group), find the
// tokens of the holes in batches (learn), and insert them between the ids found (insert_missing).
template <typename Id>
class PieceEncoder {
 public:
  explicit PieceEncoder(const Vocabulary& vocabulary)
      : vocabulary_(vocabulary), merger_(vocabulary) {}

  // Appends the ids of a text to `ids`.
  void encode(std::string_view text, IdBuffer<Id>& ids);

 private:
  static constexpr std::size_t kGroup = 64;  // number of pieces looked up together
  static constexpr std::size_t kBatch = 64;  // number of pieces merged together

  // A piece that is not in the cache. Its ids are to be inserted before the id at index `at` of the
  // stretch. Also used for the chunks of a long piece, where `at` is an offset into the piece.
  struct MissingPiece {
    MissingPiece(PieceKey missing_key, std::string_view missing, std::size_t place)
        : key(missing_key), piece(missing), at(place) {}

    bool in_cache() const { return piece.size() <= PieceKey::kMaxSize; }
    bool is_short() const { return piece.size() <= ShortMerge::kCapacity; }

    PieceKey key;  // valid if in_cache()
    std::string_view piece;
    std::size_t at;
    ShortTokens<Id> tokens;   // set by learn(), if is_short()
    bool ends_apart = false;  // for a chunk: whether no merge can cross its end
  };

  void encode_stretch(std::string_view text, std::size_t begin, Ends ends, IdBuffer<Id>& ids);
  Id* look_up_group(std::string_view text, std::size_t begin, const std::size_t* ends,
                    std::size_t count, const Id* first, Id* to);
  std::size_t find_or_add_missing(std::string_view text, std::size_t at, std::size_t size,
                                  const Id* first, Id* to);
  void learn(MissingPiece* hole, MissingPiece* end);
  bool is_known(MissingPiece& hole);
  void merge_missing(MissingPiece* const* holes, std::size_t count);
  void insert_missing(IdBuffer<Id>& ids);
  void encode_long(std::string_view piece, IdBuffer<Id>& ids);
  void encode_chunks(std::string_view piece, IdBuffer<Id>& ids);
  std::size_t cut_chunks(std::string_view piece, std::size_t at, std::size_t count);
  bool append_chunk(std::string_view piece, const MissingPiece& chunk, std::size_t fence,
                    IdBuffer<Id>& ids);
  bool merge_across_seam(std::string_view piece, std::size_t at, std::size_t fence,
                         std::size_t seam, IdBuffer<Id>& ids);
  const std::vector<Id>& merge_again(std::string_view bytes);
  bool is_stable_pair(TokenId left, TokenId right);

  const Vocabulary& vocabulary_;
  PieceCache<Id> cache_;
  LongPieceCache<Id> long_cache_;
  Merger merger_;
  std::vector<MissingPiece> missing_;        // the missing pieces of the current stretch
  std::vector<Id> looked_up_;                // ids of the stretch after its first hole
  std::vector<MissingPiece> chunks_;         // the current chunks of a long piece
  std::vector<Id> merged_again_;             // result of merge_again
  std::vector<std::uint64_t> stable_pairs_;  // direct-mapped cache of is_stable_pair
};

}  // namespace fastgpt
