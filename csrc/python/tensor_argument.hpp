// Access to PyTorch tensors passed as arguments, without PyTorch's headers (see dlpack.hpp).
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "common/bfloat16.hpp"
#include "python/dlpack.hpp"

namespace fastgpt {

// PyTorch's tensor type and its DLPack exchange function, looked up once. The reference to the type
// is never released.
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
    if (exchange == nullptr || exchange->view_tensor == nullptr) {
      throw std::runtime_error("PyTorch 2.11 or newer is required");
    }
    view_tensor = exchange->view_tensor;
    type = reinterpret_cast<PyTypeObject*>(py::object(tensor).release().ptr());
  }

  static const TensorType& get() {
    static const TensorType found;
    return found;
  }

  decltype(DlExchange::view_tensor) view_tensor;
  PyTypeObject* type;
};

// Returns a view of a CPU tensor of the given dtype (with `bf16_too`, or of bfloat16). Throws
// std::invalid_argument for any other object. `name` and `type` are for the error message.
inline DlTensor view_tensor(pybind11::handle tensor, const char* name, std::uint8_t type_code,
                            std::uint8_t bits, const char* type, bool bf16_too = false) {
  const auto refuse = [=](const std::string& what) {
    throw std::invalid_argument(std::string(name) + " must be " + what);
  };
  const TensorType& known = TensorType::get();
  if (PyObject_TypeCheck(tensor.ptr(), known.type) == 0) refuse("a torch.Tensor");
  DlTensor seen{};
  const bool visible = known.view_tensor(tensor.ptr(), &seen) == 0;
  if (!visible) PyErr_Clear();  // a tensor without memory, e.g. on the meta device
  const bool fits = (seen.type_code == type_code && seen.type_bits == bits) ||
                    (bf16_too && seen.type_code == kDlBfloat && seen.type_bits == 16);
  if (!visible || !fits || seen.type_lanes != 1 || seen.device_type != kDlCpu) {
    refuse(std::string("of dtype ") + type + (bf16_too ? " or bfloat16" : "") + " and on the CPU");
  }
  return seen;
}

inline DlTensor look_at_floats(pybind11::handle tensor, const char* name, bool bf16_too) {
  return view_tensor(tensor, name, kDlFloat, 32, "float32", bf16_too);
}

inline void* memory_of(const DlTensor& seen) {
  return static_cast<char*>(seen.data) + seen.byte_offset;
}

inline Floats numbers_in(const DlTensor& seen) {
  return {memory_of(seen), seen.type_code == kDlBfloat};
}

// Returns the number of elements of a contiguous tensor. Throws std::invalid_argument for one that
// is not contiguous; the strides of dimensions of size 1 are ignored.
inline std::size_t contiguous_size(const DlTensor& seen, const char* name) {
  std::size_t size = 1;
  for (std::int32_t i = seen.dimensions - 1; i >= 0; --i) {
    const bool gaps = seen.strides != nullptr && seen.shape[i] != 1 &&
                      seen.strides[i] != static_cast<std::int64_t>(size);
    size *= static_cast<std::size_t>(seen.shape[i]);
    if (gaps && size != 0) throw std::invalid_argument(std::string(name) + " must be contiguous");
  }
  return size;
}

// The data of a contiguous CPU tensor.
template <typename Number>
struct Numbers {
  Number* data = nullptr;
  std::size_t size = 0;
};

template <typename Number>
Numbers<Number> numbers_of(pybind11::handle tensor, const char* name) {
  constexpr bool kFloats = std::is_floating_point_v<Number>;
  const DlTensor seen = view_tensor(tensor, name, kFloats ? kDlFloat : kDlInt, 8 * sizeof(Number),
                                    kFloats ? "float32" : "int64");
  const std::size_t size = contiguous_size(seen, name);
  return {static_cast<Number*>(memory_of(seen)), size};
}

inline void check_size(std::size_t size, std::size_t wanted, const char* name) {
  if (size != wanted) {
    throw std::invalid_argument(std::string(name) + " has " + std::to_string(size) +
                                " elements, not " + std::to_string(wanted));
  }
}

// Returns the data of a contiguous float32 tensor with `size` elements, or null for None.
inline float* floats(pybind11::handle tensor, const char* name, std::size_t size) {
  if (tensor.is_none()) return nullptr;
  const Numbers<float> numbers = numbers_of<float>(tensor, name);
  check_size(numbers.size, size, name);
  return numbers.data;
}

// Returns the data of a contiguous float32 or bfloat16 tensor with `size` elements.
inline Floats any_floats(pybind11::handle tensor, const char* name, std::size_t size) {
  const DlTensor seen = look_at_floats(tensor, name, true);
  check_size(contiguous_size(seen, name), size, name);
  return numbers_in(seen);
}

}  // namespace fastgpt
