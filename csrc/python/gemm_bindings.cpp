// Python bindings of training/gemm.hpp.
#include <pybind11/pybind11.h>

#include <cstddef>
#include <stdexcept>
#include <string>

#include "python/bindings.hpp"
#include "python/tensor_argument.hpp"
#include "training/gemm.hpp"

namespace py = pybind11;

namespace fastgpt {
namespace {

[[noreturn]] void refuse(const char* name, const std::string& what) {
  throw std::invalid_argument(std::string(name) + " " + what);
}

// A view of a tensor with one or two dimensions as a matrix; a one-dimensional tensor is a single
// row.
struct Tensor {
  Tensor(py::handle tensor, const char* name, int dimensions, bool bf16_too) {
    const DlTensor seen = look_at_floats(tensor, name, bf16_too);
    if (seen.dimensions != dimensions) {
      refuse(name, "must have " + std::to_string(dimensions) + " dimension(s), not " +
                       std::to_string(seen.dimensions));
    }
    columns = static_cast<std::size_t>(seen.shape[dimensions - 1]);
    if (dimensions == 2) rows = static_cast<std::size_t>(seen.shape[0]);
    stride = columns;
    if (seen.strides != nullptr && rows * columns > 0) {
      if (columns > 1 && seen.strides[dimensions - 1] != 1) {
        refuse(name, "must have contiguous rows (stride 1 in the last dimension)");
      }
      if (rows > 1) stride = static_cast<std::size_t>(seen.strides[0]);
    }
    if (stride < columns) refuse(name, "has overlapping rows");
    numbers = numbers_in(seen);
  }

  std::size_t rows = 1, columns = 0, stride = 0;
  Floats numbers;
};

template <typename View>
void set_matrix(View& view, py::handle tensor, const char* name, std::size_t rows,
                std::size_t columns, bool bf16_too) {
  const Tensor t(tensor, name, 2, bf16_too);
  if (t.rows != rows || t.columns != columns) {
    refuse(name, "has shape [" + std::to_string(t.rows) + ", " + std::to_string(t.columns) +
                     "], not [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
  }
  view = {t.numbers, t.stride};
}

float* vector(py::handle tensor, const char* name, std::size_t size) {
  const Tensor t(tensor, name, 1, false);
  if (t.columns != size) {
    refuse(name, "has " + std::to_string(t.columns) + " elements, not " + std::to_string(size));
  }
  return static_cast<float*>(t.numbers.data);
}

void check_combination(const Gemm& g) {
  if (g.pre.first.data != nullptr && !g.gelu) {
    throw std::invalid_argument("pre receives the input of GELU and requires gelu");
  }
  const bool of_gelu = g.gelu_grad.first.data != nullptr;
  if (g.gelu && of_gelu) {
    throw std::invalid_argument("gelu and gelu_grad cannot be combined");
  }
  if (g.accumulate && (g.gelu || of_gelu)) {
    throw std::invalid_argument("accumulate cannot be combined with gelu or gelu_grad");
  }
  if (g.accumulate && g.c.first.bf16) {
    throw std::invalid_argument("accumulate requires c in float32");
  }
}

void multiply(py::handle a, py::handle b, py::handle c, bool transpose_a, bool transpose_b,
              bool accumulate, py::handle bias, bool gelu, py::handle pre, py::handle gelu_grad,
              bool gelu_b, py::handle row_sums, unsigned threads, bool bf16,
              py::handle instruction_set) {
  const GemmKernels& kernels = instruction_set.is_none()
                                   ? best_gemm_kernels(bf16)
                                   : gemm_kernels(py::cast<std::string>(instruction_set));
  const bool any = kernels.bf16();
  if (bf16 && !any)
    throw std::invalid_argument("bf16 requires a bf16 instruction set, e.g. bf16-portable");
  const Tensor left(a, "a", 2, any), result(c, "c", 2, any);
  Gemm g;
  g.m = transpose_a ? left.columns : left.rows;
  g.k = transpose_a ? left.rows : left.columns;
  g.a = {left.numbers, left.stride};
  g.n = result.columns;
  if (result.rows != g.m) {
    refuse("c", "has " + std::to_string(result.rows) + " rows, but the product has " +
                    std::to_string(g.m));
  }
  g.c = {result.numbers, result.stride};
  set_matrix(g.b, b, "b", transpose_b ? g.n : g.k, transpose_b ? g.k : g.n, any);
  g.transpose_a = transpose_a;
  g.transpose_b = transpose_b;
  g.accumulate = accumulate;
  g.gelu = gelu;
  g.gelu_b = gelu_b;
  if (!bias.is_none()) g.bias = vector(bias, "bias", g.n);
  if (!pre.is_none()) set_matrix(g.pre, pre, "pre", g.m, g.n, any);
  if (!gelu_grad.is_none()) set_matrix(g.gelu_grad, gelu_grad, "gelu_grad", g.m, g.n, any);
  if (!row_sums.is_none()) g.row_sums = vector(row_sums, "row_sums", g.m);
  check_combination(g);
  const py::gil_scoped_release unlocked;
  gemm(g, threads, kernels);
}

}  // namespace

void bind_gemm(py::module_& m) {
  m.def("gemm", &multiply, py::arg("a"), py::arg("b"), py::arg("c"), py::kw_only(),
        py::arg("transpose_a") = false, py::arg("transpose_b") = false,
        py::arg("accumulate") = false, py::arg("bias") = py::none(), py::arg("gelu") = false,
        py::arg("pre") = py::none(), py::arg("gelu_grad") = py::none(), py::arg("gelu_b") = false,
        py::arg("row_sums") = py::none(), py::arg("threads") = 1, py::arg("bf16") = false,
        py::arg("instruction_set") = py::none());
  m.def("gemm_is_faster", &gemm_is_faster, py::arg("bf16"));
}

}  // namespace fastgpt
