// The kernels of gemm_kernels.hpp as templates over a vector type.
//
// Each file that includes this is compiled for a different instruction set. Everything has internal
// linkage, since the linker would otherwise keep one copy for all of them, which some processors
// could not run. For the same reason no function of the standard library is called.
#pragma once

#include <cstddef>

#include "common/arithmetic.hpp"
#include "common/prefetch.hpp"
#include "simd/math.hpp"
#include "training/gemm_kernels.hpp"
#include "training/gemm_packing.hpp"

namespace fastgpt {
namespace {

// Vector: a vector type, see simd/plain_vector.hpp. kRows × kTileVectors registers hold a tile of
// C. Packing: how words are packed, one float or two bfloat16 numbers each.
template <typename Vector, std::size_t kRows, std::size_t kTileVectors,
          typename Packing = FloatPacking<Vector>>
class Kernels {
 public:
  static constexpr std::size_t kColumns = kTileVectors * Vector::kWidth;
  // Otherwise packing a panel would overwrite the start of the next, which may be another thread's.
  static_assert(kColumns % 8 == 0, "packing writes whole eights, and threads pack side by side");

  static constexpr GemmKernels table() {
    return {kRows,
            kColumns,
            Packing::kDepthsPerWord,
            Packing::template pack<kRows>,
            Packing::template pack<kColumns>,
            multiply,
            add_row_sums};
  }

 private:
  using Register = typename Vector::Register;

  // --- multiplying -----------------------------------------------------------------------------

  // Panels of B are in the outer loop: one stays in the L1 cache while the panels of A, from the L2
  // cache, are multiplied with it one after the other.
  static void multiply(const GemmBlock& block) {
    for (std::size_t j = 0; j < block.columns; j += kColumns) {
      const std::size_t columns = min_of(kColumns, block.columns - j);
      float* sum = block.sum + j / kColumns * block.panel_step;
      const float* bias = block.bias != nullptr ? block.bias + j : nullptr;
      for (std::size_t i = 0; i < block.rows; i += kRows) {
        const std::size_t rows = min_of(kRows, block.rows - i);
        float* to = sum + i * block.sum_stride;
        if (rows == kRows && columns == kColumns) {
          tile<kTileVectors>(block, i, j, to, block.sum_stride, block.add, bias);
        } else {
          edge_tile<kTileVectors>(block, i, j, to, bias, rows, columns);
        }
      }
      if (columns == kColumns) {  // a constant, to specialize the inlined loops
        finish(block, sum, j, kColumns);
      } else {
        finish(block, sum, j, columns);
      }
    }
  }

  // Depths per loop iteration. The loop overhead matters where another program runs on the core's
  // other hardware thread.
  static constexpr std::size_t kUnrolled = 8;

  // Computes one tile of C: kRows rows by the first kVectors vectors of a panel of B. Each depth is
  // a rank-1 update of the accumulators: kVectors registers of B's row, times each of A's kRows
  // numbers. Depths are added in order; the previous sums and the bias follow at the end.
  template <std::size_t kVectors>
  static inline void tile(const GemmBlock& block, std::size_t i, std::size_t j, float* c,
                          std::size_t stride, bool add, const float* bias) {
    const float* __restrict a = block.a + i * block.depth;
    const float* __restrict b = block.b + j * block.depth;
    // The row tiles of this panel share the work of prefetching the next panel of B: the tile with
    // row index t fetches words [t · depth, (t + 1) · depth) of it, one kColumns-th of the panel.
    const float* next_b = b + kColumns * block.depth + i / kRows * block.depth;
    // Fetch the rows of C that are read at the end: the cache lines of their first and last float.
    for (std::size_t r = 0; add && r < kRows; ++r) {
      prefetch(c + r * stride);
      prefetch(c + r * stride + kVectors * Vector::kWidth - 1);
    }
    Register sum[kRows][kVectors];
    repeat<kRows * kVectors>(
        [&](auto t) FASTGPT_INLINE { sum[t / kVectors][t % kVectors] = Vector::zero(); });
    const auto add_depth = [&](std::size_t d) FASTGPT_INLINE {
      Register from_b[kVectors];
      repeat<kVectors>([&](auto v) FASTGPT_INLINE {
        from_b[v] = Vector::load(b + d * kColumns + v * Vector::kWidth);
      });
      repeat<kRows>([&](auto r) FASTGPT_INLINE {
        const Register from_a = Vector::broadcast(a[d * kRows + r]);
        repeat<kVectors>(
            [&](auto v) FASTGPT_INLINE { sum[r][v] = add_product(from_a, from_b[v], sum[r][v]); });
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
      Register value = sum[r][v];
      if (add) value = Vector::add(value, Vector::load(to));
      if (bias != nullptr) value = Vector::add(value, Vector::load(bias + v * Vector::kWidth));
      Vector::store(to, value);
    });
  }

  // Multiplies lanes of packed words, and adds to `sum`.
  static inline Register add_product(Register a, Register b, Register sum) {
    if constexpr (Packing::kDepthsPerWord == 2) return Vector::multiply_pairs(a, b, sum);
    return Vector::multiply_add(a, b, sum);
  }

  // Computes a tile that extends past the end of C, with as few vectors as cover its columns. It
  // goes to a temporary buffer, from which the valid part is copied.
  template <std::size_t kVectors>
  static void edge_tile(const GemmBlock& block, std::size_t i, std::size_t j, float* sum,
                        const float* bias, std::size_t rows, std::size_t columns) {
    if constexpr (kVectors > 1) {
      if (columns <= (kVectors - 1) * Vector::kWidth) {
        edge_tile<kVectors - 1>(block, i, j, sum, bias, rows, columns);
        return;
      }
    }
    float aside[kRows * kColumns];
    tile<kVectors>(block, i, j, aside, kColumns, false, nullptr);
    for (std::size_t r = 0; r < rows; ++r) {
      float* to = sum + r * block.sum_stride;
      for (std::size_t column = 0; column < columns; ++column) {
        float value = aside[r * kColumns + column];
        if (block.add) value += to[column];
        if (bias != nullptr) value += bias[column];
        to[column] = value;
      }
    }
  }

  // --- epilogue --------------------------------------------------------------------------------

  // Applies the epilogue to one panel of columns, while its sums are in the L1 cache.
  static inline void finish(const GemmBlock& block, float* sum, std::size_t j,
                            std::size_t columns) {
    if (!given(block.gelu_grad) && !given(block.c) && !given(block.gelu)) return;
    for (std::size_t i = 0; i < block.rows; ++i) {
      float* row = sum + i * block.sum_stride;
      const auto at = [=](const auto& rows) { return rows.first + (i * rows.stride + j); };
      if (given(block.gelu_grad)) multiply_by_gelu_gradient(at(block.gelu_grad), columns, row);
      if (given(block.c)) write(row, columns, at(block.c), [](float x) { return x; });
      if (given(block.gelu)) write(row, columns, at(block.gelu), gelu_of);
    }
  }

  template <typename Rows>
  static bool given(const Rows& rows) {
    return rows.first.data != nullptr;
  }

  static inline void multiply_by_gelu_gradient(const ConstFloats& of, std::size_t n, float* grad) {
    of_type(of, [=](const auto* at) {
      for (std::size_t i = 0; i < n; ++i) grad[i] = gelu_gradient_of(grad[i], to_float32(at[i]));
    });
  }

  // Two loops instead of a generic one with `of_type` and `put`: with -mavx512f alone, GCC uses no
  // fused multiply-add in 256-bit vectors, and for the generic loop it would vectorize the last
  // columns of a matrix in another way, so that gelu_of would round differently there.
  template <typename Function>
  static inline void write(const float* from, std::size_t n, const Floats& to,
                           const Function& function) {
    if (to.bf16) {
      auto* numbers = static_cast<Bfloat16*>(to.data);
      for (std::size_t i = 0; i < n; ++i) numbers[i] = to_bfloat16(function(from[i]));
    } else {
      auto* numbers = static_cast<float*>(to.data);
      for (std::size_t i = 0; i < n; ++i) numbers[i] = function(from[i]);
    }
  }

  // --- row sums --------------------------------------------------------------------------------

  // Processes kStep words at a time, with kStep partial sums per row: the kRows numbers of one word
  // need not fill vector registers.
  static void add_row_sums(const float* a, std::size_t rows, std::size_t depth, float* sums) {
    constexpr std::size_t kStep = 4;
    for (std::size_t i = 0; i < rows; i += kRows) {
      float parts[kStep * kRows] = {};
      const float* panel = a + i * depth;
      std::size_t d = 0;
      for (; d + kStep <= depth; d += kStep) {
        for (std::size_t p = 0; p < kStep * kRows; ++p)
          parts[p] += Packing::sum(panel[d * kRows + p]);
      }
      for (std::size_t p = 0; p < (depth - d) * kRows; ++p) {
        parts[p] += Packing::sum(panel[d * kRows + p]);
      }
      for (std::size_t r = 0; r < min_of(kRows, rows - i); ++r) {
        sums[i + r] +=
            (parts[r] + parts[r + kRows]) + (parts[r + 2 * kRows] + parts[r + 3 * kRows]);
      }
    }
  }
};

}  // namespace
}  // namespace fastgpt
