// Products of weights and inputs over the instructions of `Vector`. To be included by the files
// that are compiled for one instruction set each: all of it has internal linkage, because a linker
// would keep one copy for all; for the same reason it calls nothing of the standard library but
// memcpy, which is no call.
//
// A Vector has registers of kWidth floats (Register) or 32-bit integers (Integers), and:
//   zero, load, store, broadcast, add, multiply, multiply_add       on floats
//   multiply_pairs(x, y, sum)                        on words of two numbers in bfloat16
//   load_integers, broadcast_integer, to_floats
//   dot8, dot4(weights, inputs, sum)                 on words of four: weights from 0 to 255 with
//                                                    kInt8Zero added, or from 0 to 15; inputs -127
//                                                    to 127
//   low_nibbles, high_nibbles
// and says how many rows a tile has at most (kFloatRows, kIntegerRows), and up to how many it takes
// a panel's outputs all at once (kPanelRows): of more, half of them at a time.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/repeat.hpp"
#include "engine/kernels.hpp"
#include "training/gelu_formula.hpp"

namespace fastgpt::engine {
namespace {

// Terms are added up in blocks of so many words, and the blocks' sums after that: quicker than
// nothing, and closer to the truth.
constexpr std::size_t kBlock = 256;

inline std::size_t smaller_of(std::size_t a, std::size_t b) { return a < b ? a : b; }

// What a tile of kRows rows and one panel of outputs comes to.
template <std::size_t kRows>
struct Sums {
  float of[kRows][kPanel];
};

// How many outputs of a panel a tile of kRows rows takes at once.
template <typename Vector, std::size_t kRows>
constexpr std::size_t kOutputs = kRows <= Vector::kPanelRows ? kPanel : kPanel / 2;

template <typename Vector, std::size_t kRows, bool kPairs, std::size_t kFirst>
void add_up_floats(const Product& p, std::size_t row, const std::uint32_t* weights,
                   Sums<kRows>& sums) {
  constexpr std::size_t kVectors = kOutputs<Vector, kRows> / Vector::kWidth;
  const float* x = p.x.words + row * p.x.stride;
  for (std::size_t begin = 0; begin < p.words; begin += kBlock) {
    const std::size_t end = smaller_of(begin + kBlock, p.words);
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

template <typename Vector, std::size_t kRows, bool kNibbles, std::size_t kFirst>
void add_up_integers(const Product& p, std::size_t row, const std::uint32_t* weights,
                     Sums<kRows>& sums) {
  constexpr std::size_t kVectors = kOutputs<Vector, kRows> / Vector::kWidth;
  constexpr std::int32_t kZero = kNibbles ? kInt4Zero : Vector::kZeroOfDot8;
  const std::size_t quads = p.group_depth / 4;
  for (std::size_t group = 0; group < p.groups; ++group) {
    const std::int32_t* x = p.x.quads + row * p.x.stride + group * quads;
    const std::size_t at = row * p.groups + group;
    const std::uint32_t* scales = weights;
    if constexpr (kNibbles) weights += kScaleWords;
    typename Vector::Integers tile[kRows][kVectors];
    repeat<kRows>([&](auto r) FASTGPT_INLINE {  // what was added to the weights is taken off again
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
    // The totals stay in memory: a tile takes all registers.
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

// Outputs of a panel from kFirst on.
template <typename Vector, Format kFormat, std::size_t kFirst, std::size_t kRows>
void add_up(const Product& p, std::size_t row, const std::uint32_t* weights, Sums<kRows>& sums) {
  if constexpr (is_integer(kFormat)) {
    add_up_integers<Vector, kRows, kFormat == Format::kInt4, kFirst>(p, row, weights, sums);
  } else {
    add_up_floats<Vector, kRows, kFormat == Format::kBfloat16, kFirst>(p, row, weights, sums);
  }
}

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

// A tile of `rows` rows, from 1 to kMost.
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

// Each panel is read once, and stays in a near cache for all tiles of rows, which are as equal as
// can be.
template <typename Vector, Format kFormat>
void multiply(const Product& p) {
  constexpr std::size_t kMost = is_integer(kFormat) ? Vector::kIntegerRows : Vector::kFloatRows;
  for (std::size_t panel = p.panel_begin; panel < p.panel_end; ++panel) {
    std::size_t tiles = (p.row_end - p.row_begin + kMost - 1) / kMost;
    for (std::size_t row = p.row_begin; row < p.row_end; --tiles) {
      const std::size_t rows = (p.row_end - row + tiles - 1) / tiles;
      multiply_rows<Vector, kFormat, kMost>(p, row, rows, panel);
      row += rows;
    }
  }
}

}  // namespace
}  // namespace fastgpt::engine
