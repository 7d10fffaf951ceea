// Rows that lie side by side: the loop dimension before the last has stride 1 and the row itself has not, as in
// softmax over the channels of an image. Vectors then run across rows.
#pragma once
#include "ops/_rows.h"
#include "simd/math.h"

namespace isotile {
namespace ISOTILE_ISA {

template <class T>
ISOTILE_INLINE bool columns_side_by_side(const TensorView& view) {
  return view.ndim >= 2 && view.dtype == DTypeOf<T>::value && view.stride[view.ndim - 2] == 1 &&
         view.size[view.ndim - 2] >= Vec<Accumulator<T>>::kLanes;
}

// kVectors vectors of rows from the given pointers on: all of them, or the first `count` rows.
template <class A, int kVectors>
struct WholeColumns {
  template <class T>
  ISOTILE_INLINE Vec<A> load(const T* p, int u) const {
    return Vec<A>::load(p + u * Vec<A>::kLanes);
  }
  template <class T>
  ISOTILE_INLINE void store(Vec<A> v, T* p, int u) const {
    v.store(p + u * Vec<A>::kLanes);
  }
};
template <class A, int kVectors>
struct TailColumns {
  int64_t count;
  ISOTILE_INLINE int64_t lanes(int u) const {
    const int64_t left = count - u * Vec<A>::kLanes;
    return left < 0 ? 0 : left;
  }
  template <class T>
  ISOTILE_INLINE Vec<A> load(const T* p, int u) const {
    return lanes(u) > 0 ? Vec<A>::load(p + u * Vec<A>::kLanes, lanes(u)) : Vec<A>::zero();
  }
  template <class T>
  ISOTILE_INLINE void store(Vec<A> v, T* p, int u) const {
    if (lanes(u) > 0) v.store(p + u * Vec<A>::kLanes, lanes(u));
  }
};

// f(offsets, at) for each group of kVectors vectors of neighbouring rows of K tensors.
template <class T, int kVectors, int K, class F>
ISOTILE_INLINE void for_columns(const TensorView* const (&tensors)[K], const F& f) {
  using A = Accumulator<T>;
  constexpr int64_t kWidth = kVectors * Vec<A>::kLanes;
  const TensorView& shape = *tensors[0];
  const int64_t columns = shape.size[shape.ndim - 2];
  const int64_t groups = (columns + kWidth - 1) / kWidth;
  const int64_t outer = row_count(shape) / columns;
  const int64_t work = row_length(shape) * kWidth;
  // Views whose rows are the outer dimensions alone: the walker then gives the first row of each group of columns.
  TensorView outer_views[K];
  const TensorView* outer_pointers[K];
  for (int k = 0; k < K; ++k) {
    outer_views[k] = *tensors[k];
    outer_views[k].ndim = shape.ndim - 1;
    outer_pointers[k] = &outer_views[k];
  }
  parallel_for(0, outer * groups, (kParallelElements + work - 1) / work, [&](int64_t begin, int64_t end) {
    RowWalker<K> walk(outer_pointers, begin / groups);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % groups * kWidth;
      if (first == 0 && task != begin) walk.next();
      int64_t offset[K];
      for (int k = 0; k < K; ++k) offset[k] = walk.offset[k] + first;
      if (columns - first >= kWidth) {
        f(offset, WholeColumns<A, kVectors>{});
      } else {
        f(offset, TailColumns<A, kVectors>{columns - first});
      }
    }
  });
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
