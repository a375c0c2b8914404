// The kernels that an engine computes with.
#pragma once

#include <string>
#include <vector>

#include "engine/kernels.hpp"

namespace fastgpt::engine {

// The best of what this processor can run and `code` allows: "best", or one of `kernel_codes()`.
// `multiply` is complete. Throws std::invalid_argument if it cannot run that code.
Kernels kernel_set(const std::string& code);

// What this processor can run: "portable" and, as the case may be, "avx2", "avx512" (neither of the
// following), "avx512-bf16" and "avx512-vnni", or "neon" and "neon-dot".
std::vector<std::string> kernel_codes();

}  // namespace fastgpt::engine
