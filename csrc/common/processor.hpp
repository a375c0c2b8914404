// Which instructions a function may be compiled for beyond those that every processor has.
#pragma once

#if defined(__x86_64__) && defined(__GNUC__)
#define FASTGPT_HAS_AVX2 1
#define FASTGPT_AVX2 __attribute__((target("avx2,bmi,bmi2,popcnt")))
// For a function that calls others: inlines them all, so that they are compiled for AVX2, too.
#define FASTGPT_AVX2_FLAT __attribute__((flatten)) FASTGPT_AVX2
#endif

namespace fastgpt {

// Whether what is compiled for AVX2 may be called.
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
