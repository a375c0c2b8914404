#include "engine/kernel_set.hpp"

#include <algorithm>
#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace fastgpt::engine {
namespace {

bool has_avx2() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#else
  return false;
#endif
}

bool has_avx512() {
#if defined(__x86_64__) && defined(__GNUC__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}

bool has_bf16() {
#if defined(__x86_64__) && defined(__GNUC__)
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

bool has_vnni() {
#if defined(__x86_64__) && defined(__GNUC__)
  return has_avx512() && __builtin_cpu_supports("avx512vnni");
#else
  return false;
#endif
}

// The dot product of bytes, an optional extension of ARMv8.2.
bool has_neon_dot() {
#if defined(__aarch64__) && defined(__linux__)
  return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__aarch64__) && defined(__APPLE__)
  return true;  // all Macs with ARM processors have it
#else
  return false;
#endif
}

// A code and the kernels that it adds to those of the codes before it.
struct Code {
  const char* name;
  bool (*runs)();
  const Kernels* (*kernels)();
};

// From the slowest to the fastest.
const Code kCodes[] = {
    {"portable", [] { return true; }, kernels_portable},
    {"avx2", has_avx2, kernels_avx2},
    {"avx512", has_avx512, kernels_avx512},
    {"avx512-bf16", has_bf16, kernels_avx512_bf16},
    {"avx512-vnni", has_vnni, kernels_avx512_vnni},
    {"neon", [] { return true; }, kernels_neon},
    {"neon-dot", has_neon_dot, kernels_neon_dot},
};

// Replaces kernels by those that the next code has. A code with `attend` has everything except,
// possibly, some products; the others have only products.
void replace(Kernels& all, const Kernels& next) {
  Kernels merged = next.attend != nullptr ? next : all;
  for (std::size_t i = 0; i < kFormats; ++i) {
    merged.multiply[i] = next.multiply[i] != nullptr ? next.multiply[i] : all.multiply[i];
  }
  all = merged;
}

}  // namespace

Kernels kernel_set(const std::string& code) {
  const std::vector<std::string> codes = kernel_codes();
  if (code != "best" && std::find(codes.begin(), codes.end(), code) == codes.end()) {
    std::string known;
    for (const std::string& name : codes) known += ", " + name;
    throw std::invalid_argument("code \"" + code +
                                "\" is not available on this processor; available: best" + known);
  }
  Kernels all{};
  for (const Code& next : kCodes) {
    if (next.runs() && next.kernels() != nullptr) replace(all, *next.kernels());
    if (code == next.name) break;
  }
  return all;
}

std::vector<std::string> kernel_codes() {
  std::vector<std::string> names;
  for (const Code& code : kCodes) {
    if (code.runs() && code.kernels() != nullptr) names.emplace_back(code.name);
  }
  return names;
}

}  // namespace fastgpt::engine
