// Packing of GEMM operands into panels; see GemmPacking for the layout. Only for inclusion by
// gemm_templates.hpp, whose rules on linkage apply here as well.
//
// For a panel of 4 rows of A (a0 to a3), with depths 0, 1, 2, ...:
//
//   a matrix row holds           in memory               packed
//   all depths of one index      a0: 0 1 2 3 ...         a0[0] a1[0] a2[0] a3[0]
//   (a transpose)                a1: 0 1 2 3 ...         a0[1] a1[1] a2[1] a3[1]
//                                ...                     ...
//   one depth of all indices     0: a0 a1 a2 a3 a4 ...   the same: each depth is copied as it is,
//   (`across`)                   1: a0 a1 a2 a3 a4 ...   in pieces of the panel's width
//
// In bfloat16 a word has two depths: a0[0 1] a1[0 1] a2[0 1] a3[0 1], then a0[2 3] and so on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "common/arithmetic.hpp"
#include "common/repeat.hpp"
#include "simd/math.hpp"
#include "training/gemm_kernels.hpp"

namespace fastgpt {
namespace {

// Packs a panel whose matrix rows hold all depths of one index, that is, transposes kWidth rows.
// `transpose(rows, word, to)` packs four words of eight indices; `rest(word)` packs a single word
// of all indices, and is called for those after the last multiple of four.
//
// If kWidth is not a multiple of 8, the last block of eight indices is only partly used. Its
// surplus rows repeat the last row, to stay inside the matrix, and its surplus output lands on the
// first indices of the following word. Blocks are therefore packed from the last to the first, so
// that a following word's own first indices overwrite it. The surplus behind the last word is
// overwritten by the next panel, or lies in the slack behind the last one.
template <std::size_t kWidth, typename Number, typename Transpose, typename Rest>
inline void transpose_panel(const Number* from, std::size_t stride, std::size_t words, float* to,
                            const Transpose& transpose, const Rest& rest) {
  constexpr std::size_t kBlocks = (kWidth + 7) / 8;
  std::size_t w = 0;
  for (; w + 4 <= words; w += 4) {
    for (std::size_t block = kBlocks; block-- > 0;) {
      const Number* rows[8];
      for (std::size_t i = 0; i < 8; ++i) {
        rows[i] = from + min_of(8 * block + i, kWidth - 1) * stride;
      }
      transpose(rows, w, to + w * kWidth + 8 * block);
    }
  }
  for (; w < words; ++w) rest(w);
}

// --- fp32 ----------------------------------------------------------------------------------------

// Packs words of one float each. Vector: see `Kernels`.
template <typename Vector>
class FloatPacking {
 public:
  static constexpr std::size_t kDepthsPerWord = 1;

  // Whole panels are copied or transposed by vector loops; the last, partial one by a scalar loop.
  template <std::size_t kWidth>
  static void pack(const GemmPacking& from, float* to) {
    const auto* first = static_cast<const float*>(from.from.data);
    const std::size_t whole = from.size / kWidth * kWidth;
    if (from.across) {
      copy_panels<kWidth>(from, first, whole, to);
    } else {
      for (std::size_t i = 0; i < whole; i += kWidth) {
        pack_transposed<kWidth>(first + i * from.stride, from.stride, from.depth,
                                to + i * from.depth);
      }
    }
    if (whole < from.size) pack_rest<kWidth>(from, first, whole, to + whole * from.depth);
    if (!from.gelu) return;
    const std::size_t packed = round_up(from.size, kWidth) * from.depth;
    for (std::size_t i = 0; i < packed; ++i) to[i] = gelu_of(to[i]);
  }

  // The sum of the numbers in a word, of which there is one.
  static float sum(float word) { return word; }

 private:
  static constexpr std::size_t kDepthsAtOnce = 4;

  // Copies a few depths of all panels, then the next few: matrix rows are read sequentially.
  //
  // A depth is copied in whole vectors, even if they are wider than the panel: the surplus is
  // overwritten by the panel's next depth. The last depth must be copied exactly, since the surplus
  // would overwrite the first depth of the next panel. So must all depths of a panel at the end of
  // the matrix, where whole vectors would read past the end of a row.
  template <std::size_t kWidth>
  static void copy_panels(const GemmPacking& from, const float* first, std::size_t size,
                          float* to) {
    constexpr std::size_t kVectors = (kWidth + Vector::kWidth - 1) / Vector::kWidth;
    for (std::size_t begin = 0; begin < from.depth; begin += kDepthsAtOnce) {
      const std::size_t end = min_of(begin + kDepthsAtOnce, from.depth);
      for (std::size_t i = 0; i < size; i += kWidth) {
        const bool whole_vectors = i + kVectors * Vector::kWidth <= from.size;
        const std::size_t vector_end = !whole_vectors ? begin : min_of(end, from.depth - 1);
        const float* row = first + begin * from.stride + i;
        float* panel = to + i * from.depth + begin * kWidth;
        std::size_t d = begin;
        for (; d < vector_end; ++d, row += from.stride, panel += kWidth) {
          repeat<kVectors>([&](auto v) FASTGPT_INLINE {
            Vector::store(panel + v * Vector::kWidth, Vector::load(row + v * Vector::kWidth));
          });
        }
        for (; d < end; ++d, row += from.stride, panel += kWidth) {
          std::memcpy(panel, row, sizeof(float[kWidth]));
        }
      }
    }
  }

  // Transposes a panel of rows.
  template <std::size_t kWidth>
  static void pack_transposed(const float* from, std::size_t stride, std::size_t depth, float* to) {
    transpose_panel<kWidth>(
        from, stride, depth, to,
        [](const float* const* rows, std::size_t d, float* target) {
          const float* at[8];
          for (std::size_t i = 0; i < 8; ++i) at[i] = rows[i] + d;
          Vector::transpose_8x4(at, target, kWidth);
        },
        [=](std::size_t d) {
          for (std::size_t i = 0; i < kWidth; ++i) to[d * kWidth + i] = from[i * stride + d];
        });
  }

  // Packs the last, partial panel, padded with zeros.
  template <std::size_t kWidth>
  static void pack_rest(const GemmPacking& from, const float* all, std::size_t begin, float* to) {
    const std::size_t by_index = from.across ? 1 : from.stride;
    const std::size_t by_depth = from.across ? from.stride : 1;
    const float* first = all + begin * by_index;
    for (std::size_t d = 0; d < from.depth; ++d) {
      for (std::size_t i = 0; i < kWidth; ++i) {
        const bool inside = begin + i < from.size;
        to[d * kWidth + i] = inside ? first[i * by_index + d * by_depth] : 0.0F;
      }
    }
  }
};

// --- bfloat16 ------------------------------------------------------------------------------------

// Returns the word of two depths of one index, rounded to bfloat16; the first is the lower half.
inline float word_of(float first, float second) { return float_of(bfloat16_pair(first, second)); }

// Packs words of two consecutive depths in bfloat16, from an operand in fp32 or in bfloat16. If the
// number of depths is odd, the second half of the last word is zero.
//
// Pairs::pack_words<n>(row, next, to) packs n words of consecutive indices from two matrix rows;
// Pairs::transpose_8x4(rows, to, stride) packs four words of each of eight rows.
template <typename Pairs>
class PairPacking {
 public:
  static constexpr std::size_t kDepthsPerWord = 2;

  template <std::size_t kWidth>
  static void pack(const GemmPacking& from, float* to) {
    of_type(from.from, [&](const auto* first) { pack_from<kWidth>(from, first, to); });
  }

  // The sum of the numbers in a word.
  static float sum(float word) { return first_of_pair(word) + second_of_pair(word); }

 private:
  static constexpr std::size_t kWordsAtOnce = 4;

  template <std::size_t kWidth, typename Number>
  static void pack_from(const GemmPacking& from, const Number* first, float* to) {
    const std::size_t words = ceil_div(from.depth, 2);
    const std::size_t whole = from.size / kWidth * kWidth;
    std::size_t packed = whole;
    if (from.across && from.gelu) {
      pack_panels_of_gelu<kWidth>(from, first, whole, words, to);
    } else if (from.across) {
      pack_panels<kWidth>(from, first, whole, words, to);
    } else if (from.gelu) {
      packed = 0;  // no product of the model uses this combination: all of it takes the slow path
    } else {
      for (std::size_t i = 0; i < whole; i += kWidth) {
        pack_transposed<kWidth>(first + i * from.stride, from.stride, from.depth, to + i * words);
      }
    }
    for (std::size_t i = packed; i < from.size; i += kWidth) {
      pack_generic<kWidth>(from, first, i, to + i * words);
    }
  }

  // Packs a few words of all panels, then the next few, so that matrix rows are read sequentially.
  template <std::size_t kWidth, typename Number>
  static void pack_panels(const GemmPacking& from, const Number* first, std::size_t size,
                          std::size_t words, float* to) {
    for (std::size_t begin = 0; begin < words; begin += kWordsAtOnce) {
      const std::size_t end = min_of(begin + kWordsAtOnce, words);
      for (std::size_t i = 0; i < size; i += kWidth) {
        for (std::size_t w = begin; w < end; ++w) {
          const Number* row = first + 2 * w * from.stride + i;
          const Number* next = 2 * w + 1 < from.depth ? row + from.stride : nullptr;
          Pairs::template pack_words<kWidth>(row, next, to + i * words + w * kWidth);
        }
      }
    }
  }

  // The same for gelu of the numbers, which is computed in a buffer, several panels at a time.
  template <std::size_t kWidth, typename Number>
  static void pack_panels_of_gelu(const GemmPacking& from, const Number* first, std::size_t size,
                                  std::size_t words, float* to) {
    constexpr std::size_t kAside = 8 * kWidth;
    float rows[2][kAside];
    for (std::size_t w = 0; w < words; ++w) {
      const bool two = 2 * w + 1 < from.depth;
      for (std::size_t begin = 0; begin < size; begin += kAside) {
        const std::size_t n = min_of(kAside, size - begin);
        for (std::size_t r = 0; r < (two ? 2U : 1U); ++r) {
          const Number* row = first + (2 * w + r) * from.stride + begin;
          for (std::size_t i = 0; i < n; ++i) rows[r][i] = gelu_of(to_float32(row[i]));
        }
        for (std::size_t i = 0; i < n; i += kWidth) {
          Pairs::template pack_words<kWidth>(rows[0] + i, two ? rows[1] + i : nullptr,
                                             to + (begin + i) * words + w * kWidth);
        }
      }
    }
  }

  // Transposes a panel of rows.
  template <std::size_t kWidth, typename Number>
  static void pack_transposed(const Number* from, std::size_t stride, std::size_t depth,
                              float* to) {
    const std::size_t words = ceil_div(depth, 2);
    const auto rest = [=](std::size_t w) {
      for (std::size_t i = 0; i < kWidth; ++i) {
        const Number* at = from + i * stride + 2 * w;
        const bool two = 2 * w + 1 < depth;
        to[w * kWidth + i] = word_of(to_float32(at[0]), two ? to_float32(at[1]) : 0.0F);
      }
    };
    const auto transpose = [](const Number* const* rows, std::size_t w, float* target) {
      const Number* at[8];
      for (std::size_t i = 0; i < 8; ++i) at[i] = rows[i] + 2 * w;
      Pairs::transpose_8x4(at, target, kWidth);
    };
    transpose_panel<kWidth>(from, stride, depth / 2, to, transpose, rest);
    if (depth % 2 != 0) rest(words - 1);
  }

  // Packs one panel, whole or partial, of any layout, with or without gelu, number by number.
  template <std::size_t kWidth, typename Number>
  static void pack_generic(const GemmPacking& from, const Number* first, std::size_t begin,
                           float* to) {
    const auto number = [&](std::size_t i, std::size_t d) {
      if (begin + i >= from.size || d >= from.depth) return 0.0F;
      const std::size_t row = from.across ? d : begin + i, column = from.across ? begin + i : d;
      const float x = to_float32(first[row * from.stride + column]);
      return from.gelu ? gelu_of(x) : x;
    };
    for (std::size_t d = 0; d < from.depth; d += 2) {
      for (std::size_t i = 0; i < kWidth; ++i) {
        to[d / 2 * kWidth + i] = word_of(number(i, d), number(i, d + 1));
      }
    }
  }
};

}  // namespace
}  // namespace fastgpt
