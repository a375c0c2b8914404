// Zero-initialized arrays whose pages are allocated on first access.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

#include "common/huge_pages.hpp"

namespace fastgpt {

// An array of zero-initialized elements (all bytes zero), aligned to cache lines. Memory that is
// never accessed is not allocated. Large arrays use huge pages where the system has them, which
// speeds up random access.
template <typename T>
class LazyArray {
 public:
  explicit LazyArray(std::size_t size) : size_(size) {
    const std::size_t bytes = size * sizeof(T);
    const std::size_t alignment = bytes < kHugePage ? kCacheLine : kHugePage;
    memory_.reset(std::calloc(bytes + alignment, 1));
    if (!memory_) throw std::bad_alloc();
    const auto address = reinterpret_cast<std::uintptr_t>(memory_.get());
    data_ = reinterpret_cast<T*>((address + alignment - 1) / alignment * alignment);
    if (bytes >= kHugePage) use_huge_pages(data_, bytes);
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  std::size_t size() const { return size_; }
  T* begin() { return data_; }
  T* end() { return data_ + size_; }
  T& operator[](std::size_t i) { return data_[i]; }
  const T& operator[](std::size_t i) const { return data_[i]; }

 private:
  struct Free {
    void operator()(void* memory) const { std::free(memory); }
  };
  static constexpr std::size_t kCacheLine = 64;

  std::unique_ptr<void, Free> memory_;
  T* data_;
  std::size_t size_;
};

}  // namespace fastgpt
