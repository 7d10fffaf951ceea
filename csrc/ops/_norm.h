// layer_norm and rms_norm forward. One row at a time; the row is read again from the caches rather than kept in
// float. Mean and variance: corrected two-pass (Chan, Golub, LeVeque, "Algorithms for computing the sample variance",
// 1983): the second pass is about a rounded mean m, and its sum of deviations gives what m lacks.
#pragma once
#include "ops/_rows.h"

namespace isotile {
namespace ISOTILE_ISA {

// x is normalised as (x - mean - mean_rest) * scale; both means are 0 for rms_norm.
template <class A>
struct RowStatistics {
  A mean;
  A mean_rest;
  A scale;
};

template <bool kCentered, class T>
ISOTILE_INLINE RowStatistics<Accumulator<T>> row_statistics(const T* x, int64_t n, double eps) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const double count = static_cast<double>(n);
  if constexpr (!kCentered) {
    double squares[1];
    row_reduce<A, 1>(n, squares, [x](auto at, V* sums) {
      const V v = at.load(x);
      sums[0] = fma(v, v, sums[0]);
    });
    return {A(0), A(0), static_cast<A>(1.0 / __builtin_sqrt(squares[0] / count + eps))};
  } else {
    double total[1];
    row_reduce<A, 1>(n, total, [x](auto at, V* sums) { sums[0] += at.load(x); });
    const A mean = static_cast<A>(total[0] / count);
    const V m = V::set1(mean);
    double moments[2];
    row_reduce<A, 2>(n, moments, [x, m](auto at, V* sums) {
      const V d = at.load(x) - m;
      sums[0] += d;
      sums[1] = fma(d, d, sums[1]);
    });
    const double rest = moments[0] / count;
    double variance = moments[1] / count - rest * rest;
    if (variance < 0) variance = 0;
    return {mean, static_cast<A>(rest), static_cast<A>(1.0 / __builtin_sqrt(variance + eps))};
  }
}

struct NormForward {
  const TensorView& x;
  const TensorView& residual;
  const TensorView& weight;
  const TensorView& bias;
  const TensorView& y;
  const TensorView& sum;
};

template <bool kAffine, bool kStream, class T>
ISOTILE_INLINE void write_normalised(const T* x, T* y, const Accumulator<T>* weight, const Accumulator<T>* bias,
                                     int64_t n, const RowStatistics<Accumulator<T>>& row) {
  using V = Vec<Accumulator<T>>;
  const V mean = V::set1(row.mean), rest = V::set1(row.mean_rest), scale = V::set1(row.scale);
  for_lanes<Accumulator<T>>(n, [&](auto at) {
    V v = (at.load(x) - mean - rest) * scale;
    if constexpr (kAffine) v = fma(v, at.load(weight), at.load(bias));
    if constexpr (kStream) {
      at.stream(v, y);
    } else {
      at.store(v, y);
    }
  });
}

// sum = x + residual, rounded to T.
template <class T>
ISOTILE_INLINE void add_rows(const T* x, const T* residual, T* sum, int64_t n) {
  for_lanes<Accumulator<T>>(n, [&](auto at) { at.store(at.load(x) + at.load(residual), sum); });
}

template <bool kCentered, bool kAffine, class T>
void norm_plain_rows(const NormForward& a, const Accumulator<T>* weight, const Accumulator<T>* bias, double eps,
                     bool stream, int64_t begin, int64_t end) {
  const int64_t n = row_length(a.y);
  RowWalker<4> walk({&a.x, &a.residual, &a.y, &a.sum}, begin);
  Scratch<T> unwanted_sum(a.residual.present() && !a.sum.present() ? n : 0);
  for (int64_t row = begin; row < end; ++row, walk.next()) {
    const T* x = data_of<T>(a.x) + walk.offset[0];
    T* y = data_of<T>(a.y) + walk.offset[2];
    if (a.residual.present()) {
      T* sum = a.sum.present() ? data_of<T>(a.sum) + walk.offset[3] : unwanted_sum.data();
      add_rows(x, data_of<T>(a.residual) + walk.offset[1], sum, n);
      x = sum;
    }
    const auto statistics = row_statistics<kCentered>(x, n, eps);
    if (stream && aligned_for_stream(y)) {
      write_normalised<kAffine, true>(x, y, weight, bias, n, statistics);
    } else {
      write_normalised<kAffine, false>(x, y, weight, bias, n, statistics);
    }
  }
  if (stream) stream_fence();
}

// Any strides and mixed dtypes: rows go through contiguous accumulators.
template <bool kCentered, class A>
void norm_any_rows(const NormForward& a, const A* weight, const A* bias, double eps, int64_t begin, int64_t end) {
  const int64_t n = row_length(a.y);
  RowWalker<4> walk({&a.x, &a.residual, &a.y, &a.sum}, begin);
  Scratch<A> x(n), y(n);
  for (int64_t row = begin; row < end; ++row, walk.next()) {
    load_row(a.x, walk.offset[0], n, x.data());
    if (a.residual.present()) {
      load_row(a.residual, walk.offset[1], n, y.data());
      add_rows(x.data(), y.data(), x.data(), n);
      dispatch_float(a.x.dtype, [&](auto type) {  // the norm is of the sum as rounded to x's dtype
        for (int64_t i = 0; i < n; ++i) {
          typename decltype(type)::type rounded;
          from_accumulator(x[i], &rounded);
          x[i] = static_cast<A>(to_accumulator(rounded));
        }
      });
      if (a.sum.present()) store_row(a.sum, walk.offset[3], n, x.data());
    }
    write_normalised<true, false>(x.data(), y.data(), weight, bias, n, row_statistics<kCentered>(x.data(), n, eps));
    store_row(a.y, walk.offset[2], n, y.data());
  }
}

template <bool kCentered>
ISOTILE_INLINE void norm_forward(const NormForward& a, double eps, double weight_offset) {
  const int64_t rows = row_count(a.y), n = row_length(a.y);
  if (rows == 0 || n == 0) return;
  dispatch_float(a.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const bool fast = plain<T>(a.x) && plain<T>(a.residual) && plain<T>(a.y) && plain<T>(a.sum);
    const bool affine = a.weight.present() || a.bias.present() || !fast;
    const Parameter<A> weight(a.weight, affine ? n : 0, weight_offset, 1);
    const Parameter<A> bias(a.bias, affine ? n : 0, 0, 0);
    const bool stream = worth_streaming(a.y);
    parallel_for(0, rows, row_grain(n), [&](int64_t begin, int64_t end) {
      if (!fast) {
        norm_any_rows<kCentered, A>(a, weight.data(), bias.data(), eps, begin, end);
      } else if (affine) {
        norm_plain_rows<kCentered, true, T>(a, weight.data(), bias.data(), eps, stream, begin, end);
      } else {
        norm_plain_rows<kCentered, false, T>(a, nullptr, nullptr, eps, stream, begin, end);
      }
    });
  });
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
