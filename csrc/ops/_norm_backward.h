// layer_norm and rms_norm backward, in one pass over memory. With h = (x - mean) * scale, w the weight and g the grad:
//   grad_x = scale * (w g - mean(w g) - h mean(w g h)) + grad_sum       (rms_norm: without mean(w g), mean = 0)
//   grad_weight = sum over rows of g h,  grad_bias = sum over rows of g
// The statistics are taken again from x. The sums over rows go by blocks of rows whose number depends on the shape
// alone, then over the blocks in order: the same bits with any number of threads.
#pragma once
#include "ops/_norm.h"

namespace isotile {
namespace ISOTILE_ISA {

struct NormBackward {
  const TensorView& grad;
  const TensorView& grad_sum;
  const TensorView& x;
  const TensorView& weight;
  const TensorView& grad_x;
  const TensorView& grad_weight;
  const TensorView& grad_bias;
};

// kRows rows at once, so that the weight and the sums over rows pass through the registers less often. grad_sum and
// grad_x may be null, for all rows alike; next_* are prefetched.
template <int kRows, class T>
struct BackwardRows {
  const T* grad[kRows];
  const T* grad_sum[kRows];
  const T* x[kRows];
  T* grad_x[kRows];
  const T* next_grad[kRows];
  const T* next_x[kRows];
};

// What each row gives does not depend on kRows.
template <bool kCentered, bool kParameters, int kRows, class T>
ISOTILE_INLINE void norm_backward_rows(const BackwardRows<kRows, T>& rows, const Accumulator<T>* weight,
                                       Accumulator<T>* grad_weight, Accumulator<T>* grad_bias, int64_t n, double eps,
                                       Reach reach) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  Normaliser<kCentered, A> normalise[kRows];
  for (int r = 0; r < kRows; ++r) {
    const T* to = rows.grad_x[r];
    normalise[r] = Normaliser<kCentered, A>(
        to && reach == Reach::kFar
            ? row_statistics<kCentered>(rows.x[r], n, eps, [to](auto at) { ask_output<Reach::kFar>(to + at.i); })
            : row_statistics<kCentered>(rows.x[r], n, eps, [](auto) {}));
  }
  const T* grads[kRows];  // copies: the stores below might change what `rows` refers to, for all the compiler knows
  const T* xs[kRows];
  for (int r = 0; r < kRows; ++r) {
    grads[r] = rows.grad[r];
    xs[r] = rows.x[r];
  }
  double sums[2 * kRows];
  row_reduce<A, 2 * kRows, 1>(n, sums, [&](auto at, V* s) {
    const V w = at.load(weight);
    V to_weight, to_bias;
    if constexpr (kParameters) {
      to_weight = at.load(grad_weight);
      if constexpr (kCentered) to_bias = at.load(grad_bias);
    }
    for (int r = 0; r < kRows; ++r) {
      const V g = at.load(grads[r]);
      const V h = normalise[r](at.load(xs[r]));
      const V wg = g * w;
      if constexpr (kCentered) s[2 * r] += wg;
      s[2 * r + 1] = fma(wg, h, s[2 * r + 1]);
      if constexpr (kParameters) {
        to_weight = fma(g, h, to_weight);
        if constexpr (kCentered) to_bias += g;
      }
    }
    if constexpr (kParameters) {
      at.store(to_weight, grad_weight);
      if constexpr (kCentered) at.store(to_bias, grad_bias);
    }
  });
  if (!rows.grad_x[0]) return;
  const double count = static_cast<double>(n);
  for (int r = 0; r < kRows; ++r) {
    const Normaliser<kCentered, A> normalise_row = normalise[r];
    const V mean_wg = V::set1(static_cast<A>(sums[2 * r] / count));
    const V mean_wgh = V::set1(static_cast<A>(sums[2 * r + 1] / count));
    const T* grad = rows.grad[r];
    const T* x = rows.x[r];
    const T* next_grad = rows.next_grad[r];
    const T* next_x = rows.next_x[r];
    const auto gradient = [=](auto at) {
      V d = at.load(grad) * at.load(weight);
      if constexpr (kCentered) d -= mean_wg;
      return fnma(normalise_row(at.load(x)), mean_wgh, d) * normalise_row.scale;
    };
    T* to = rows.grad_x[r];
    if (const T* grad_sum = rows.grad_sum[r]) {
      for_lanes<A>(n, [=](auto at) { at.store(gradient(at) + at.load(grad_sum), to); });
      continue;
    }
    with_reach(reach, to, [&](auto reached) {
      constexpr Reach kReach = decltype(reached)::value;
      for_lanes<A>(n, [=](auto at) {
        ask_next<kReach>(next_grad + at.i);
        ask_next<kReach>(next_x + at.i);
        write_lanes<kReach>(at, gradient(at), to);
      });
    });
  }
}

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRowsTogether = 4;  // 27 of 32 registers
#else
constexpr int kRowsTogether = 2;
#endif

template <bool kCentered, bool kParameters, class T>
void norm_backward_plain_rows(const NormBackward& a, const Accumulator<T>* weight, Accumulator<T>* grad_weight,
                              Accumulator<T>* grad_bias, double eps, Reach reach, int64_t begin, int64_t end) {
  constexpr int kRows = kRowsTogether;
  const int64_t n = row_length(a.x);
  using Walker = RowWalker<4>;
  Walker walk({&a.grad, &a.grad_sum, &a.x, &a.grad_x}, begin);
  const auto point = [&](auto& rows, int r, const typename Walker::Offsets& offset) {
    rows.grad[r] = data_of<T>(a.grad) + offset.at[0];
    rows.grad_sum[r] = a.grad_sum.present() ? data_of<T>(a.grad_sum) + offset.at[1] : nullptr;
    rows.x[r] = data_of<T>(a.x) + offset.at[2];
    rows.grad_x[r] = a.grad_x.present() ? data_of<T>(a.grad_x) + offset.at[3] : nullptr;
  };
  int64_t row = begin;
  BackwardRows<kRows, T> group;
  if (row + kRows <= end) {
    for (int r = 0; r < kRows; ++r) point(group, r, walk.step());
  }
  while (row + kRows <= end) {
    BackwardRows<kRows, T> following = group;
    const bool more = row + 2 * kRows <= end;
    for (int r = 0; r < kRows; ++r) {
      if (more) point(following, r, walk.step());
      group.next_grad[r] = following.grad[r];
      group.next_x[r] = following.x[r];
    }
    norm_backward_rows<kCentered, kParameters>(group, weight, grad_weight, grad_bias, n, eps, reach);
    group = following;
    row += kRows;
  }
  for (; row < end; ++row) {
    BackwardRows<1, T> one;
    point(one, 0, walk.step());
    one.next_grad[0] = one.grad[0];
    one.next_x[0] = one.x[0];
    norm_backward_rows<kCentered, kParameters>(one, weight, grad_weight, grad_bias, n, eps, reach);
  }
  if (reach == Reach::kPast) stream_fence();
}

// Any strides and mixed dtypes: rows go through contiguous accumulators.
template <bool kCentered, class A>
void norm_backward_any_rows(const NormBackward& a, const A* weight, A* grad_weight, A* grad_bias, double eps,
                            int64_t begin, int64_t end) {
  const int64_t n = row_length(a.x);
  RowWalker<4> walk({&a.grad, &a.grad_sum, &a.x, &a.grad_x}, begin);
  Scratch<A> grad(n), grad_sum(a.grad_sum.present() ? n : 0), x(n), grad_x(n);
  const BackwardRows<1, A> one = {{grad.data()},   {grad_sum.data()}, {x.data()},
                                  {grad_x.data()}, {grad.data()},     {x.data()}};
  for (int64_t row = begin; row < end; ++row, walk.next()) {
    load_row(a.grad, walk.offset[0], n, grad.data());
    if (a.grad_sum.present()) load_row(a.grad_sum, walk.offset[1], n, grad_sum.data());
    load_row(a.x, walk.offset[2], n, x.data());
    norm_backward_rows<kCentered, true>(one, weight, grad_weight, grad_bias, n, eps, Reach::kNear);
    if (a.grad_x.present()) store_row(a.grad_x, walk.offset[3], n, grad_x.data());
  }
}

// to = the sum over blocks of partials[block * block_stride + ...], in order.
template <class A>
void merge_blocks(const TensorView& to, const A* partials, int64_t blocks, int64_t block_stride, int64_t n) {
  using V = Vec<A>;
  if (!to.present()) return;
  if (blocks == 1) return store_row(to, 0, n, partials);
  Scratch<A> total(n);
  parallel_for(0, n, 4096, [&](int64_t begin, int64_t end) {
    for_lanes<A>(end - begin, [&](auto at) {
      V sum = V::zero();
      for (int64_t block = 0; block < blocks; ++block) sum += at.load(partials + block * block_stride + begin);
      at.store(sum, total.data() + begin);
    });
  });
  store_row(to, 0, n, total.data());
}

template <bool kCentered>
ISOTILE_INLINE void norm_backward(const NormBackward& a, double eps, double weight_offset) {
  const int64_t rows = row_count(a.x), n = row_length(a.x);
  if (n == 0) return;
  dispatch_float(a.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    using A = Accumulator<T>;
    const bool fast = plain<T>(a.grad) && plain<T>(a.grad_sum) && plain<T>(a.x) && plain<T>(a.grad_x);
    const bool parameters = a.grad_weight.present() || a.grad_bias.present() || !fast;
    const Parameter<A> weight(a.weight, n, weight_offset, 1);
    const Reach reach = reach_of(a.x, 3);

    constexpr int64_t kPartialBytes = int64_t{4} << 20;  // each block's sums are cleared, and read once more
    const int64_t block_stride = (2 * n + 63) / 64 * 64;
    int64_t most_blocks = kPartialBytes / (block_stride * static_cast<int64_t>(sizeof(A)));
    most_blocks = most_blocks < 8 ? 8 : most_blocks > 128 ? 128 : most_blocks;
    const int64_t spread = (rows + most_blocks - 1) / most_blocks;
    const int64_t least_rows = spread > row_grain(n) ? spread : row_grain(n);
    const int64_t block_rows =
        least_rows > 1 ? (least_rows + kRowsTogether - 1) / kRowsTogether * kRowsTogether : least_rows;
    const int64_t blocks = (rows + block_rows - 1) / block_rows;
    const Scratch<A> partials(parameters ? blocks * block_stride : 0);
    parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * block_rows;
        const int64_t end = rows - begin < block_rows ? rows : begin + block_rows;
        if (!parameters) {
          norm_backward_plain_rows<kCentered, false, T>(a, weight.data(), nullptr, nullptr, eps, reach, begin, end);
          continue;
        }
        A* grad_weight = partials.data() + block * block_stride;
        A* grad_bias = grad_weight + n;
        for_lanes<A>(2 * n, [&](auto at) { at.store(Vec<A>::zero(), grad_weight); });
        if (fast) {
          norm_backward_plain_rows<kCentered, true, T>(a, weight.data(), grad_weight, grad_bias, eps, reach, begin,
                                                       end);
        } else {
          norm_backward_any_rows<kCentered, A>(a, weight.data(), grad_weight, grad_bias, eps, begin, end);
        }
      }
    });
    merge_blocks(a.grad_weight, partials.data(), blocks, block_stride, n);
    merge_blocks(a.grad_bias, partials.data() + n, blocks, block_stride, n);
  });
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
