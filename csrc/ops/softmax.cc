// y = e^(x - max x) / sum of e^(x - max x) over the last dimension.
#include "ops/_softmax.h"

namespace isotile {
namespace ISOTILE_ISA {
namespace {

template <class T>
ISOTILE_INLINE Accumulator<T> row_maximum(const T* x, int64_t n) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  constexpr int64_t kLanes = V::kLanes;
  const V lowest = V::set1(-__builtin_inff());
  V m[4] = {lowest, lowest, lowest, lowest};
  int64_t i = 0;
  for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
    for (int u = 0; u < 4; ++u) m[u] = max(V::load(x + i + u * kLanes), m[u]);  // a NaN in x is passed over: the sum
  }                                                                             // will have it
  for (; i + kLanes <= n; i += kLanes) m[0] = max(V::load(x + i), m[0]);
  if (i < n) m[1] = select(V::Mask::first(n - i), max(V::load(x + i, n - i), m[1]), m[1]);
  return reduce_max(max(max(m[0], m[1]), max(m[2], m[3])));
}

// `kept` [n] holds the exponentials between the passes, and may be y; null: they are taken twice instead. next_x: a
// later row, or this one where there is none.
template <Reach kReach, class T>
ISOTILE_INLINE void softmax_row(const T* x, const T* next_x, T* y, Accumulator<T>* kept, int64_t n) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const V maximum = V::set1(row_maximum(x, n));
  double sum[1];
  if (kept) {
    row_reduce<A, 1, 2>(n, sum, [=](auto at, V* s) {
      ask_output<kReach>(y + at.i);
      ask_next<kReach>(next_x + at.i);
      const V e = exp_nonpositive(at.load(x) - maximum);
      at.store(e, kept);
      s[0] += e;
    });
  } else {
    row_reduce<A, 1, 2>(n, sum, [=](auto at, V* s) { s[0] += exp_nonpositive(at.load(x) - maximum); });
  }
  const V scale = V::set1(static_cast<A>(1.0 / sum[0]));
  if (kept) {
    for_lanes<A>(n, [=](auto at) { write_lanes<kReach>(at, at.load(kept) * scale, y); });
  } else {
    for_lanes<A>(n, [=](auto at) { write_lanes<kReach>(at, exp_nonpositive(at.load(x) - maximum) * scale, y); });
  }
}

template <class T>
void softmax_plain_rows(const TensorView& x, const TensorView& y, int64_t begin, int64_t end) {
  using A = Accumulator<T>;
  const int64_t n = row_length(x);
  const Reach reach = reach_of(y, 2);
  const bool keep = n * static_cast<int64_t>(sizeof(A)) <= l2_cache_bytes() / 2;
  const bool keep_in_place = sizeof(T) == sizeof(A) && reach != Reach::kPast;
  const Scratch<A> kept(keep && !keep_in_place ? n : 0);
  RowWalker<2> walk({&x, &y}, begin);
  RowsAhead<1> ahead({&x}, begin, end);
  for (int64_t row = begin; row < end; ++row) {
    const auto offset = walk.step();
    const T* from = data_of<T>(x) + offset.at[0];
    const T* next = data_of<T>(x) + ahead.step({{offset.at[0]}}).at[0];
    T* to = data_of<T>(y) + offset.at[1];
    with_reach(reach, to, [&](auto r) {
      if constexpr (sizeof(T) == sizeof(A)) {
        softmax_row<decltype(r)::value>(from, next, to, keep_in_place ? to : kept.data(), n);
      } else {
        softmax_row<decltype(r)::value>(from, next, to, kept.data(), n);
      }
    });
  }
  if (reach == Reach::kPast) stream_fence();
}

// Any strides and mixed dtypes: rows go through contiguous accumulators.
template <class A>
void softmax_any_rows(const TensorView& x, const TensorView& y, int64_t begin, int64_t end) {
  const int64_t n = row_length(x);
  const Scratch<A> row_x(n), row_y(n);
  RowWalker<2> walk({&x, &y}, begin);
  for (int64_t row = begin; row < end; ++row, walk.next()) {
    load_row(x, walk.offset[0], n, row_x.data());
    softmax_row<Reach::kNear>(row_x.data(), row_x.data(), row_y.data(), row_y.data(), n);
    store_row(y, walk.offset[1], n, row_y.data());
  }
}

// Rows side by side in memory (softmax over a dimension that is not the last): one row in each lane.
template <class T>
struct SoftmaxColumns {
  using A = Accumulator<T>;
  using V = Vec<A>;
  static constexpr int kVectors = 4;

  template <class Lanes>
  static ISOTILE_INLINE void run(const T* x, int64_t x_stride, T* y, int64_t y_stride, int64_t n, Lanes at) {
    V maximum[kVectors], sum[kVectors], scale[kVectors];
    for (int u = 0; u < kVectors; ++u) maximum[u] = V::set1(-__builtin_inff());
    for (int64_t i = 0; i < n; ++i) {
      for (int u = 0; u < kVectors; ++u) maximum[u] = max(at.load(x + i * x_stride, u), maximum[u]);
    }
    for (int u = 0; u < kVectors; ++u) sum[u] = V::zero();
    constexpr int64_t kChunk = 256;  // sums of sums: the error does not grow with n
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      const int64_t end = n - begin < kChunk ? n : begin + kChunk;
      V part[kVectors];
      for (int u = 0; u < kVectors; ++u) part[u] = V::zero();
      for (int64_t i = begin; i < end; ++i) {
        for (int u = 0; u < kVectors; ++u) part[u] += exp_nonpositive(at.load(x + i * x_stride, u) - maximum[u]);
      }
      for (int u = 0; u < kVectors; ++u) sum[u] += part[u];
    }
    for (int u = 0; u < kVectors; ++u) scale[u] = V::set1(A(1)) / sum[u];
    for (int64_t i = 0; i < n; ++i) {
      for (int u = 0; u < kVectors; ++u) {
        at.store(exp_nonpositive(at.load(x + i * x_stride, u) - maximum[u]) * scale[u], y + i * y_stride, u);
      }
    }
  }
};

template <class T>
void softmax_columns(const TensorView& x, const TensorView& y) {
  for_columns<T, SoftmaxColumns<T>::kVectors, 2>({&x, &y}, [&](const int64_t* offset, auto at) {
    SoftmaxColumns<T>::run(data_of<T>(x) + offset[0], row_stride(x), data_of<T>(y) + offset[1], row_stride(y),
                           row_length(x), at);
  });
}

}  // namespace

void softmax(const TensorView* t, const double*) {
  const TensorView& x = t[0];
  const TensorView& y = t[1];
  const int64_t rows = row_count(x), n = row_length(x);
  if (rows == 0 || n == 0) return;
  dispatch_float(x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    if (plain<T>(x) && plain<T>(y)) {
      parallel_for(0, rows, row_grain(n), [&](int64_t begin, int64_t end) { softmax_plain_rows<T>(x, y, begin, end); });
    } else if (columns_side_by_side<T>(x) && columns_side_by_side<T>(y)) {
      softmax_columns<T>(x, y);
    } else if (y.dtype == DType::kFloat64) {
      parallel_for(0, rows, row_grain(n),
                   [&](int64_t begin, int64_t end) { softmax_any_rows<double>(x, y, begin, end); });
    } else {
      parallel_for(0, rows, row_grain(n),
                   [&](int64_t begin, int64_t end) { softmax_any_rows<Accumulator<T>>(x, y, begin, end); });
    }
  });
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
