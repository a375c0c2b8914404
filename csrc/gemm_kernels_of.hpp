// gemm_kernels.hpp for one kind of vector register. Each file that includes this is compiled for
// another instruction set: internal linkage keeps the linker from taking one copy for all, and
// nothing of the standard library is called for the same reason.
#pragma once

#include <cstddef>
#include <cstring>
#include <utility>

#include "gelu_formula.hpp"
#include "gemm_kernels.hpp"
#include "prefetch.hpp"

#if defined(__GNUC__)
#define FASTGPT_INLINE __attribute__((always_inline))
#else
#define FASTGPT_INLINE
#endif

namespace fastgpt {
namespace {

inline std::size_t smaller(std::size_t a, std::size_t b) { return a < b ? a : b; }

template <typename Body, std::size_t... kIndex>
FASTGPT_INLINE inline void repeat(std::index_sequence<kIndex...> /*indices*/, const Body& body) {
  (body(std::integral_constant<std::size_t, kIndex>{}), ...);
}

// Calls body(0) to body(n - 1) without a loop: only then do compilers keep arrays of registers in
// registers.
template <std::size_t n, typename Body>
FASTGPT_INLINE inline void repeat(const Body& body) {
  repeat(std::make_index_sequence<n>{}, body);
}

// Vector: a register of kWidth floats, and kTileRows × kTileVectors of them that hold a tile of C.
template <typename Vector>
class Kernels {
 public:
  static constexpr std::size_t kRows = Vector::kTileRows;
  static constexpr std::size_t kColumns = Vector::kTileVectors * Vector::kWidth;

  static constexpr GemmKernels table() {
    return {kRows, kColumns, pack<kRows>, pack<kColumns>, multiply, gelu, add_row_sums};
  }

 private:
  // --- packing ---------------------------------------------------------------------------------

  static constexpr std::size_t kDepthsAtOnce = 4;

  template <std::size_t kWidth>
  static void pack(const GemmPacking& from, float* to) {
    const std::size_t whole = from.size / kWidth * kWidth;
    if (from.across) {
      copy_panels<kWidth>(from, whole, to);
    } else {
      for (std::size_t i = 0; i < whole; i += kWidth) {
        transpose_panel<kWidth>(from.from + i * from.stride, from.stride, from.depth,
                                to + i * from.depth);
      }
    }
    if (whole < from.size) pack_rest<kWidth>(from, whole, to + whole * from.depth);
  }

  // A few depths of all panels, then the next few: whole rows of the matrix are read in order.
  // Whole vectors are quicker than what a panel is wide; what they write too much, the next depth
  // overwrites, so that the last one goes without.
  template <std::size_t kWidth>
  static void copy_panels(const GemmPacking& from, std::size_t size, float* to) {
    constexpr std::size_t kVectors = (kWidth + Vector::kWidth - 1) / Vector::kWidth;
    for (std::size_t begin = 0; begin < from.depth; begin += kDepthsAtOnce) {
      const std::size_t end = smaller(begin + kDepthsAtOnce, from.depth);
      for (std::size_t i = 0; i < size; i += kWidth) {
        const bool whole_vectors = i + kVectors * Vector::kWidth <= from.size;
        const std::size_t vector_end = !whole_vectors ? begin : smaller(end, from.depth - 1);
        const float* row = from.from + begin * from.stride + i;
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

  // Where kWidth is no multiple of 8, what is written past one depth is overwritten by the next,
  // and past the last depth by the next panel; so the last indices come first.
  template <std::size_t kWidth>
  static void transpose_panel(const float* from, std::size_t stride, std::size_t depth, float* to) {
    constexpr std::size_t kBlocks = (kWidth + 7) / 8;
    std::size_t d = 0;
    for (; d + 4 <= depth; d += 4) {
      for (std::size_t block = kBlocks; block-- > 0;) {
        const float* rows[8];
        for (std::size_t i = 0; i < 8; ++i) {
          rows[i] = from + smaller(8 * block + i, kWidth - 1) * stride + d;
        }
        Vector::transpose_8x4(rows, to + d * kWidth + 8 * block, kWidth);
      }
    }
    for (; d < depth; ++d) {
      for (std::size_t i = 0; i < kWidth; ++i) to[d * kWidth + i] = from[i * stride + d];
    }
  }

  template <std::size_t kWidth>
  static void pack_rest(const GemmPacking& from, std::size_t begin, float* to) {
    const std::size_t by_index = from.across ? 1 : from.stride;
    const std::size_t by_depth = from.across ? from.stride : 1;
    const float* first = from.from + begin * by_index;
    for (std::size_t d = 0; d < from.depth; ++d) {
      for (std::size_t i = 0; i < kWidth; ++i) {
        const bool inside = begin + i < from.size;
        to[d * kWidth + i] = inside ? first[i * by_index + d * by_depth] : 0.0F;
      }
    }
  }

  // --- multiplying -----------------------------------------------------------------------------

  static void multiply(const GemmBlock& block) {
    for (std::size_t j = 0; j < block.columns; j += kColumns) {
      const std::size_t columns = smaller(kColumns, block.columns - j);
      for (std::size_t i = 0; i < block.rows; i += kRows) {
        const std::size_t rows = smaller(kRows, block.rows - i);
        if (rows == kRows && columns == kColumns) {
          tile<Vector::kTileVectors>(block, i, j, block.c + i * block.c_stride + j, block.c_stride,
                                     block.add, block.bias != nullptr ? block.bias + j : nullptr);
        } else {
          edge_tile<Vector::kTileVectors>(block, i, j, rows, columns);
        }
      }
      if (columns == kColumns) {
        apply_gelu(block, j, kColumns);
      } else {
        apply_gelu(block, j, columns);
      }
    }
  }

  // Depths in a turn of the loop. What a turn costs beside them is felt where another program has
  // the other half of the core.
  static constexpr std::size_t kUnrolled = 8;

  // One tile of C, of the first kVectors vectors of B's panel.
  template <std::size_t kVectors>
  static inline void tile(const GemmBlock& block, std::size_t i, std::size_t j, float* c,
                          std::size_t stride, bool add, const float* bias) {
    const float* __restrict a = block.a + i * block.depth;
    const float* __restrict b = block.b + j * block.depth;
    // The tiles of this panel share in fetching the next: each the like of one row of the tiles.
    const float* next_b = b + kColumns * block.depth + i / kRows * block.depth;
    for (std::size_t r = 0; add && r < kRows; ++r) {
      prefetch(c + r * stride);
      prefetch(c + r * stride + kVectors * Vector::kWidth - 1);
    }
    typename Vector::Register sum[kRows][kVectors];
    repeat<kRows * kVectors>(
        [&](auto t) FASTGPT_INLINE { sum[t / kVectors][t % kVectors] = Vector::zero(); });
    const auto add_depth = [&](std::size_t d) FASTGPT_INLINE {
      typename Vector::Register from_b[kVectors];
      repeat<kVectors>([&](auto v) FASTGPT_INLINE {
        from_b[v] = Vector::load(b + d * kColumns + v * Vector::kWidth);
      });
      repeat<kRows>([&](auto r) FASTGPT_INLINE {
        const typename Vector::Register from_a = Vector::broadcast(a[d * kRows + r]);
        repeat<kVectors>([&](auto v) FASTGPT_INLINE {
          sum[r][v] = Vector::multiply_add(from_a, from_b[v], sum[r][v]);
        });
      });
    };
    std::size_t depths = block.depth;
    for (; depths >= kUnrolled; depths -= kUnrolled) {
      prefetch_far(next_b);
      repeat<kUnrolled>([&](auto d) FASTGPT_INLINE { add_depth(d); });
      a += kUnrolled * kRows;
      b += kUnrolled * kColumns;
      next_b += kUnrolled;
    }
    for (; depths > 0; --depths) {
      add_depth(0);
      a += kRows;
      b += kColumns;
    }
    repeat<kRows * kVectors>([&](auto t) FASTGPT_INLINE {
      constexpr std::size_t r = t / kVectors, v = t % kVectors;
      float* to = c + r * stride + v * Vector::kWidth;
      typename Vector::Register value = sum[r][v];
      if (add) value = Vector::add(value, Vector::load(to));
      if (bias != nullptr) value = Vector::add(value, Vector::load(bias + v * Vector::kWidth));
      Vector::store(to, value);
    });
  }

  // A tile that reaches past C's end is computed aside.
  template <std::size_t kVectors>
  static void edge_tile(const GemmBlock& block, std::size_t i, std::size_t j, std::size_t rows,
                        std::size_t columns) {
    if constexpr (kVectors > 1) {
      if (columns <= (kVectors - 1) * Vector::kWidth) {
        edge_tile<kVectors - 1>(block, i, j, rows, columns);
        return;
      }
    }
    float aside[kRows * kColumns];
    tile<kVectors>(block, i, j, aside, kColumns, false, nullptr);
    for (std::size_t r = 0; r < rows; ++r) {
      float* to = block.c + (i + r) * block.c_stride + j;
      for (std::size_t column = 0; column < columns; ++column) {
        float value = aside[r * kColumns + column];
        if (block.add) value += to[column];
        if (block.bias != nullptr) value += block.bias[j + column];
        to[column] = value;
      }
    }
  }

  // --- GELU ------------------------------------------------------------------------------------

  static inline void apply_gelu(const GemmBlock& block, std::size_t j, std::size_t columns) {
    if (block.gelu != nullptr) {
      for (std::size_t i = 0; i < block.rows; ++i) {
        const float* from = block.c + i * block.c_stride + j;
        float* to = block.gelu + i * block.gelu_stride + j;
        for (std::size_t column = 0; column < columns; ++column) to[column] = gelu_of(from[column]);
      }
    }
    if (block.gelu_grad != nullptr) {
      for (std::size_t i = 0; i < block.rows; ++i) {
        const float* at = block.gelu_grad + i * block.gelu_grad_stride + j;
        float* grad = block.c + i * block.c_stride + j;
        for (std::size_t column = 0; column < columns; ++column) {
          grad[column] = gelu_gradient_of(grad[column], at[column]);
        }
      }
    }
  }

  static void gelu(float* x, std::size_t n) {
    for (std::size_t i = 0; i < n; ++i) x[i] = gelu_of(x[i]);
  }

  // --- sums ------------------------------------------------------------------------------------

  // Every kStep-th depth is summed apart, which fills vector registers.
  static void add_row_sums(const float* a, std::size_t rows, std::size_t depth, float* sums) {
    constexpr std::size_t kStep = 4;
    for (std::size_t i = 0; i < rows; i += kRows) {
      float parts[kStep * kRows] = {};
      const float* panel = a + i * depth;
      std::size_t d = 0;
      for (; d + kStep <= depth; d += kStep) {
        for (std::size_t p = 0; p < kStep * kRows; ++p) parts[p] += panel[d * kRows + p];
      }
      for (std::size_t p = 0; p < (depth - d) * kRows; ++p) parts[p] += panel[d * kRows + p];
      for (std::size_t r = 0; r < smaller(kRows, rows - i); ++r) {
        sums[i + r] +=
            (parts[r] + parts[r + kRows]) + (parts[r + 2 * kRows] + parts[r + 3 * kRows]);
      }
    }
  }
};

}  // namespace
}  // namespace fastgpt
