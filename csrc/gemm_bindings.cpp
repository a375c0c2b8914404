// What Python sees of gemm.hpp.
#include <pybind11/pybind11.h>

#include <cstddef>
#include <stdexcept>
#include <string>

#include "bindings.hpp"
#include "dlpack.hpp"
#include "gemm.hpp"

namespace py = pybind11;

namespace fastgpt {
namespace {

[[noreturn]] void refuse(const char* name, const std::string& what) {
  throw std::invalid_argument(std::string(name) + " " + what);
}

// How to look at PyTorch's tensors. What it holds lives as long as the process.
struct TensorType {
  TensorType() {
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    const py::object capsule = py::getattr(tensor, "__dlpack_c_exchange_api__", py::none());
    const void* found = PyCapsule_CheckExact(capsule.ptr())
                            ? PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api")
                            : nullptr;
    if (PyErr_Occurred() != nullptr) throw py::error_already_set();
    const auto* exchange = static_cast<const DlExchange*>(found);
    while (exchange != nullptr && exchange->major != 1) exchange = exchange->older;
    if (exchange == nullptr || exchange->look_at == nullptr) {
      throw std::runtime_error("PyTorch 2.11 or newer is needed");
    }
    look_at = exchange->look_at;
    type = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
  }

  static const TensorType& get() {
    static const TensorType found;
    return found;
  }

  decltype(DlExchange::look_at) look_at;
  PyTypeObject* type;
};

// A tensor of one or two dimensions as a matrix; of one, as its only row.
struct Tensor {
  Tensor(py::handle tensor, const char* name, int dimensions) {
    const TensorType& known = TensorType::get();
    if (PyObject_TypeCheck(tensor.ptr(), known.type) == 0) refuse(name, "must be a torch.Tensor");
    DlTensor seen{};
    const bool visible = known.look_at(tensor.ptr(), &seen) == 0;
    if (!visible) PyErr_Clear();  // one without memory
    if (!visible || seen.type_code != kDlFloat || seen.type_bits != 32 || seen.type_lanes != 1 ||
        seen.device_type != kDlCpu) {
      refuse(name, "must be of float32 and on the CPU");
    }
    if (seen.dimensions != dimensions) {
      refuse(name, "must have " + std::to_string(dimensions) + " dimension(s), not " +
                       std::to_string(seen.dimensions));
    }
    columns = static_cast<std::size_t>(seen.shape[dimensions - 1]);
    if (dimensions == 2) rows = static_cast<std::size_t>(seen.shape[0]);
    stride = columns;
    if (seen.strides != nullptr) {
      if (columns > 1 && seen.strides[dimensions - 1] != 1) {
        refuse(name, "must have the elements of a row side by side (stride 1)");
      }
      if (rows > 1) stride = static_cast<std::size_t>(seen.strides[0]);
    }
    if (stride < columns) refuse(name, "has rows that overlap");
    data = reinterpret_cast<float*>(static_cast<char*>(seen.data) + seen.byte_offset);
  }

  std::size_t rows = 1, columns = 0, stride = 0;
  float* data = nullptr;
};

template <typename Float>
MatrixView<Float> matrix(py::handle tensor, const char* name, std::size_t rows,
                         std::size_t columns) {
  const Tensor t(tensor, name, 2);
  if (t.rows != rows || t.columns != columns) {
    refuse(name, "has shape [" + std::to_string(t.rows) + ", " + std::to_string(t.columns) +
                     "], not [" + std::to_string(rows) + ", " + std::to_string(columns) + "]");
  }
  return {t.data, t.stride};
}

float* vector(py::handle tensor, const char* name, std::size_t size) {
  const Tensor t(tensor, name, 1);
  if (t.columns != size) {
    refuse(name, "has " + std::to_string(t.columns) + " elements, not " + std::to_string(size));
  }
  return t.data;
}

GemmCode code_named(const std::string& name) {
  GemmCode code = GemmCode::kPortable;
  if (name == "avx2") {
    code = GemmCode::kAvx2;
  } else if (name == "avx512") {
    code = GemmCode::kAvx512;
  } else if (name != "portable") {
    throw std::invalid_argument("code must be portable, avx2 or avx512");
  }
  if (!can_run(code)) throw std::invalid_argument("this processor cannot run the code for " + name);
  return code;
}

void multiply(py::handle a, py::handle b, py::handle c, bool transpose_a, bool transpose_b,
              bool accumulate, py::handle bias, bool gelu, py::handle pre, py::handle gelu_grad,
              bool gelu_b, py::handle row_sums, unsigned threads, py::handle code) {
  const Tensor left(a, "a", 2);
  Gemm g;
  g.m = transpose_a ? left.columns : left.rows;
  g.k = transpose_a ? left.rows : left.columns;
  g.a = {left.data, left.stride};
  const Tensor result(c, "c", 2);
  g.n = result.columns;
  if (result.rows != g.m) {
    refuse("c",
           "has " + std::to_string(result.rows) + " rows, but the product " + std::to_string(g.m));
  }
  g.c = {result.data, result.stride};
  g.b = matrix<const float>(b, "b", transpose_b ? g.n : g.k, transpose_b ? g.k : g.n);
  g.transpose_a = transpose_a;
  g.transpose_b = transpose_b;
  g.accumulate = accumulate;
  g.gelu = gelu;
  g.gelu_b = gelu_b;
  if (!bias.is_none()) g.bias = vector(bias, "bias", g.n);
  if (!pre.is_none()) g.pre = matrix<float>(pre, "pre", g.m, g.n);
  if (!gelu_grad.is_none()) g.gelu_grad = matrix<const float>(gelu_grad, "gelu_grad", g.m, g.n);
  if (!row_sums.is_none()) g.row_sums = vector(row_sums, "row_sums", g.m);
  if (!pre.is_none() && !gelu)
    throw std::invalid_argument("pre is what goes into gelu: needs gelu");
  if (gelu && !gelu_grad.is_none()) {
    throw std::invalid_argument("gelu and gelu_grad exclude each other");
  }
  if (accumulate && (gelu || !gelu_grad.is_none())) {
    throw std::invalid_argument("accumulate adds to a product, not to what GELU makes of it");
  }
  const GemmCode chosen =
      code.is_none() ? best_gemm_code() : code_named(py::cast<std::string>(code));
  const py::gil_scoped_release unlocked;
  fastgpt::gemm(g, threads, chosen);
}

}  // namespace

void bind_gemm(py::module_& m) {
  m.def("gemm", &multiply, py::arg("a"), py::arg("b"), py::arg("c"), py::kw_only(),
        py::arg("transpose_a") = false, py::arg("transpose_b") = false,
        py::arg("accumulate") = false, py::arg("bias") = py::none(), py::arg("gelu") = false,
        py::arg("pre") = py::none(), py::arg("gelu_grad") = py::none(), py::arg("gelu_b") = false,
        py::arg("row_sums") = py::none(), py::arg("threads") = 1, py::arg("code") = py::none());
  m.def("gemm_is_faster", &gemm_is_faster);
}

}  // namespace fastgpt
