// The part of a matrix product that is compiled for each instruction set.
#pragma once

#include <cstddef>

#include "common/bfloat16.hpp"

namespace fastgpt {

// Rows of numbers, `stride` numbers apart.
template <typename AnyFloats>
struct GemmRows {
  AnyFloats first;
  std::size_t stride = 0;
};

// A block of C that one thread computes from packed operands, or adds more terms to.
//
// Operands are packed in words of 32 bits: a float, or two neighbouring depths in bfloat16. `depth`
// counts words.
struct GemmBlock {
  const float* a;  // panels of kRows rows
  const float* b;  // panels of kColumns columns
  std::size_t rows, columns, depth;
  float* sum;  // [rows, kColumns] of each panel of columns
  std::size_t sum_stride;
  std::size_t panel_step;  // how far apart the panels' sums are
  bool add;                // to what `sum` holds

  // What follows once all terms are there; null for what does not.
  const float* bias;
  GemmRows<ConstFloats> gelu_grad;  // the sum is multiplied by gelu' of this
  GemmRows<Floats> c;               // gets the sum, if that is not where it is to be
  GemmRows<Floats> gelu;            // gets gelu of the sum
};

// Packing puts what a panel holds at one depth side by side: panel p, word w, index i of its
// `width` lands at [(p * words + w) * width + i], with zeros where the matrix has ended. It may
// write kGemmSlack words too many.
struct GemmPacking {
  ConstFloats from;  // where the first panel begins
  std::size_t stride;
  bool across;  // a row of the matrix holds one depth of all panels; else, all depths of one index
  std::size_t size, depth;  // how many indices (rows of A or columns of B) and how many depths
  bool gelu = false;        // packs gelu of the numbers
};
constexpr std::size_t kGemmSlack = 16;

struct GemmKernels {
  std::size_t rows, columns;    // of a tile: the widths of the panels of A and of B
  std::size_t depths_per_word;  // 1: multiplies floats, and packs nothing else; 2: bfloat16
  void (*pack_a)(const GemmPacking& from, float* to);
  void (*pack_b)(const GemmPacking& from, float* to);
  void (*multiply)(const GemmBlock& block);
  // sums[i] += the sum of row i over the packed panels' `depth` words
  void (*add_row_sums)(const float* a, std::size_t rows, std::size_t depth, float* sums);

  std::size_t words(std::size_t depths) const {
    return (depths + depths_per_word - 1) / depths_per_word;
  }
};

// Null where the compiler cannot make such code.
const GemmKernels* gemm_kernels_portable();
const GemmKernels* gemm_kernels_avx2();
const GemmKernels* gemm_kernels_avx512();
const GemmKernels* gemm_kernels_bf16_portable();
const GemmKernels* gemm_kernels_bf16_avx512();

}  // namespace fastgpt
