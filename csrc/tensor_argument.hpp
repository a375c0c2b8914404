// PyTorch's tensors as arguments of this module's functions, without a header of PyTorch's.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "dlpack.hpp"

namespace fastgpt {

// How to look at PyTorch's tensors. What it holds lives as long as the process.
struct TensorType {
  TensorType() {
    namespace py = pybind11;
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

// Numbers that lie side by side on the CPU.
template <typename Number>
struct Numbers {
  Number* data = nullptr;
  std::size_t size = 0;
};

template <typename Number>
Numbers<Number> numbers_of(pybind11::handle tensor, const char* name) {
  const auto refuse = [=](const char* what) {
    throw std::invalid_argument(std::string(name) + what);
  };
  const TensorType& known = TensorType::get();
  if (PyObject_TypeCheck(tensor.ptr(), known.type) == 0) refuse(" must be a torch.Tensor");
  DlTensor seen{};
  const bool visible = known.look_at(tensor.ptr(), &seen) == 0;
  if (!visible) PyErr_Clear();  // one without memory
  constexpr bool kFloats = std::is_floating_point_v<Number>;
  if (!visible || seen.type_code != (kFloats ? kDlFloat : kDlInt) || seen.type_lanes != 1 ||
      seen.type_bits != 8 * sizeof(Number) || seen.device_type != kDlCpu) {
    refuse(kFloats ? " must be of float32 and on the CPU" : " must be of int64 and on the CPU");
  }
  Numbers<Number> numbers;
  numbers.size = 1;
  for (std::int32_t i = seen.dimensions - 1; i >= 0; --i) {
    const bool gaps = seen.strides != nullptr && seen.shape[i] != 1 &&
                      seen.strides[i] != static_cast<std::int64_t>(numbers.size);
    numbers.size *= static_cast<std::size_t>(seen.shape[i]);
    if (gaps && numbers.size != 0) refuse(" must be contiguous");
  }
  numbers.data = reinterpret_cast<Number*>(static_cast<char*>(seen.data) + seen.byte_offset);
  return numbers;
}

// The numbers of a contiguous fp32 tensor of that size; null for None.
inline float* floats(pybind11::handle tensor, const char* name, std::size_t size) {
  if (tensor.is_none()) return nullptr;
  const Numbers<float> numbers = numbers_of<float>(tensor, name);
  if (numbers.size != size) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(numbers.size) +
                                " elements, not " + std::to_string(size));
  }
  return numbers.data;
}

}  // namespace fastgpt
