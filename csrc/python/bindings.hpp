// Declarations shared by the source files of the Python module.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "tokenizer/vocabulary.hpp"

namespace fastgpt {

using IdArray = pybind11::array_t<TokenId, pybind11::array::c_style>;

// Returns the merges as an array of (left, right, merged) rows.
IdArray to_rows(const std::vector<Merge>& merges);

// Adds the bindings of tokenizer/bpe_trainer.hpp to the module.
void bind_bpe_trainer(pybind11::module_& m);

// Adds the bindings of engine/ to the module.
void bind_engine(pybind11::module_& m);

// Adds the bindings of training/gemm.hpp to the module.
void bind_gemm(pybind11::module_& m);

// Adds the bindings of training/norm.hpp, attention.hpp, cross_entropy.hpp, embedding.hpp and
// adamw.hpp, and of common/host_pool.hpp, to the module.
void bind_training(pybind11::module_& m);

}  // namespace fastgpt
