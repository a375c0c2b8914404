// Weights in the order in which kernels read them, and how numbers are rounded on the way there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "kernels.hpp"

namespace fastgpt::engine {

// How a matrix of integers lies in a file, row after row:
//   kInt8: `integers` [outputs, inputs], `scales` [outputs];
//   kInt4: `integers` [outputs, groups · group / 2], two weights with 8 added in a byte, the first
//          in the lower half; `scales` [outputs, groups].
struct Integers {
  std::vector<std::uint8_t> integers;
  std::vector<float> scales;  // kInt4: representable in bfloat16
};

// Rounds a matrix of floats [outputs, inputs]. Scales make the largest weight 127, and in kInt4
// the squared error small.
Integers quantize(const float* weights, std::size_t outputs, std::size_t inputs, Format format,
                  std::size_t group);

// A matrix [outputs, inputs] ready to be multiplied with, once it has been given its place.
class Matrix {
 public:
  Matrix() = default;
  Matrix(Format format, std::size_t outputs, std::size_t inputs, std::size_t group);

  std::size_t memory_words() const { return panels_ * panel_words_; }
  // Lays it where there are so many words of zeros, at an address that 64 divides.
  void place(std::uint32_t* memory) { memory_ = memory; }

  // Take some panels of a matrix; different threads may at once take different ones.
  void take_floats(const float* weights, std::size_t panel_begin, std::size_t panel_end);
  void take_integers(const std::uint8_t* integers, const float* scales, std::size_t panel_begin,
                     std::size_t panel_end);
  // The opposite, for all of it.
  std::vector<float> floats() const;
  Integers integers() const;

  // Row `output` as floats, for an embedding.
  void read_row(std::size_t output, float* to) const;

  Format format() const { return format_; }
  std::size_t outputs() const { return outputs_; }
  std::size_t inputs() const { return inputs_; }
  std::size_t panels() const { return panels_; }
  std::size_t group() const { return group_; }
  std::size_t groups() const { return groups_; }
  std::size_t bytes() const { return 4 * memory_words(); }

  // The numbers that a row of inputs takes: words or quads, and scales and sums.
  std::size_t input_words() const { return is_integer(format_) ? groups_ * group_ / 4 : words_; }

  // A product with this matrix; the caller sets x and y, and which part of it.
  Product product(const float* bias) const;

 private:
  const std::uint32_t* word(std::size_t output, std::size_t index) const;
  std::uint32_t* word(std::size_t output, std::size_t index);
  // Where an integer lies: its byte, and in kInt4 whether it is the upper half.
  std::uint8_t integer(std::size_t output, std::size_t input) const;
  void put_integer(std::size_t output, std::size_t input, std::uint8_t value);
  float scale(std::size_t output, std::size_t group) const;

  Format format_ = Format::kFloat32;
  std::size_t outputs_ = 0, inputs_ = 0, group_ = 0;
  std::size_t panels_ = 0, words_ = 0, groups_ = 0, panel_words_ = 0;
  std::uint32_t* memory_ = nullptr;
  std::vector<float> scales_;  // kInt8, for whole panels
};

}  // namespace fastgpt::engine
