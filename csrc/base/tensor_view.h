// What a kernel sees of a tensor: a plain struct, no libtorch.
#pragma once
#include <cstdint>

#include "base/inline.h"

namespace isotile {

// The order is part of the binding: python/isotile/backends/cpu.py sends these codes.
enum class DType : int32_t {
  kFloat32 = 0,
  kBFloat16 = 1,
  kFloat16 = 2,
  kFloat64 = 3,
  kBool = 4,
  kInt32 = 5,
  kInt64 = 6,
  kInt8 = 7,
  kUInt8 = 8,
};

constexpr int kMaxDims = 12;

struct TensorView {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int32_t ndim = -1;           // -1: an optional tensor that is absent
  int64_t size[kMaxDims] = {};
  int64_t stride[kMaxDims] = {};  // in elements; 0 where broadcast, never negative

  ISOTILE_INLINE bool present() const { return ndim >= 0; }
  ISOTILE_INLINE int64_t numel() const {
    int64_t n = 1;
    for (int i = 0; i < ndim; ++i) n *= size[i];
    return n;
  }
};

}  // namespace isotile
