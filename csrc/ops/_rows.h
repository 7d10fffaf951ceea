// What the kernels over the last dimension share: walking the rows of [B.., n], and taking a row in and out.
#pragma once
#include "base/dtype.h"
#include "base/inline.h"
#include "base/parallel.h"
#include "base/scratch.h"
#include "base/tensor_view.h"
#include "simd/vec.h"

namespace isotile {
namespace ISOTILE_ISA {

// Elements of work that are worth another thread.
constexpr int64_t kParallelElements = 16384;

ISOTILE_INLINE int64_t row_grain(int64_t n) { return n > 0 ? (kParallelElements + n - 1) / n : kParallelElements; }

ISOTILE_INLINE int64_t row_count(const TensorView& view) {
  int64_t rows = 1;
  for (int d = 0; d + 1 < view.ndim; ++d) rows *= view.size[d];
  return rows;
}
ISOTILE_INLINE int64_t row_length(const TensorView& view) { return view.size[view.ndim - 1]; }
ISOTILE_INLINE int64_t row_stride(const TensorView& view) { return view.stride[view.ndim - 1]; }

// The element offset of each of K tensors at one row, advanced row by row. All have the same loop dimensions; the
// absent ones stay at 0.
template <int K>
struct RowWalker {
  const TensorView* views[K];
  int dims;
  int64_t index[kMaxDims];
  int64_t offset[K];

  ISOTILE_INLINE RowWalker(const TensorView* const (&tensors)[K], int64_t row) {
    dims = 0;
    const TensorView* shape = nullptr;
    for (int k = 0; k < K; ++k) {
      views[k] = tensors[k];
      offset[k] = 0;
      if (tensors[k]->present() && !shape) shape = tensors[k];
    }
    dims = shape->ndim - 1;
    for (int d = dims - 1; d >= 0; --d) {
      index[d] = row % shape->size[d];
      row /= shape->size[d];
      for (int k = 0; k < K; ++k) {
        if (views[k]->present()) offset[k] += index[d] * views[k]->stride[d];
      }
    }
    size = shape->size;
  }
  ISOTILE_INLINE void next() {
    for (int d = dims - 1; d >= 0; --d) {
      if (++index[d] < size[d]) {
        for (int k = 0; k < K; ++k) offset[k] += views[k]->stride[d];
        return;
      }
      for (int k = 0; k < K; ++k) offset[k] -= (size[d] - 1) * views[k]->stride[d];
      index[d] = 0;
    }
  }

 private:
  const int64_t* size;
};

template <class T>
ISOTILE_INLINE T* data_of(const TensorView& view) {
  return static_cast<T*>(view.data);
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
