// A view of a matrix in row-major order.
#pragma once

#include <cstddef>

namespace fastgpt {

// Pointer: a pointer to the elements, such as const float* or Floats. Element (i, j) is at index
// i * stride + j.
template <typename Pointer>
struct MatrixView {
  Pointer first{};
  std::size_t stride = 0;

  Pointer operator[](std::size_t row) const { return first + row * stride; }
  // Returns the matrix without the rows before `row`.
  MatrixView from(std::size_t row) const { return {(*this)[row], stride}; }
};

}  // namespace fastgpt
