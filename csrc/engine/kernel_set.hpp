// Selection of an engine's kernels at run time.
#pragma once

#include <string>
#include <vector>

#include "engine/kernels.hpp"

namespace fastgpt::engine {

// Returns the fastest kernels that this processor can run, up to the instruction set `code`:
// "best", or one of `kernel_codes()`. `multiply` is set for all formats. Throws
// std::invalid_argument if the processor cannot run that code.
Kernels kernel_set(const std::string& code);

// Returns the codes that this processor can run: "portable" and, where supported, "avx2", "avx512"
// (without the following two), "avx512-bf16" and "avx512-vnni", or "neon" and "neon-dot".
std::vector<std::string> kernel_codes();

}  // namespace fastgpt::engine
