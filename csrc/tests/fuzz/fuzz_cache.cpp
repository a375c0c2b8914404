// Compares the caches of pieces with std::map, on pieces that are easily confused with each other,
// in tables that start small, so that they grow many times.
#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "tests/fuzz/fuzz.hpp"
#include "tokenizer/piece_cache.hpp"

namespace fastgpt {
namespace {

template <typename Id>
using Known = std::map<std::string, std::vector<Id>>;

// Draws a piece of few different bytes, so that many pieces differ only in their size or in one
// byte.
std::string draw_piece(Numbers& numbers, std::size_t min_size, std::size_t max_size) {
  static constexpr char kBytes[] = {'\0', 'a', '\xFF'};
  const std::size_t size = min_size + numbers.below(max_size - min_size + 1);
  std::string piece(size, kBytes[numbers.below(3)]);
  const std::size_t n_changes = numbers.below(3);
  for (std::size_t i = 0; i < n_changes; ++i) {
    piece[numbers.below(size)] = static_cast<char>(numbers.below(256));
  }
  return piece;
}

template <typename Id>
std::vector<Id> draw_ids(Numbers& numbers, std::size_t max_count) {
  std::vector<Id> ids(1 + numbers.below(max_count));
  for (Id& id : ids) id = static_cast<Id>(numbers.below(65536) * 31);
  return ids;
}

// Returns the ids of the piece, or an empty vector if it is not in the cache.
template <typename Id>
std::vector<Id> find(const PieceCache<Id>& cache, const std::string& piece) {
  std::array<Id, PieceCache<Id>::kWrittenIds> ids;
  const std::size_t count = cache.find(PieceKey::load_exactly(piece), piece.size(), ids.data());
  return {ids.data(), ids.data() + count};
}

template <typename Id>
void check_found(const PieceCache<Id>& cache, const Known<Id>& known) {
  for (const auto& [piece, ids] : known) {
    check(find(cache, piece) == ids, "a piece remains in the cache with its ids");
  }
}

template <typename Id>
void check_cache(Numbers numbers) {
  PieceCache<Id> cache(4);
  Known<Id> known;
  while (numbers.left() > 0) {
    const std::string piece = draw_piece(numbers, 1, PieceKey::kMaxSize);
    const PieceKey key = PieceKey::load_exactly(piece);
    const std::string padded = piece + std::string(PieceKey::kMaxSize, 'z');
    check(PieceKey::load(padded.data(), piece.size()) == key, "load and load_exactly agree");
    check(find(cache, piece).empty() == (known.count(piece) == 0), "only known pieces are found");
    if (known.count(piece) == 1) continue;
    std::vector<Id> ids = draw_ids<Id>(numbers, piece.size());
    known.emplace(piece, ids);
    const std::size_t count = ids.size();
    ids.resize(PieceCache<Id>::kWrittenIds, Id{9});  // insert() reads kWrittenIds elements
    cache.insert(key, piece.size(), ids.data(), count);
    if (known.size() % 64 == 1) check_found(cache, known);
  }
  check_found(cache, known);
}

// This cache may lose entries, but must never return the ids of another piece.
template <typename Id>
void check_long_cache(Numbers numbers) {
  LongPieceCache<Id> cache;
  Known<Id> known;
  while (numbers.left() > 0) {
    const std::string piece =
        draw_piece(numbers, PieceKey::kMaxSize + 1, LongPieceCache<Id>::kMaxPiece);
    std::array<Id, LongPieceCache<Id>::kMaxPiece> found;
    if (const std::size_t count = cache.find(piece, found.data()); count != 0) {
      check(std::vector<Id>(found.data(), found.data() + count) == known.at(piece),
            "a long piece has its own ids");
      continue;
    }
    const std::vector<Id> ids = draw_ids<Id>(numbers, piece.size());
    cache.insert(piece, ids.data(), ids.size());
    known[piece] = ids;
    check(cache.find(piece, found.data()) == ids.size(), "a long piece is found after insertion");
  }
}

}  // namespace
}  // namespace fastgpt

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const fastgpt::Numbers numbers({reinterpret_cast<const char*>(data), size});
  fastgpt::check_cache<std::uint16_t>(numbers);
  fastgpt::check_cache<std::uint32_t>(numbers);
  fastgpt::check_long_cache<std::uint16_t>(numbers);
  fastgpt::check_long_cache<std::uint32_t>(numbers);
  return 0;
}
