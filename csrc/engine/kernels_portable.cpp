#include "simd/plain_vector.hpp"

namespace fastgpt::engine {
namespace {

constexpr Kernels kKernels = kernels_of<Plain>();

}  // namespace

const Kernels* kernels_portable() { return &kKernels; }

}  // namespace fastgpt::engine
