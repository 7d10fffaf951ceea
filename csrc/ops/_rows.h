// What the kernels over the last dimension share: walking the rows of [B.., n], and taking a row in and out.
#pragma once
#include "base/cpu.h"
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
  // To the next row; the offsets of the row left behind.
  struct Offsets {
    int64_t at[K];
  };
  ISOTILE_INLINE Offsets step() {
    Offsets left;
    for (int k = 0; k < K; ++k) left.at[k] = offset[k];
    next();
    return left;
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

template <class T>
struct DTypeOf;
template <>
struct DTypeOf<float> {
  static constexpr DType value = DType::kFloat32;
};
template <>
struct DTypeOf<BFloat16> {
  static constexpr DType value = DType::kBFloat16;
};
template <>
struct DTypeOf<Float16> {
  static constexpr DType value = DType::kFloat16;
};
template <>
struct DTypeOf<double> {
  static constexpr DType value = DType::kFloat64;
};

// An absent tensor, or one of type T whose last dimension is contiguous.
template <class T>
ISOTILE_INLINE bool plain(const TensorView& view) {
  if (!view.present()) return true;
  return view.dtype == DTypeOf<T>::value && (row_stride(view) == 1 || row_length(view) <= 1);
}

// One vector's worth of a row at element i: all lanes, or the first `count` at the row's end.
template <class A>
struct WholeLanes {
  int64_t i;
  template <class T>
  ISOTILE_INLINE Vec<A> load(const T* row) const {
    return Vec<A>::load(row + i);
  }
  template <class T>
  ISOTILE_INLINE void store(Vec<A> v, T* row) const {
    v.store(row + i);
  }
  template <class T>
  ISOTILE_INLINE void stream(Vec<A> v, T* row) const {
    v.stream(row + i);
  }
};
template <class A>
struct TailLanes {
  int64_t i;
  int64_t count;
  template <class T>
  ISOTILE_INLINE Vec<A> load(const T* row) const {
    return Vec<A>::load(row + i, count);
  }
  template <class T>
  ISOTILE_INLINE void store(Vec<A> v, T* row) const {
    v.store(row + i, count);
  }
  template <class T>
  ISOTILE_INLINE void stream(Vec<A> v, T* row) const {
    v.store(row + i, count);
  }
};

// f(at) along a row; f reads and writes through at.load and at.store.
template <class A, class F>
ISOTILE_INLINE void for_lanes(int64_t n, const F& f) {
  constexpr int64_t kLanes = Vec<A>::kLanes;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) f(WholeLanes<A>{i});
  if (i < n) f(TailLanes<A>{i, n - i});
}

// to[i] = the i-th element of the row that starts `offset` elements into the tensor, for any dtype and stride.
template <class A>
void load_row(const TensorView& view, int64_t offset, int64_t n, A* to) {
  const int64_t stride = row_stride(view);
  dispatch_float(view.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using V = Vec<A>;
    const T* from = data_of<T>(view) + offset;
    if (stride == 1) return for_lanes<A>(n, [=](auto at) { at.store(at.load(from), to); });
    for (int64_t i = 0; i < n; i += V::kLanes) V::load_strided(from + i * stride, stride, n - i).store(to + i, n - i);
  });
}
template <class A>
void store_row(const TensorView& view, int64_t offset, int64_t n, const A* from) {
  const int64_t stride = row_stride(view);
  dispatch_float(view.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using V = Vec<A>;
    T* to = data_of<T>(view) + offset;
    if (stride == 1) return for_lanes<A>(n, [=](auto at) { at.store(at.load(from), to); });
    for (int64_t i = 0; i < n; i += V::kLanes) V::load(from + i, n - i).store_strided(to + i * stride, stride, n - i);
  });
}

// A [n] parameter as contiguous accumulators, converted once for a call; absent: filled with `otherwise`.
template <class A>
class Parameter {
 public:
  ISOTILE_INLINE Parameter(const TensorView& view, int64_t n, double offset, double otherwise)
      : own_(direct(view, offset) ? 0 : n), data_(own_.data()) {
    if (direct(view, offset)) {
      data_ = data_of<A>(view);
      return;
    }
    if (!view.present()) {
      for (int64_t i = 0; i < n; ++i) own_[i] = static_cast<A>(otherwise);
      return;
    }
    load_row(view, 0, n, own_.data());
    for (int64_t i = 0; i < n && offset != 0; ++i) own_[i] += static_cast<A>(offset);
  }
  ISOTILE_INLINE const A* data() const { return data_; }

 private:
  static ISOTILE_INLINE bool direct(const TensorView& view, double offset) {
    return view.present() && plain<A>(view) && offset == 0;
  }
  Scratch<A> own_;
  const A* data_;
};

// f(at, sums) adds one vector's terms to kSums accumulators; out[k] is their total over the row. kTurns accumulators
// take turns, and every kChunk elements go to a double, so that the error does not grow with n. The order is a
// function of n alone.
template <class A, int kSums, int kTurns = 4, class F>
ISOTILE_INLINE void row_reduce(int64_t n, double (&out)[kSums], const F& f) {
  using V = Vec<A>;
  constexpr int64_t kLanes = V::kLanes;
  constexpr int64_t kChunk = 4096;
  for (int k = 0; k < kSums; ++k) out[k] = 0;
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t end = n - begin < kChunk ? n : begin + kChunk;
    V sums[kTurns][kSums];
    for (int u = 0; u < kTurns; ++u) {
      for (int k = 0; k < kSums; ++k) sums[u][k] = V::zero();
    }
    int64_t i = begin;
    for (; i + kTurns * kLanes <= end; i += kTurns * kLanes) {
      for (int u = 0; u < kTurns; ++u) f(WholeLanes<A>{i + u * kLanes}, sums[u]);
    }
    for (; i + kLanes <= end; i += kLanes) f(WholeLanes<A>{i}, sums[0]);
    if (i < end) {
      V with_tail[kSums];
      for (int k = 0; k < kSums; ++k) with_tail[k] = sums[kTurns - 1][k];
      f(TailLanes<A>{i, end - i}, with_tail);
      const auto present = V::Mask::first(end - i);
      for (int k = 0; k < kSums; ++k) sums[kTurns - 1][k] = select(present, with_tail[k], sums[kTurns - 1][k]);
    }
    for (int k = 0; k < kSums; ++k) {
      for (int u = 1; u < kTurns; ++u) sums[0][k] += sums[u][k];
      out[k] += static_cast<double>(reduce_add(sums[0][k]));
    }
  }
}

// Outputs that will not stay in the caches anyway are written past them: no read for ownership.
ISOTILE_INLINE bool worth_streaming(const TensorView& view) {
  return view.present() && view.numel() * item_size(view.dtype) > last_level_cache_bytes() / 2;
}
template <class T>
ISOTILE_INLINE bool aligned_for_stream(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % (Vec<Accumulator<T>>::kLanes * sizeof(T)) == 0;
}

// What lies beyond the row at hand: kNear: all of it is in the second level of cache; kFar: later rows' inputs and this
// one's output are asked for ahead of their use (the hardware's own prefetch stops at pages, and a first write reads);
// kPast: the output is written past the caches.
enum class Reach { kNear, kFar, kPast };
template <Reach kReach>
struct ReachOf {
  static constexpr Reach value = kReach;
};

// Of a call over `arrays` arrays like `out`.
ISOTILE_INLINE Reach reach_of(const TensorView& out, int arrays) {
  const int64_t bytes = out.numel() * item_size(out.dtype);
  if (worth_streaming(out)) return Reach::kPast;
  const bool rows_fit = 4 * arrays * row_length(out) * item_size(out.dtype) <= l2_cache_bytes();
  return arrays * bytes > l2_cache_bytes() && rows_fit ? Reach::kFar : Reach::kNear;
}
// f(ReachOf<...>) for one row of output; whole vectors past the caches want an aligned one.
template <class T, class F>
ISOTILE_INLINE void with_reach(Reach reach, const T* out, const F& f) {
  if (reach == Reach::kNear) return f(ReachOf<Reach::kNear>{});
  if (reach == Reach::kPast && aligned_for_stream(out)) return f(ReachOf<Reach::kPast>{});
  f(ReachOf<Reach::kFar>{});
}

// The rows that are asked for while another is worked on: those some kilobytes further on, as one short row takes less
// time than memory needs to answer.
template <int K>
class RowsAhead {
 public:
  ISOTILE_INLINE RowsAhead(const TensorView* const (&tensors)[K], int64_t begin, int64_t end)
      : walk_(tensors, begin + rows_of(*tensors[0])), left_(end - begin - rows_of(*tensors[0])) {}
  // Offsets of the next one; at the end `own`.
  ISOTILE_INLINE typename RowWalker<K>::Offsets step(const typename RowWalker<K>::Offsets& own) {
    return left_-- > 0 ? walk_.step() : own;
  }

 private:
  static ISOTILE_INLINE int64_t rows_of(const TensorView& view) {
    constexpr int64_t kBytes = 8192;
    const int64_t bytes = row_length(view) * item_size(view.dtype);
    return bytes >= kBytes ? 1 : (kBytes + bytes - 1) / bytes;
  }
  RowWalker<K> walk_;
  int64_t left_;
};

template <Reach kReach, class T>
ISOTILE_INLINE void ask_next(const T* p) {
  if constexpr (kReach != Reach::kNear) __builtin_prefetch(p, 0, 2);
}
template <Reach kReach, class T>
ISOTILE_INLINE void ask_output(const T* p) {
  if constexpr (kReach == Reach::kFar) __builtin_prefetch(p, 1, 2);
}
template <Reach kReach, class At, class V, class T>
ISOTILE_INLINE void write_lanes(At at, V v, T* row) {
  if constexpr (kReach == Reach::kPast) {
    at.stream(v, row);
  } else {
    at.store(v, row);
  }
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
