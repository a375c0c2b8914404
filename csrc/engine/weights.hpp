// Weights in the order in which kernels read them, and how numbers are rounded on the way there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "engine/kernels.hpp"

namespace fastgpt::engine {

// How a matrix of integers lies in a file, row after row:
//   kInt8: `integers` [outputs, inputs], `scales` [outputs];
//   kInt4: `integers` [outputs, groups · group / 2], two weights with 8 added in a byte, the first
//          in the lower half; `scales` [outputs, groups].
struct Integers {
  Integers(Format format, std::size_t outputs, std::size_t inputs, std::size_t group);

  std::vector<std::uint8_t> integers;
  std::vector<float> scales;           // kInt4: representable in bfloat16
  std::size_t stride = 0, groups = 0;  // bytes and scales of a row
};

// Rounds rows `begin` to `end` of a matrix of floats [outputs, inputs], different threads different
// ones. Scales make the largest weight 127, and in kInt4 the squared error small.
void quantize(const float* weights, std::size_t begin, std::size_t end, std::size_t inputs,
              Format format, std::size_t group, Integers& to);

struct Panels {
  std::size_t begin, end;
};

// A matrix [outputs, inputs] ready to be multiplied with, once it has been given its place.
class Matrix {
 public:
  Matrix() = default;
  Matrix(Format format, std::size_t outputs, std::size_t inputs, std::size_t group);

  std::size_t memory_words() const { return panels_ * panel_words_; }
  // Lays it where there are so many words of zeros, at an address that 64 divides.
  void place(std::uint32_t* memory) { memory_ = memory; }

  // Take some panels of a matrix; different threads may at once take different ones.
  void take_floats(const float* weights, Panels panels);
  void take_integers(const std::uint8_t* integers, const float* scales, Panels panels);
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
  template <typename WordOf>
  void fill(Panels panels, std::size_t first, std::size_t words, std::uint32_t empty,
            const WordOf& word_of);
  void take_integers8(const std::uint8_t* integers, Panels panels);
  void take_group4(const std::uint8_t* integers, const float* scales, std::size_t g, Panels panels);
  const std::uint32_t* word(std::size_t output, std::size_t index) const;
  std::uint8_t integer(std::size_t output, std::size_t input) const;
  float scale(std::size_t output, std::size_t group) const;

  Format format_ = Format::kFloat32;
  std::size_t outputs_ = 0, inputs_ = 0, group_ = 0;
  std::size_t panels_ = 0, words_ = 0, groups_ = 0, panel_words_ = 0;
  std::uint32_t* memory_ = nullptr;
  std::vector<float> scales_;  // kInt8, for whole panels
};

}  // namespace fastgpt::engine
