// The gradient of a table whose rows were looked up.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastgpt {

// Adds values [n, columns] to the rows of the table that ids [n] name, in their order.
void add_rows(const std::int64_t* ids, std::size_t n, std::size_t columns, const float* values,
              float* table, unsigned threads);

}  // namespace fastgpt
