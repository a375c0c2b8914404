// The part of a matrix product that is compiled for each instruction set.
#pragma once

#include <cstddef>

namespace fastgpt {

// A block of C that one thread computes from packed operands, or adds `depth` more terms to.
struct GemmBlock {
  const float* a;  // panels of kRows rows
  const float* b;  // panels of kColumns columns
  std::size_t rows, columns, depth;
  float* c;
  std::size_t c_stride;
  bool add;  // to what C holds

  // What follows once all terms are in C; null pointers for what does not.
  const float* bias;
  float* gelu;  // gets gelu(C), or is C
  std::size_t gelu_stride;
  const float* gelu_grad;  // C is multiplied by gelu' of this
  std::size_t gelu_grad_stride;
};

// Packing puts what a panel holds at one depth side by side: panel p, depth d, index i of its
// `width` lands at [(p * depth + d) * width + i], with zeros where the matrix has ended. It may
// write kGemmSlack floats too many.
struct GemmPacking {
  const float* from;  // where the first panel begins
  std::size_t stride;
  bool across;  // a row of the matrix holds one depth of all panels; else, all depths of one index
  std::size_t size, depth;  // how many indices (rows of A or columns of B) and how many depths
};
constexpr std::size_t kGemmSlack = 16;

struct GemmKernels {
  std::size_t rows, columns;  // of a tile: the widths of the panels of A and of B
  void (*pack_a)(const GemmPacking& from, float* to);
  void (*pack_b)(const GemmPacking& from, float* to);
  void (*multiply)(const GemmBlock& block);
  void (*gelu)(float* x, std::size_t n);
  // sums[i] += the sum of row i over the packed panels' depth
  void (*add_row_sums)(const float* a, std::size_t rows, std::size_t depth, float* sums);
};

// Null where the compiler cannot make such code.
const GemmKernels* gemm_kernels_portable();
const GemmKernels* gemm_kernels_avx2();
const GemmKernels* gemm_kernels_avx512();

}  // namespace fastgpt
