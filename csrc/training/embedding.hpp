// The gradient of an embedding table.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgpt {

// Adds row i of `values` [n, columns] to row ids[i] of the table, for all i in order, on up to
// `threads` threads.
void add_rows(const std::int64_t* ids, std::size_t n, std::size_t columns, const float* values,
              float* table, unsigned threads);

}  // namespace fastgpt
