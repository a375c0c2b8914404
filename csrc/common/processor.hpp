// The instruction sets that this processor supports, and function attributes for code that uses
// AVX2. They are used to choose kernels in engine/kernel_set.cpp and training/gemm.cpp, loops in
// simd/vector_loops.hpp, and versions of the tokenizer's pretokenizer.cpp and merger.cpp.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTGPT_X86 1
// For a function that is called only where `processor().avx2` is true.
#define FASTGPT_AVX2 __attribute__((target("avx2,fma,bmi,bmi2,popcnt")))
// For a function that calls others: inlines all of them, so that they are compiled for AVX2 as
// well.
#define FASTGPT_AVX2_FLAT __attribute__((flatten)) FASTGPT_AVX2
#endif

namespace fastgpt {

// Those of x86 are detected only in code compiled by GCC or Clang.
struct Processor {
  bool sse42 = false;
  bool avx2 = false;    // and FMA, BMI, BMI2 and POPCNT, which all processors with AVX2 have
  bool avx512 = false;  // F, BW and VL
  bool avx512_bf16 = false, avx512_vnni = false;  // and avx512
  bool amx_bf16 = false;
  bool neon_dot = false;  // the dot product of bytes, an optional extension of ARMv8.2
  bool amd = false;       // made by AMD, or by Hygon, whose processors are based on AMD's
};

// Returns the properties of this processor, which are detected by the first call.
const Processor& processor();

}  // namespace fastgpt
