// What the parts of the Python module share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <vector>

#include "tokenizer/vocabulary.hpp"

namespace fastgpt {

using IdArray = pybind11::array_t<TokenId, pybind11::array::c_style>;

// Returns the merges as an array of (left, right, merged) rows.
IdArray to_rows(const std::vector<Merge>& merges);

// Adds what bpe_trainer.hpp offers to the module.
void bind_bpe_trainer(pybind11::module_& m);

// Adds what engine/ offers to the module.
void bind_engine(pybind11::module_& m);

// Adds what gemm.hpp offers to the module.
void bind_gemm(pybind11::module_& m);

// Adds what norm.hpp, cross_entropy.hpp and adamw.hpp offer to the module.
void bind_training(pybind11::module_& m);

}  // namespace fastgpt
