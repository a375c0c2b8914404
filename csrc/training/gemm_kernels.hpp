// The interface of the GEMM kernels: packing, and the product of packed operands. They are compiled
// once for each instruction set.
#pragma once

#include <cstddef>

#include "common/arithmetic.hpp"
#include "common/bfloat16.hpp"
#include "common/matrix_view.hpp"

namespace fastgpt {

// A block of C that a kernel computes from packed operands, or adds terms to.
//
// Operands are packed in words of 32 bits: a float, or the bfloat16 numbers of two consecutive
// depths. `depth` counts words.
struct GemmBlock {
  const float* a;  // panels of kRows rows
  const float* b;  // panels of kColumns columns
  std::size_t rows, columns, depth;
  float* sum;  // the sums of the first panel of columns, [rows, kColumns]
  std::size_t sum_stride;
  std::size_t panel_step;  // distance between the sums of consecutive panels, in floats
  bool add;                // to the contents of `sum`

  // The epilogue, applied when the sums are complete; null for what is not wanted.
  const float* bias;
  MatrixView<ConstFloats> gelu_grad;  // the sum is multiplied by gelu' of these numbers
  MatrixView<Floats> c;               // receives the sum, if `sum` is a separate buffer
  MatrixView<Floats> gelu;            // receives gelu of the sum
};

// The source of a packed operand.
//
// Packing splits the rows of A (or the columns of B) into panels of `width` indices and places the
// words of one depth side by side: word w of index i in panel p is stored at
// [(p * words + w) * width + i]. A kernel thus reads a panel sequentially. The last panel, and the
// last word of an odd depth in bfloat16, are padded with zeros. Packing may write up to kGemmSlack
// words past the end.
struct GemmPacking {
  ConstFloats from;  // the first number of the first panel
  std::size_t stride;
  bool across;  // a matrix row holds one depth of all indices; if not, all depths of one index
  std::size_t size, depth;  // the numbers of indices (rows of A or columns of B) and of depths
  bool gelu = false;        // apply gelu to the numbers
};
constexpr std::size_t kGemmSlack = 16;

struct GemmKernels {
  std::size_t rows, columns;    // of a register tile: the widths of the panels of A and of B
  std::size_t depths_per_word;  // 1: fp32, packs only floats; 2: bfloat16, packs either type
  void (*pack_a)(const GemmPacking& from, float* to);
  void (*pack_b)(const GemmPacking& from, float* to);
  void (*multiply)(const GemmBlock& block);
  // sums[i] += the sum of row i over the `depth` words of the packed panels
  void (*add_row_sums)(const float* a, std::size_t rows, std::size_t depth, float* sums);

  bool bf16() const { return depths_per_word == 2; }
  std::size_t words(std::size_t depths) const { return ceil_div(depths, depths_per_word); }
};

// Those of the instruction sets that this build has: see csrc/instructions.cmake.
extern const GemmKernels kGemmPortable, kGemmAvx2, kGemmAvx512, kGemmBf16Portable, kGemmAvx512Bf16;

}  // namespace fastgpt
