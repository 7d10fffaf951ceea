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

// Pointers of one row; grad_sum, grad_x and the two accumulators may be null.
template <class T>
struct NormBackwardRow {
  const T* grad;
  const T* grad_sum;
  const T* x;
  T* grad_x;
};

template <bool kCentered, bool kParameters, class T>
ISOTILE_INLINE void norm_backward_row(const NormBackwardRow<T>& row, const Accumulator<T>* weight,
                                      Accumulator<T>* grad_weight, Accumulator<T>* grad_bias, int64_t n, double eps,
                                      bool stream) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const auto statistics = row_statistics<kCentered>(row.x, n, eps);
  const V mean = V::set1(statistics.mean), rest = V::set1(statistics.mean_rest), scale = V::set1(statistics.scale);
  double sums[2];
  row_reduce<A, 2, 2>(n, sums, [&](auto at, V* s) {
    const V g = at.load(row.grad);
    const V h = (at.load(row.x) - mean - rest) * scale;
    const V wg = g * at.load(weight);
    if constexpr (kCentered) s[0] += wg;
    s[1] = fma(wg, h, s[1]);
    if constexpr (kParameters) {
      at.store(fma(g, h, at.load(grad_weight)), grad_weight);
      if constexpr (kCentered) at.store(at.load(grad_bias) + g, grad_bias);
    }
  });
  if (!row.grad_x) return;
  const double count = static_cast<double>(n);
  const V mean_wg = V::set1(static_cast<A>(sums[0] / count));
  const V mean_wgh = V::set1(static_cast<A>(sums[1] / count));
  const auto gradient = [&](auto at) {
    const V h = (at.load(row.x) - mean - rest) * scale;
    V d = at.load(row.grad) * at.load(weight);
    if constexpr (kCentered) d -= mean_wg;
    return fnma(h, mean_wgh, d) * scale;
  };
  if (row.grad_sum) {
    for_lanes<A>(n, [&](auto at) { at.store(gradient(at) + at.load(row.grad_sum), row.grad_x); });
  } else if (stream && aligned_for_stream(row.grad_x)) {
    for_lanes<A>(n, [&](auto at) { at.stream(gradient(at), row.grad_x); });
  } else {
    for_lanes<A>(n, [&](auto at) { at.store(gradient(at), row.grad_x); });
  }
}

template <bool kCentered, bool kParameters, class T>
void norm_backward_plain_rows(const NormBackward& a, const Accumulator<T>* weight, Accumulator<T>* grad_weight,
                              Accumulator<T>* grad_bias, double eps, bool stream, int64_t begin, int64_t end) {
  RowWalker<4> walk({&a.grad, &a.grad_sum, &a.x, &a.grad_x}, begin);
  for (int64_t row = begin; row < end; ++row, walk.next()) {
    const NormBackwardRow<T> pointers = {
        data_of<T>(a.grad) + walk.offset[0],
        a.grad_sum.present() ? data_of<T>(a.grad_sum) + walk.offset[1] : nullptr,
        data_of<T>(a.x) + walk.offset[2],
        a.grad_x.present() ? data_of<T>(a.grad_x) + walk.offset[3] : nullptr,
    };
    norm_backward_row<kCentered, kParameters>(pointers, weight, grad_weight, grad_bias, row_length(a.x), eps, stream);
  }
  if (stream) stream_fence();
}

// Any strides and mixed dtypes: rows go through contiguous accumulators.
template <bool kCentered, class A>
void norm_backward_any_rows(const NormBackward& a, const A* weight, A* grad_weight, A* grad_bias, double eps,
                            int64_t begin, int64_t end) {
  const int64_t n = row_length(a.x);
  RowWalker<4> walk({&a.grad, &a.grad_sum, &a.x, &a.grad_x}, begin);
  Scratch<A> grad(n), grad_sum(a.grad_sum.present() ? n : 0), x(n), grad_x(n);
  for (int64_t row = begin; row < end; ++row, walk.next()) {
    load_row(a.grad, walk.offset[0], n, grad.data());
    if (a.grad_sum.present()) load_row(a.grad_sum, walk.offset[1], n, grad_sum.data());
    load_row(a.x, walk.offset[2], n, x.data());
    const NormBackwardRow<A> pointers = {grad.data(), grad_sum.data(), x.data(), grad_x.data()};
    norm_backward_row<kCentered, true>(pointers, weight, grad_weight, grad_bias, n, eps, false);
    if (a.grad_x.present()) store_row(a.grad_x, walk.offset[3], n, grad_x.data());
  }
}

// to = the sum over blocks of partials[block * block_stride + ...], in order.
template <class A>
void merge_blocks(const TensorView& to, const A* partials, int64_t blocks, int64_t block_stride, int64_t n) {
  using V = Vec<A>;
  if (!to.present()) return;
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
    const bool stream = worth_streaming(a.grad_x);

    constexpr int64_t kPartialBytes = int64_t{16} << 20;
    const int64_t block_stride = (2 * n + 63) / 64 * 64;
    int64_t most_blocks = kPartialBytes / (block_stride * static_cast<int64_t>(sizeof(A)));
    most_blocks = most_blocks < 8 ? 8 : most_blocks > 128 ? 128 : most_blocks;
    const int64_t spread = (rows + most_blocks - 1) / most_blocks;
    const int64_t block_rows = spread > row_grain(n) ? spread : row_grain(n);
    const int64_t blocks = (rows + block_rows - 1) / block_rows;
    const Scratch<A> partials(parameters ? blocks * block_stride : 0);
    parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; ++block) {
        const int64_t begin = block * block_rows;
        const int64_t end = rows - begin < block_rows ? rows : begin + block_rows;
        if (!parameters) {
          norm_backward_plain_rows<kCentered, false, T>(a, weight.data(), nullptr, nullptr, eps, stream, begin, end);
          continue;
        }
        A* grad_weight = partials.data() + block * block_stride;
        A* grad_bias = grad_weight + n;
        for_lanes<A>(2 * n, [&](auto at) { at.store(Vec<A>::zero(), grad_weight); });
        if (fast) {
          norm_backward_plain_rows<kCentered, true, T>(a, weight.data(), grad_weight, grad_bias, eps, stream, begin,
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
