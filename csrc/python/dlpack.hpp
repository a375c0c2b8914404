// What DLPack 1.3 (https://dmlc.github.io/dlpack) lays down for looking at a tensor from C, as far
// as it is needed here. PyTorch offers it since 2.11; asking a tensor the same things in Python's
// ways takes ten times as long, more than a small matrix product.
#pragma once

#include <cstdint>

namespace fastgpt {

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

// In the capsule called "dlpack_exchange_api", an attribute of the tensors' type.
struct DlExchange {
  std::uint32_t major, minor;
  const DlExchange* older;
  void* unused[3];
  // Returns 0, or else -1 with Python's exception set. What it tells is the tensor's own.
  int (*look_at)(void* object, DlTensor* tensor);
};

}  // namespace fastgpt
