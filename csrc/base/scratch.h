// Working memory of kernels: leased from a per-thread cache, so that a call seldom touches new pages (page faults
// cost more than most kernels). Contents are undefined.
#pragma once
#include <cstddef>
#include <cstdint>

#include "base/inline.h"

namespace isotile {

namespace detail {
void* scratch_acquire(size_t bytes, size_t* capacity);  // throws std::bad_alloc
void scratch_release(void* block, size_t capacity) noexcept;
}  // namespace detail

// `count` elements of T, 64-byte aligned (2 MB aligned and on huge pages from 128 KB on), from construction to the end of
// the scope, on the constructing thread's cache. Other threads may use the memory meanwhile. Large buffers belong
// before the parallel region; inside one, an allocation failure still surfaces as std::bad_alloc at the call.
template <class T>
class Scratch {
 public:
  ISOTILE_INLINE explicit Scratch(int64_t count) {
    if (count > 0) data_ = static_cast<T*>(detail::scratch_acquire(static_cast<size_t>(count) * sizeof(T), &capacity_));
  }
  ISOTILE_INLINE ~Scratch() {
    if (data_) detail::scratch_release(data_, capacity_);
  }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ISOTILE_INLINE T* data() const { return data_; }
  ISOTILE_INLINE T& operator[](int64_t i) const { return data_[i]; }

 private:
  T* data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace isotile
