// The part of the C ABI of DLPack 1.3 (https://dmlc.github.io/dlpack) that is needed to access a
// tensor's memory. PyTorch supports it since 2.11. Reading the same properties through Python
// attributes takes ten times as long, longer than a small matrix product.
#pragma once

#include <cstdint>

namespace fastgpt {

// DLTensor of the specification.
struct DlTensor {
  void* data;
  std::int32_t device_type, device_id;
  std::int32_t dimensions;
  std::uint8_t type_code, type_bits;
  std::uint16_t type_lanes;
  const std::int64_t* shape;
  const std::int64_t* strides;  // in elements; null for a contiguous tensor
  std::uint64_t byte_offset;
};

constexpr std::int32_t kDlCpu = 1;
constexpr std::uint8_t kDlInt = 0, kDlUnsigned = 1, kDlFloat = 2, kDlBfloat = 4;

// DLPackExchangeAPI of the specification: the contents of the capsule "dlpack_exchange_api", which
// is an attribute of the tensor type.
struct DlExchange {
  std::uint32_t major, minor;
  const DlExchange* older;
  void* unused[3];
  // Fills *tensor with a view of the object's memory, without ownership: data, shape and strides
  // belong to the object. Returns 0, or -1 with a Python exception set.
  int (*view_tensor)(void* object, DlTensor* tensor);
};

}  // namespace fastgpt
