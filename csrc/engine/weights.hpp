// Quantization of weights, and their packing into the order in which kernels read them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "common/arithmetic.hpp"
#include "engine/kernels.hpp"

namespace fastgpt::engine {

// A quantized matrix in the row-major layout of files:
//   kInt8: `integers` [outputs, inputs], `scales` [outputs];
//   kInt4: `integers` [outputs, groups · group / 2], two weights per byte, each with 8 added, the
//          first in the low nibble; `scales` [outputs, groups].
struct QuantizedMatrix {
  QuantizedMatrix(Format format, std::size_t outputs, std::size_t inputs, std::size_t group);

  std::vector<std::uint8_t> integers;
  std::vector<float> scales;           // kInt4: bfloat16 values
  std::size_t stride = 0, groups = 0;  // bytes and scales per row
};

// Quantizes some rows of a matrix of floats [outputs, inputs]; several threads may
// process different rows at once. The scale of a row in kInt8 maps its largest absolute value to
// 127; that of a group in kInt4 is the candidate with the smallest squared error.
void quantize(const float* weights, Range rows, std::size_t inputs, Format format,
              std::size_t group, QuantizedMatrix& to);

// A packed matrix [outputs, inputs]. `place` must be called with memory for it before any other
// function that reads or writes weights.
class Matrix {
 public:
  Matrix() = default;
  Matrix(Format format, std::size_t outputs, std::size_t inputs, std::size_t group);

  std::size_t memory_words() const { return panels_ * panel_words_; }
  // Sets the memory: memory_words() words, all zero, aligned to 64 bytes.
  void place(std::uint32_t* memory) { memory_ = memory; }

  // Pack a range of panels of a matrix. Several threads may pack different panels at once.
  void pack_floats(const float* weights, Range panels);
  void pack_integers(const std::uint8_t* integers, const float* scales, Range panels);
  // Unpack the whole matrix.
  std::vector<float> floats() const;
  QuantizedMatrix integers() const;

  // Converts row `output` to floats, for an embedding lookup.
  void read_row(std::size_t output, float* to) const;

  Format format() const { return format_; }
  std::size_t outputs() const { return outputs_; }
  std::size_t inputs() const { return inputs_; }
  std::size_t panels() const { return panels_; }
  std::size_t group() const { return group_; }
  std::size_t groups() const { return groups_; }
  std::size_t bytes() const { return 4 * memory_words(); }

  // The number of words or quads in a row of inputs.
  std::size_t input_words() const { return is_integer(format_) ? groups_ * group_ / 4 : words_; }

  // Returns the arguments of a product with this matrix. The caller sets x, y, the epilogue and the
  // ranges of rows and panels.
  Product product(const float* bias) const;

 private:
  template <typename WordOf>
  void fill(Range panels, std::size_t first, std::size_t words, std::uint32_t empty,
            const WordOf& word_of);
  void pack_int8(const std::uint8_t* integers, Range panels);
  void pack_int4_group(const std::uint8_t* integers, const float* scales, std::size_t g,
                       Range panels);
  const std::uint32_t* word(std::size_t output, std::size_t index) const;
  std::uint8_t integer(std::size_t output, std::size_t input) const;
  float scale(std::size_t output, std::size_t group) const;

  Format format_ = Format::kFloat32;
  std::size_t outputs_ = 0, inputs_ = 0, group_ = 0;
  std::size_t panels_ = 0, words_ = 0, groups_ = 0, panel_words_ = 0;
  std::uint32_t* memory_ = nullptr;
  std::vector<float> scales_;  // kInt8, padded to whole panels
};

}  // namespace fastgpt::engine
