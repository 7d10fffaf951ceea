// grad_z = grad * activation'(z), elementwise; z the preactivation. Written so that neither tail loses its relative
// precision: with s = sigmoid(z) and c = 1 - s = sigmoid(-z) both from e^-|z|,
//   sigmoid' = s c,   silu' = s (1 + z c),   tanh' = 4 s(2z) c(2z),   gelu_tanh' = s(2u) + 2 z u' s(2u) c(2u),
// u = sqrt(2 / pi) (z + 0.044715 z^3).
#include "ops/_rows.h"
#include "simd/math.h"

namespace isotile {
namespace ISOTILE_ISA {
namespace {

template <class V>
struct SigmoidPair {
  V s;
  V c;
};
template <class V>
ISOTILE_INLINE SigmoidPair<V> sigmoid_pair(V z) {
  const V one = V::set1(1);
  const V e = exp(-abs(z));
  const V high = one / (one + e);
  const V low = e * high;
  const auto negative = z < V::zero();
  return {select(negative, low, high), select(negative, high, low)};
}

// z, with 0 for an infinity: where it multiplies something that is 0 there.
template <class V>
ISOTILE_INLINE V finite_factor(V z) {
  return select(abs(z) == V::set1(__builtin_inff()), V::zero(), z);
}

struct ReluSlope {
  template <class V>
  ISOTILE_INLINE V operator()(V z) const {
    return select(is_nan(z), z, select(z > V::zero(), V::set1(1), V::zero()));
  }
};
struct GeluSlope {
  template <class V>
  ISOTILE_INLINE V operator()(V z) const {
    using A = typename V::Scalar;
    const V half = V::set1(A(0.5));
    const V cdf = fma(half, erf(z * V::set1(A(0.70710678118654752440))), half);
    const V density = exp(-(half * z * z)) * V::set1(A(0.39894228040143267794));
    return fma(finite_factor(z), density, cdf);
  }
};
struct GeluTanhSlope {
  template <class V>
  ISOTILE_INLINE V operator()(V z) const {
    using A = typename V::Scalar;
    // Beyond 25 the slope is 0 or 1 in every dtype, and so is what is found at 25; NaN passes both bounds.
    const V b = min(V::set1(25), max(V::set1(-25), z));
    const V b2 = b * b;
    const V twice = V::set1(A(2 * 0.79788456080286535588));
    const V inner = twice * b * fma(V::set1(A(0.044715)), b2, V::set1(1));
    const V slope = twice * fma(V::set1(A(3 * 0.044715)), b2, V::set1(1));
    const SigmoidPair<V> p = sigmoid_pair(inner);
    return fma(b * slope, p.s * p.c, p.s);
  }
};
struct SiluSlope {
  template <class V>
  ISOTILE_INLINE V operator()(V z) const {
    const SigmoidPair<V> p = sigmoid_pair(z);
    return p.s * fma(finite_factor(z), p.c, V::set1(1));
  }
};
struct SigmoidSlope {
  template <class V>
  ISOTILE_INLINE V operator()(V z) const {
    const SigmoidPair<V> p = sigmoid_pair(z);
    return p.s * p.c;
  }
};
struct TanhSlope {
  template <class V>
  ISOTILE_INLINE V operator()(V z) const {
    const SigmoidPair<V> p = sigmoid_pair(z + z);
    return V::set1(4) * p.s * p.c;
  }
};
struct UnitSlope {
  template <class V>
  ISOTILE_INLINE V operator()(V) const {
    return V::set1(1);
  }
};

template <class T, class Slope>
void multiply_by_slope(const TensorView& grad, const TensorView& z, const TensorView& grad_z, const Slope& slope) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  constexpr int64_t kPiece = 4096;  // a row may be long: it is split too
  const int64_t n = row_length(z);
  const int64_t pieces = (n + kPiece - 1) / kPiece;
  const bool fast = plain<T>(grad) && plain<T>(z) && plain<T>(grad_z);
  const bool stream = worth_streaming(grad_z);
  const int64_t piece_length = n < kPiece ? n : kPiece;
  parallel_for(0, row_count(z) * pieces, row_grain(4 * piece_length), [&](int64_t begin, int64_t end) {
    RowWalker<3> walk({&grad, &z, &grad_z}, begin / pieces);
    const Scratch<A> row_grad(fast ? 0 : kPiece), row_z(fast ? 0 : kPiece);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task % pieces * kPiece;
      if (first == 0 && task != begin) walk.next();
      const int64_t count = n - first < kPiece ? n - first : kPiece;
      if (!fast) {
        load_row(grad, walk.offset[0] + first * row_stride(grad), count, row_grad.data());
        load_row(z, walk.offset[1] + first * row_stride(z), count, row_z.data());
        for_lanes<A>(count, [&](auto at) {
          at.store(at.load(row_grad.data()) * slope(V(at.load(row_z.data()))), row_grad.data());
        });
        store_row(grad_z, walk.offset[2] + first * row_stride(grad_z), count, row_grad.data());
        continue;
      }
      const T* from = data_of<T>(grad) + walk.offset[0] + first;
      const T* at_z = data_of<T>(z) + walk.offset[1] + first;
      T* to = data_of<T>(grad_z) + walk.offset[2] + first;
      if (stream && aligned_for_stream(to)) {
        for_lanes<A>(count, [&](auto at) { at.stream(at.load(from) * slope(V(at.load(at_z))), to); });
      } else {
        for_lanes<A>(count, [&](auto at) { at.store(at.load(from) * slope(V(at.load(at_z))), to); });
      }
    }
    if (stream) stream_fence();
  });
}

}  // namespace

void matmul_epilogue_backward(const TensorView* t, const double* s) {
  if (row_count(t[1]) == 0 || row_length(t[1]) == 0) return;
  dispatch_float(t[1].dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    switch (static_cast<int>(s[0])) {
      case 0:
        return multiply_by_slope<T>(t[0], t[1], t[2], UnitSlope{});
      case 1:
        return multiply_by_slope<T>(t[0], t[1], t[2], ReluSlope{});
      case 2:
        return multiply_by_slope<T>(t[0], t[1], t[2], GeluSlope{});
      case 3:
        return multiply_by_slope<T>(t[0], t[1], t[2], GeluTanhSlope{});
      case 4:
        return multiply_by_slope<T>(t[0], t[1], t[2], SiluSlope{});
      case 5:
        return multiply_by_slope<T>(t[0], t[1], t[2], SigmoidSlope{});
      case 6:
        return multiply_by_slope<T>(t[0], t[1], t[2], TanhSlope{});
      default:
        fail("matmul_epilogue_backward: unknown activation");
    }
  });
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
