// grad_x = y (g - sum of g y) over the last dimension, y the softmax and g the gradient to it.
#include "ops/_softmax.h"

namespace isotile {
namespace ISOTILE_ISA {
namespace {

// next_*: of a later row, or this one's own where there is none.
template <Reach kReach, class T>
ISOTILE_INLINE void softmax_backward_row(const T* grad, const T* y, T* grad_x, const T* next_grad, const T* next_y,
                                         int64_t n) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  double dot[1];
  row_reduce<A, 1>(n, dot, [=](auto at, V* s) {
    ask_output<kReach>(grad_x + at.i);
    s[0] = fma(at.load(grad), at.load(y), s[0]);
  });
  const V d = V::set1(static_cast<A>(dot[0]));
  for_lanes<A>(n, [=](auto at) {
    ask_next<kReach>(next_grad + at.i);
    ask_next<kReach>(next_y + at.i);
    write_lanes<kReach>(at, (at.load(grad) - d) * at.load(y), grad_x);
  });
}

template <class T>
void softmax_backward_plain_rows(const TensorView& grad, const TensorView& y, const TensorView& grad_x, int64_t begin,
                                 int64_t end) {
  const int64_t n = row_length(y);
  const Reach reach = reach_of(grad_x, 3);
  RowWalker<3> walk({&grad, &y, &grad_x}, begin);
  RowsAhead<2> ahead({&grad, &y}, begin, end);
  for (int64_t row = begin; row < end; ++row) {
    const auto offset = walk.step();
    const auto next = ahead.step({{offset.at[0], offset.at[1]}});
    const T* from_grad = data_of<T>(grad);
    const T* from_y = data_of<T>(y);
    T* to = data_of<T>(grad_x) + offset.at[2];
    with_reach(reach, to, [&](auto r) {
      softmax_backward_row<decltype(r)::value>(from_grad + offset.at[0], from_y + offset.at[1], to,
                                               from_grad + next.at[0], from_y + next.at[1], n);
    });
  }
  if (reach == Reach::kPast) stream_fence();
}

// Any strides and mixed dtypes: rows go through contiguous accumulators.
template <class A>
void softmax_backward_any_rows(const TensorView& grad, const TensorView& y, const TensorView& grad_x, int64_t begin,
                               int64_t end) {
  const int64_t n = row_length(y);
  const Scratch<A> row_grad(n), row_y(n);
  RowWalker<3> walk({&grad, &y, &grad_x}, begin);
  for (int64_t row = begin; row < end; ++row, walk.next()) {
    load_row(grad, walk.offset[0], n, row_grad.data());
    load_row(y, walk.offset[1], n, row_y.data());
    softmax_backward_row<Reach::kNear>(row_grad.data(), row_y.data(), row_grad.data(), row_grad.data(), row_y.data(),
                                       n);
    store_row(grad_x, walk.offset[2], n, row_grad.data());
  }
}

template <class T>
struct SoftmaxBackwardColumns {
  using V = Vec<Accumulator<T>>;
  static constexpr int kVectors = 4;

  template <class Lanes>
  static ISOTILE_INLINE void run(const T* grad, int64_t grad_stride, const T* y, int64_t y_stride, T* grad_x,
                                 int64_t grad_x_stride, int64_t n, Lanes at) {
    V dot[kVectors];
    for (int u = 0; u < kVectors; ++u) dot[u] = V::zero();
    constexpr int64_t kChunk = 256;  // sums of sums: the error does not grow with n
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      const int64_t end = n - begin < kChunk ? n : begin + kChunk;
      V part[kVectors];
      for (int u = 0; u < kVectors; ++u) part[u] = V::zero();
      for (int64_t i = begin; i < end; ++i) {
        for (int u = 0; u < kVectors; ++u) {
          part[u] = fma(at.load(grad + i * grad_stride, u), at.load(y + i * y_stride, u), part[u]);
        }
      }
      for (int u = 0; u < kVectors; ++u) dot[u] += part[u];
    }
    for (int64_t i = 0; i < n; ++i) {
      for (int u = 0; u < kVectors; ++u) {
        const V v = (at.load(grad + i * grad_stride, u) - dot[u]) * at.load(y + i * y_stride, u);
        at.store(v, grad_x + i * grad_x_stride, u);
      }
    }
  }
};

}  // namespace

void softmax_backward(const TensorView* t, const double*) {
  const TensorView& grad = t[0];
  const TensorView& y = t[1];
  const TensorView& grad_x = t[2];
  const int64_t rows = row_count(y), n = row_length(y);
  if (rows == 0 || n == 0) return;
  dispatch_float(y.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using Columns = SoftmaxBackwardColumns<T>;
    if (plain<T>(grad) && plain<T>(y) && plain<T>(grad_x)) {
      parallel_for(0, rows, row_grain(n), [&](int64_t begin, int64_t end) {
        softmax_backward_plain_rows<T>(grad, y, grad_x, begin, end);
      });
    } else if (columns_side_by_side<T>(grad) && columns_side_by_side<T>(y) && columns_side_by_side<T>(grad_x)) {
      for_columns<T, Columns::kVectors, 3>({&y, &grad, &grad_x}, [&](const int64_t* offset, auto at) {
        Columns::run(data_of<T>(grad) + offset[1], row_stride(grad), data_of<T>(y) + offset[0], row_stride(y),
                     data_of<T>(grad_x) + offset[2], row_stride(grad_x), n, at);
      });
    } else {
      parallel_for(0, rows, row_grain(n), [&](int64_t begin, int64_t end) {
        softmax_backward_any_rows<Accumulator<T>>(grad, y, grad_x, begin, end);
      });
    }
  });
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
