#include "engine/kernel_set.hpp"

#include <stdexcept>

#include "common/processor.hpp"

namespace fastgpt::engine {
namespace {

// An instruction set and the kernels that it adds to those of the sets before it.
struct InstructionSet {
  std::string name;
  const Kernels& kernels;
};

// Returns the instruction sets that this processor supports, from the slowest to the fastest.
std::vector<InstructionSet> available_sets() {
  std::vector<InstructionSet> sets{{"portable", kKernelsPortable}};
  [[maybe_unused]] const auto add = [&](bool runs, const char* name, const Kernels& kernels) {
    if (runs) sets.push_back({name, kernels});
  };
#if defined(FASTGPT_HAS_AVX2)
  add(processor().avx2, "avx2", kKernelsAvx2);
#endif
#if defined(FASTGPT_HAS_AVX512)
  add(processor().avx512, "avx512", kKernelsAvx512);
#endif
#if defined(FASTGPT_HAS_AVX512_BF16)
  add(processor().avx512_bf16, "avx512-bf16", kKernelsAvx512Bf16);
#endif
#if defined(FASTGPT_HAS_AVX512_VNNI)
  add(processor().avx512_vnni, "avx512-vnni", kKernelsAvx512Vnni);
#endif
#if defined(FASTGPT_HAS_NEON)
  add(true, "neon", kKernelsNeon);
#endif
#if defined(FASTGPT_HAS_NEON_DOT)
  add(processor().neon_dot, "neon-dot", kKernelsNeonDot);
#endif
  return sets;
}

// Replaces kernels by those of the next instruction set. A set with `attend` has everything
// except, possibly, some products; the others have only products.
void replace(Kernels& all, const Kernels& next) {
  Kernels merged = next.attend != nullptr ? next : all;
  for (std::size_t i = 0; i < kFormats; ++i) {
    merged.multiply[i] = next.multiply[i] != nullptr ? next.multiply[i] : all.multiply[i];
  }
  all = merged;
}

}  // namespace

Kernels kernel_set(const std::string& instruction_set) {
  Kernels all{};
  std::string known;
  for (const InstructionSet& next : available_sets()) {
    replace(all, next.kernels);
    if (instruction_set == next.name) return all;
    known += ", " + next.name;
  }
  if (instruction_set == "best") return all;
  throw std::invalid_argument("instruction set \"" + instruction_set +
                              "\" is not available on this processor; available: best" + known);
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : available_sets()) names.push_back(set.name);
  return names;
}

}  // namespace fastgpt::engine
