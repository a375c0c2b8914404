#include "training/embedding.hpp"

#include <algorithm>

#include "common/arithmetic.hpp"
#include "common/parallel.hpp"
#include "simd/vector_loops.hpp"

namespace fastgpt {
namespace {

// Work is split by columns, not by rows: no two threads add to the same element, and each element's
// terms are added in the order of the ids.
constexpr std::size_t kTileColumns = 64;

}  // namespace

void add_rows(const std::int64_t* ids, std::size_t n, std::size_t columns, const float* values,
              float* table, unsigned threads) {
  for_each_tile(ceil_div(columns, kTileColumns), threads, [&](std::size_t tile) {
    const std::size_t begin = tile * kTileColumns;
    const std::size_t size = std::min(kTileColumns, columns - begin);
    for (std::size_t i = 0; i < n; ++i) {
      float* row = table + static_cast<std::size_t>(ids[i]) * columns;
      run_vectorized<add_to>(size, values + i * columns + begin, row + begin);
    }
  });
}

}  // namespace fastgpt
