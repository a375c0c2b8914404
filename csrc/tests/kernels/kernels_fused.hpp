// Kernels that compute one number after the other, with products and sums in one where kernels ask
// for them: what each processor that has such an instruction must compute to the bit.
#pragma once

#include "engine/kernels.hpp"

namespace fastgpt::engine {

const Kernels& kernels_fused();

}  // namespace fastgpt::engine
