// Selection of an engine's kernels at run time.
#pragma once

#include <string>
#include <vector>

#include "engine/kernels.hpp"

namespace fastgpt::engine {

// Returns the fastest kernels that this processor can run, up to `instruction_set`:
// "best", or one of `instruction_sets()`. `multiply` is set for all formats. Throws
// std::invalid_argument if the processor does not support it.
Kernels kernel_set(const std::string& instruction_set);

// Returns the instruction sets that this processor supports: "portable" and, where supported,
// "avx2", "avx512" (without the following two), "avx512-bf16" and "avx512-vnni", or "neon" and
// "neon-dot".
std::vector<std::string> instruction_sets();

}  // namespace fastgpt::engine
