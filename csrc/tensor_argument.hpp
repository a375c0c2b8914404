// PyTorch's tensors as arguments of this module's functions, without a header of PyTorch's.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <stdexcept>
#include <string>

namespace fastgpt {

// What a tensor is asked for: its address. Asking takes a fraction of a microsecond, a view of it
// by NumPy several.
class TensorNames {
 public:
  PyObject* dtype = PyUnicode_InternFromString("dtype");
  PyObject* is_cpu = PyUnicode_InternFromString("is_cpu");
  PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
  PyObject* numel = PyUnicode_InternFromString("numel");
  PyObject* data_ptr = PyUnicode_InternFromString("data_ptr");
  PyObject* float32 = of_torch("float32");
  PyObject* int64 = of_torch("int64");

  static const TensorNames& get() {
    static const TensorNames names;  // as long as the process lives: Python ends before statics do
    return names;
  }

 private:
  static PyObject* of_torch(const char* name) {
    return pybind11::object(pybind11::module_::import("torch").attr(name)).release().ptr();
  }
};

inline pybind11::object call(pybind11::handle object, PyObject* method) {
  PyObject* result = PyObject_CallMethodNoArgs(object.ptr(), method);
  if (result == nullptr) throw pybind11::error_already_set();
  return pybind11::reinterpret_steal<pybind11::object>(result);
}

// Returns the address of a tensor of `size` numbers that lie side by side on the CPU.
inline void* address_of(pybind11::handle tensor, const char* name, std::size_t size,
                        PyObject* dtype) {
  const auto refuse = [=](const char* what) {
    throw std::invalid_argument(std::string(name) + what);
  };
  const TensorNames& names = TensorNames::get();
  if (PyObject_HasAttr(tensor.ptr(), names.data_ptr) == 0) refuse(" must be a PyTorch tensor");
  if (!pybind11::object(tensor.attr(names.dtype)).is(pybind11::handle(dtype))) {
    refuse(" has another dtype");
  }
  if (!pybind11::object(tensor.attr(names.is_cpu)).is(pybind11::handle(Py_True))) {
    refuse(" must be on the CPU");
  }
  if (!call(tensor, names.is_contiguous).is(pybind11::handle(Py_True))) {
    refuse(" must be contiguous");
  }
  if (pybind11::cast<std::size_t>(call(tensor, names.numel)) != size) refuse(" has another size");
  return reinterpret_cast<void*>(pybind11::cast<std::size_t>(call(tensor, names.data_ptr)));
}

// The numbers of a contiguous fp32 tensor; null for None.
inline float* floats(pybind11::handle tensor, const char* name, std::size_t size) {
  if (tensor.is_none()) return nullptr;
  return static_cast<float*>(address_of(tensor, name, size, TensorNames::get().float32));
}

}  // namespace fastgpt
