// Reference kernels that compute element by element, with a fused multiply-add wherever the kernels
// use multiply_add. Every instruction set with a fused multiply-add must match them bit for bit.
#pragma once

#include "engine/kernels.hpp"

namespace fastgpt::engine {

const Kernels& kernels_fused();

}  // namespace fastgpt::engine
