// Products of packed weights and inputs, as templates over a vector type.
//
// Each file that includes this is compiled for a different instruction set. Everything has internal
// linkage, since the linker would otherwise keep one copy for all of them. For the same reason no
// function of the standard library is called, except memcpy, which compilers expand inline.
//
// A product is computed in tiles of up to kFloatRows or kIntegerRows rows of inputs by the outputs
// of one panel, or of half a panel. For each word of depth, a tile loads the words of its outputs,
// broadcasts the word of each row, and multiplies and adds every pair into an accumulator register.
// The weights, by far the larger operand, are thus loaded once for all rows of a tile.
//
// Vector: a vector type (see simd/plain_vector.hpp), to which are added the sizes of the tiles:
//   kFloatRows, kIntegerRows  the maximum number of rows of a tile
//   kPanelRows                the maximum number of rows of a tile that has all outputs of a panel.
//                             A tile of more rows has half of them, for lack of registers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/arithmetic.hpp"
#include "common/repeat.hpp"
#include "engine/kernels.hpp"
#include "simd/math.hpp"

namespace fastgpt::engine {
namespace {

// Sums are accumulated in registers over blocks of this many words, and the blocks' sums are then
// added in memory. This is faster than a single long loop, and reduces the rounding error.
constexpr std::size_t kBlock = 256;

// The sums of a tile of kRows rows by one panel of outputs.
template <std::size_t kRows>
struct Sums {
  float of[kRows][kPanel];
};

// The number of outputs of a panel that a tile of kRows rows computes at once.
template <typename Vector, std::size_t kRows>
constexpr std::size_t kOutputs = kRows <= Vector::kPanelRows ? kPanel : kPanel / 2;

// Computes the sums of a tile in kFloat32, or in kBfloat16 (kPairs), for the outputs of a panel
// from kFirst on: for each word, tile[r][v] += x[r] · w[v], where a lane of w[v] is an output, and
// x[r] is in all lanes. `repeat` unrolls the loops over r and v, so that `tile` is in registers.
template <typename Vector, std::size_t kRows, bool kPairs, std::size_t kFirst>
void accumulate_floats(const Product& p, std::size_t row, const std::uint32_t* weights,
                       Sums<kRows>& sums) {
  constexpr std::size_t kVectors = kOutputs<Vector, kRows> / Vector::kWidth;
  const float* x = p.x.words + row * p.x.stride;
  for (std::size_t begin = 0; begin < p.words; begin += kBlock) {
    const std::size_t end = min_of(begin + kBlock, p.words);
    typename Vector::Register tile[kRows][kVectors];
    repeat<kRows>([&](auto r) FASTGPT_INLINE {
      repeat<kVectors>([&](auto v) FASTGPT_INLINE { tile[r][v] = Vector::zero(); });
    });
    for (std::size_t word = begin; word < end; ++word) {
      typename Vector::Register w[kVectors];
      repeat<kVectors>([&](auto v) FASTGPT_INLINE {
        w[v] = Vector::load(weights + word * kPanel + kFirst + v * Vector::kWidth);
      });
      repeat<kRows>([&](auto r) FASTGPT_INLINE {
        const auto input = Vector::broadcast(x[r * p.x.stride + word]);
        repeat<kVectors>([&](auto v) FASTGPT_INLINE {
          if constexpr (kPairs) {
            tile[r][v] = Vector::multiply_pairs(input, w[v], tile[r][v]);
          } else {
            tile[r][v] = Vector::multiply_add(input, w[v], tile[r][v]);
          }
        });
      });
    }
    repeat<kRows>([&](auto r) FASTGPT_INLINE {
      repeat<kVectors>([&](auto v) FASTGPT_INLINE {
        float* to = sums.of[r] + kFirst + v * Vector::kWidth;
        Vector::store(to, begin == 0 ? tile[r][v] : Vector::add(Vector::load(to), tile[r][v]));
      });
    });
  }
}

// Computes the sums of a tile in kInt8, or in kInt4 (kNibbles), for the outputs of a panel from
// kFirst on.
//
// With stored weights u = w + z, Σ w x = Σ u x - z Σ x over the inputs of a group. The accumulators
// therefore start at -z Σ x, from the precomputed sum of the group's inputs; the integer sum is
// then exact. At the end of a group it is converted to float, multiplied by the scale of the
// inputs, and in kInt4 by that of the weights, and added to the total. In kInt8 the weights' scale
// is the same for all groups of an output, and is applied by `finish`.
//
// A group of a panel in kInt4 is kScaleWords words with the 32 scales in bfloat16, followed by rows
// of 32 words. Such a word has eight inputs of one output: the low nibbles of its bytes are the
// weights of one quad of inputs, the high nibbles those of the next quad.
template <typename Vector, std::size_t kRows, bool kNibbles, std::size_t kFirst>
void accumulate_integers(const Product& p, std::size_t row, const std::uint32_t* weights,
                         Sums<kRows>& sums) {
  constexpr std::size_t kVectors = kOutputs<Vector, kRows> / Vector::kWidth;
  constexpr std::int32_t kZero = kNibbles ? kInt4Zero : Vector::kDot8Offset;
  const std::size_t quads = p.group_depth / 4;
  for (std::size_t group = 0; group < p.groups; ++group) {
    const std::int32_t* x = p.x.quads + row * p.x.stride + group * quads;
    const std::size_t at = row * p.groups + group;
    const std::uint32_t* scales = weights;
    if constexpr (kNibbles) weights += kScaleWords;
    typename Vector::Integers tile[kRows][kVectors];
    repeat<kRows>([&](auto r) FASTGPT_INLINE {  // subtracts the offset of the weights
      const auto start = Vector::broadcast_integer(-kZero * p.x.sums[at + r * p.groups]);
      repeat<kVectors>([&](auto v) FASTGPT_INLINE { tile[r][v] = start; });
    });
    for (std::size_t quad = 0; quad < quads; quad += kNibbles ? 2 : 1, weights += kPanel) {
      typename Vector::Integers w[kVectors];
      repeat<kVectors>([&](auto v) FASTGPT_INLINE {
        w[v] = Vector::load_integers(weights + kFirst + v * Vector::kWidth);
      });
      repeat<kRows>([&](auto r) FASTGPT_INLINE {
        const auto input = Vector::broadcast_integer(x[r * p.x.stride + quad]);
        repeat<kVectors>([&](auto v) FASTGPT_INLINE {
          if constexpr (kNibbles) {
            tile[r][v] = Vector::dot4(Vector::low_nibbles(w[v]), input, tile[r][v]);
          } else {
            tile[r][v] = Vector::dot8(w[v], input, tile[r][v]);
          }
        });
      });
      if constexpr (kNibbles) {
        repeat<kRows>([&](auto r) FASTGPT_INLINE {
          const auto input = Vector::broadcast_integer(x[r * p.x.stride + quad + 1]);
          repeat<kVectors>([&](auto v) FASTGPT_INLINE {
            tile[r][v] = Vector::dot4(Vector::high_nibbles(w[v]), input, tile[r][v]);
          });
        });
      }
    }
    // The totals are kept in memory, since the accumulators occupy the registers.
    repeat<kRows>([&](auto r) FASTGPT_INLINE {
      const auto input_scale = Vector::broadcast(p.x.scales[at + r * p.groups]);
      repeat<kVectors>([&](auto v) FASTGPT_INLINE {
        auto scale = input_scale;
        if constexpr (kNibbles) {
          scale = Vector::multiply(scale,
                                   Vector::load_narrow(scales + (kFirst + v * Vector::kWidth) / 2));
        }
        float* to = sums.of[r] + kFirst + v * Vector::kWidth;
        const auto before = group == 0 ? Vector::zero() : Vector::load(to);
        Vector::store(to, Vector::multiply_add(Vector::to_floats(tile[r][v]), scale, before));
      });
    });
  }
}

// Applies the scales of kInt8, the bias and the epilogue to one row of a panel.
inline void finish(const Product& p, std::size_t panel, const float* sums, float* y) {
  const float* bias = p.bias + panel * kPanel;
  float all[kPanel];
  if (p.format == Format::kInt8) {
    const float* scales = p.scales + panel * kPanel;
    for (std::size_t i = 0; i < kPanel; ++i) all[i] = sums[i] * scales[i] + bias[i];
  } else {
    for (std::size_t i = 0; i < kPanel; ++i) all[i] = sums[i] + bias[i];
  }
  switch (p.finish) {
    case Finish::kStore:
      for (std::size_t i = 0; i < kPanel; ++i) y[i] = all[i];
      break;
    case Finish::kAdd:
      for (std::size_t i = 0; i < kPanel; ++i) y[i] += all[i];
      break;
    case Finish::kGelu:
      for (std::size_t i = 0; i < kPanel; ++i) y[i] = gelu_of(all[i]);
      break;
  }
}

// Computes the sums of a tile for the outputs of a panel from kFirst on.
template <typename Vector, Format kFormat, std::size_t kFirst, std::size_t kRows>
void add_up(const Product& p, std::size_t row, const std::uint32_t* weights, Sums<kRows>& sums) {
  if constexpr (is_integer(kFormat)) {
    accumulate_integers<Vector, kRows, kFormat == Format::kInt4, kFirst>(p, row, weights, sums);
  } else {
    accumulate_floats<Vector, kRows, kFormat == Format::kBfloat16, kFirst>(p, row, weights, sums);
  }
}

// Computes kRows rows of one panel of y.
template <typename Vector, Format kFormat, std::size_t kRows>
void multiply_tile(const Product& p, std::size_t row, std::size_t panel) {
  Sums<kRows> sums;
  const std::uint32_t* weights = p.weights + panel * p.panel_words;
  add_up<Vector, kFormat, 0>(p, row, weights, sums);
  if constexpr (kOutputs<Vector, kRows> < kPanel) {
    add_up<Vector, kFormat, kPanel / 2>(p, row, weights, sums);
  }
  for (std::size_t r = 0; r < kRows; ++r) {
    finish(p, panel, sums.of[r], p.y + (row + r) * p.y_stride + panel * kPanel);
  }
}

// Computes a tile of `rows` rows, from 1 to kMost: selects the template for that number.
template <typename Vector, Format kFormat, std::size_t kMost>
void multiply_rows(const Product& p, std::size_t row, std::size_t rows, std::size_t panel) {
  if constexpr (kMost > 1) {
    if (rows < kMost) {
      multiply_rows<Vector, kFormat, kMost - 1>(p, row, rows, panel);
      return;
    }
  }
  multiply_tile<Vector, kFormat, kMost>(p, row, panel);
}

// Computes a product. Panels are in the outer loop: each is read from memory once, and from a cache
// for the further tiles of rows. The rows are split into the fewest tiles, of nearly equal size,
// since a tile of few rows does less work for each load of weights.
template <typename Vector, Format kFormat>
void multiply(const Product& p) {
  constexpr std::size_t kMost = is_integer(kFormat) ? Vector::kIntegerRows : Vector::kFloatRows;
  for (std::size_t panel = p.panels.begin; panel < p.panels.end; ++panel) {
    std::size_t tiles = ceil_div(p.rows.end - p.rows.begin, kMost);
    for (std::size_t row = p.rows.begin; row < p.rows.end; --tiles) {
      const std::size_t rows = ceil_div(p.rows.end - row, tiles);
      multiply_rows<Vector, kFormat, kMost>(p, row, rows, panel);
      row += rows;
    }
  }
}

// Returns `kernels` with the products in the given formats.
template <typename Vector, Format... kOf>
constexpr Kernels make_products(Kernels kernels = {}) {
  ((kernels.multiply[static_cast<std::size_t>(kOf)] = multiply<Vector, kOf>), ...);
  return kernels;
}

}  // namespace
}  // namespace fastgpt::engine
