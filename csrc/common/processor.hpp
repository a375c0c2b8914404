// Function attributes for code that uses AVX2, and a run-time check of the processor's support.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTGPT_HAS_AVX2 1
#define FASTGPT_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
// For a function that calls others: inlines all of them, so that they are compiled for AVX2 as
// well.
#define FASTGPT_AVX2_FLAT __attribute__((flatten)) FASTGPT_AVX2
#endif

namespace fastgpt {

// Returns whether the processor supports the instructions of FASTGPT_AVX2.
inline bool has_avx2() {
#if defined(FASTGPT_HAS_AVX2)
  static const bool has = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi") &&
                          __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  return has;
#else
  return false;
#endif
}

}  // namespace fastgpt
