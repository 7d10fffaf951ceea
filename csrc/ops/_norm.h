// layer_norm and rms_norm forward. One row at a time; the row is read again from the caches rather than kept in
// float. Mean and variance: sums of deviations and of their squares from a value near the mean (Chan, Golub, LeVeque,
// "Algorithms for computing the sample variance", 1983). The first guess is the mean of the row's first vector; if it
// turns out more than a standard deviation off, a second pass is made about the mean that the first one gave.
#pragma once
#include "ops/_rows.h"

namespace isotile {
namespace ISOTILE_ISA {

// x is normalised as (x - center) * scale + shift; center and shift are 0 for rms_norm.
template <class A>
struct RowStatistics {
  A center;
  A scale;
  A shift;
};

// The same in registers: a scalar in memory might be what a store changes, and would be read again for each vector.
template <bool kCentered, class A>
struct Normaliser {
  using V = Vec<A>;
  V center, scale, shift;

  Normaliser() = default;
  ISOTILE_INLINE explicit Normaliser(const RowStatistics<A>& row)
      : center(V::set1(row.center)), scale(V::set1(row.scale)), shift(V::set1(row.shift)) {}
  ISOTILE_INLINE V operator()(V x) const { return kCentered ? fma(x - center, scale, shift) : x * scale; }
};

// `also(at)` is run along the first pass.
template <bool kCentered, class T, class Also>
ISOTILE_INLINE RowStatistics<Accumulator<T>> row_statistics(const T* x, int64_t n, double eps, const Also& also) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const double count = static_cast<double>(n);
  if constexpr (!kCentered) {
    double squares[1];
    row_reduce<A, 1>(n, squares, [x, also](auto at, V* sums) {
      also(at);
      const V v = at.load(x);
      sums[0] = fma(v, v, sums[0]);
    });
    return {A(0), static_cast<A>(1.0 / __builtin_sqrt(squares[0] / count + eps)), A(0)};
  } else {
    const int64_t head = n < V::kLanes ? n : V::kLanes;
    A center = reduce_add(V::load(x, head)) / static_cast<A>(head);
    double rest, variance;
    for (int pass = 0; pass < 2; ++pass) {
      const V m = V::set1(center);
      double moments[2];
      row_reduce<A, 2>(n, moments, [x, m, also](auto at, V* sums) {
        also(at);
        const V d = at.load(x) - m;
        sums[0] += d;
        sums[1] = fma(d, d, sums[1]);
      });
      rest = moments[0] / count;
      variance = moments[1] / count - rest * rest;
      // Little cancellation; or the guess was the mean already, and rest is its rounding.
      if (rest * rest <= variance || pass == 1) break;
      center = static_cast<A>(center + rest);
    }
    if (variance < 0) variance = 0;
    const double scale = 1.0 / __builtin_sqrt(variance + eps);
    return {center, static_cast<A>(scale), static_cast<A>(-rest * scale)};
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

template <bool kCentered, bool kAffine, Reach kReach, class T>
ISOTILE_INLINE void norm_row(const T* x, const T* next_x, T* y, const Accumulator<T>* weight,
                             const Accumulator<T>* bias, int64_t n, double eps) {
  using V = Vec<Accumulator<T>>;
  const auto row = row_statistics<kCentered>(x, n, eps, [y](auto at) { ask_output<kReach>(y + at.i); });
  const Normaliser<kCentered, Accumulator<T>> normalise(row);
  for_lanes<Accumulator<T>>(n, [=](auto at) {
    ask_next<kReach>(next_x + at.i);
    V v = normalise(at.load(x));
    if constexpr (kAffine) v = fma(v, at.load(weight), at.load(bias));
    write_lanes<kReach>(at, v, y);
  });
}

// sum = x + residual, rounded to T.
template <class T>
ISOTILE_INLINE void add_rows(const T* x, const T* residual, T* sum, int64_t n) {
  for_lanes<Accumulator<T>>(n, [&](auto at) { at.store(at.load(x) + at.load(residual), sum); });
}

template <bool kCentered, bool kAffine, class T>
void norm_plain_rows(const NormForward& a, const Accumulator<T>* weight, const Accumulator<T>* bias, double eps,
                     Reach reach, int64_t begin, int64_t end) {
  const int64_t n = row_length(a.y);
  RowWalker<4> walk({&a.x, &a.residual, &a.y, &a.sum}, begin);
  RowsAhead<1> ahead({&a.x}, begin, end);
  Scratch<T> unwanted_sum(a.residual.present() && !a.sum.present() ? n : 0);
  for (int64_t row = begin; row < end; ++row) {
    const auto offset = walk.step();
    const T* x = data_of<T>(a.x) + offset.at[0];
    const T* next_x = data_of<T>(a.x) + ahead.step({{offset.at[0]}}).at[0];
    T* y = data_of<T>(a.y) + offset.at[2];
    if (a.residual.present()) {
      T* sum = a.sum.present() ? data_of<T>(a.sum) + offset.at[3] : unwanted_sum.data();
      add_rows(x, data_of<T>(a.residual) + offset.at[1], sum, n);
      x = sum;
    }
    with_reach(reach, y, [&](auto r) {
      norm_row<kCentered, kAffine, decltype(r)::value>(x, next_x, y, weight, bias, n, eps);
    });
  }
  if (reach == Reach::kPast) stream_fence();
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
    norm_row<kCentered, true, Reach::kNear>(x.data(), x.data(), y.data(), weight, bias, n, eps);
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
    const Reach reach = reach_of(a.y, 2);
    parallel_for(0, rows, row_grain(n), [&](int64_t begin, int64_t end) {
      if (!fast) {
        norm_any_rows<kCentered, A>(a, weight.data(), bias.data(), eps, begin, end);
      } else if (affine) {
        norm_plain_rows<kCentered, true, T>(a, weight.data(), bias.data(), eps, reach, begin, end);
      } else {
        norm_plain_rows<kCentered, false, T>(a, nullptr, nullptr, eps, reach, begin, end);
      }
    });
  });
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
