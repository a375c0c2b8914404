// A growable array of token ids, which the system can often grow in place, and which can be handed
// over to NumPy without a copy.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "common/huge_pages.hpp"

namespace fastgpt {

template <typename Id>
class IdBuffer {
 public:
  std::size_t size() const { return size_; }
  Id* data() { return ids_.get(); }
  const Id* data() const { return ids_.get(); }

  // Ensures capacity for `count` more ids and returns a pointer to the end of the ids. Ids written
  // there become part of the buffer only by extend_by() or extend_to().
  Id* reserve(std::size_t count) {
    if (capacity_ - size_ < count) grow(std::max(size_ + count, size_ + size_ / 2));
    return ids_.get() + size_;
  }
  void extend_by(std::size_t count) { size_ += count; }
  void extend_to(const Id* end) { size_ = static_cast<std::size_t>(end - ids_.get()); }
  void truncate(std::size_t size) { size_ = size; }

  template <typename Other>
  void append(const Other* ids, std::size_t count) {
    std::copy(ids, ids + count, reserve(count));
    size_ += count;
  }

  // Releases unused capacity.
  void shrink() {
    if (size_ < capacity_) grow(size_);
  }

 private:
  struct Free {
    void operator()(Id* ids) const { std::free(ids); }
  };

  // Uses realloc, which for large blocks remaps pages instead of copying bytes.
  void grow(std::size_t capacity) {
    void* moved = std::realloc(ids_.get(), std::max<std::size_t>(capacity, 1) * sizeof(Id));
    if (moved == nullptr) throw std::bad_alloc();
    static_cast<void>(ids_.release());  // realloc has freed the old block
    ids_.reset(static_cast<Id*>(moved));
    capacity_ = capacity;
    use_huge_pages(ids_.get(), capacity * sizeof(Id));
  }

  std::unique_ptr<Id[], Free> ids_;
  std::size_t size_ = 0;
  std::size_t capacity_ = 0;
};

}  // namespace fastgpt
