#include "common/processor.hpp"

#if defined(FASTGPT_X86)
#include <cpuid.h>

#include <array>
#include <cstring>
#elif defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace fastgpt {
namespace {

#if defined(FASTGPT_X86)
// Returns whether CPUID names one of these vendors.
bool is_amd() {
  unsigned level = 0;
  std::array<unsigned, 3> name{};
  if (__get_cpuid(0, &level, &name[0], &name[2], &name[1]) == 0) return false;
  return std::memcmp(name.data(), "AuthenticAMD", 12) == 0 ||
         std::memcmp(name.data(), "HygonGenuine", 12) == 0;
}

// CPUID leaf 7, bit 22 of EDX, which GCC 10 cannot ask for by name.
bool has_amx_bf16() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d >> 22U & 1U) != 0;
}
#endif

Processor detect() {
  Processor found;
#if defined(FASTGPT_X86)
  found.sse42 = __builtin_cpu_supports("sse4.2");
  found.avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
               __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
               __builtin_cpu_supports("popcnt");
  found.avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512vl");
  found.avx512_bf16 = found.avx512 && __builtin_cpu_supports("avx512bf16");
  found.avx512_vnni = found.avx512 && __builtin_cpu_supports("avx512vnni");
  found.amx_bf16 = has_amx_bf16();
  found.amd = is_amd();
#elif defined(__aarch64__) && defined(__linux__)
  found.neon_dot = (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
  found.neon_dot = true;  // all Macs with ARM processors have it
#endif
  return found;
}

}  // namespace

const Processor& processor() {
  static const Processor found = detect();
  return found;
}

}  // namespace fastgpt
