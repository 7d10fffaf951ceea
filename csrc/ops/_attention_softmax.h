// The forward pass of one row: where it starts, one step over a block of scores, and what it leaves.
#pragma once
#include "ops/_attention.h"

namespace isotile::ISOTILE_ISA::attention_detail {

// The maximum (an exponent of 2) and the sum before any key: nothing, or the sink.
template <class A>
ISOTILE_INLINE void start_row(const Problem& p, const Row& row, A* maximum, A* sum) {
  *maximum = -static_cast<A>(__builtin_inf());
  *sum = 0;
  if (!p.sinks) return;
  const A sink = static_cast<A>(float_at(*p.sinks, row.head * p.sinks->stride[0]) * kLog2E);
  if (sink == *maximum) return;
  *maximum = sink;
  *sum = 1 + (sink - sink);  // NaN for what is not finite
}

// Two vectors of weights as the next product takes them.
template <class A, class Weight>
ISOTILE_INLINE void store_weight_pair(Vec<A> x, Vec<A> y, Weight* to) {
#if ISOTILE_HAS_BF16_DOT
  if constexpr (sizeof(Weight) == 2) {
    _mm512_storeu_si512(to, (__m512i)_mm512_cvtne2ps_pbh(y.v, x.v));
    return;
  }
#endif
  store_weights(x, to);
  store_weights(y, to + Vec<A>::kLanes);
}

// Lane r: the sum, or the maximum, of the vector at v + r * kLanes, for r < rows.
template <class A, class Combine, class Reduce>
ISOTILE_INLINE Vec<A> reduce_each(const A* v, int64_t rows, const Combine& combine, const Reduce& reduce) {
  using V = Vec<A>;
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    V vectors[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) vectors[i] = V::load(v + (i < rows ? i : 0) * 16);
    return combine_16(vectors, combine);
  }
#endif
  (void)combine;
  alignas(64) A out[V::kLanes] = {};
  for (int64_t r = 0; r < rows; ++r) out[r] = reduce(V::load(v + r * V::kLanes));
  return V::load(out);
}
template <class A>
ISOTILE_INLINE Vec<A> reduce_each_add(const A* v, int64_t rows) {
  return reduce_each(v, rows, [](Vec<A> a, Vec<A> b) { return a + b; }, [](Vec<A> a) { return reduce_add(a); });
}
template <class A>
ISOTILE_INLINE Vec<A> reduce_each_max(const A* v, int64_t rows) {
  return reduce_each(v, rows, [](Vec<A> a, Vec<A> b) { return max(a, b); }, [](Vec<A> a) { return reduce_max(a); });
}

constexpr int64_t kSoftmaxRows = 64;  // at most, in one step

// What a step works with: one vector for each row, then one number for each row.
template <class A>
struct SoftmaxStep {
  alignas(64) A partial[kSoftmaxRows * Vec<A>::kLanes];
  alignas(64) A base[kSoftmaxRows], factor[kSoftmaxRows];  // factor: for what was summed before
};

// A step of `rows` rows over a block: score[row * score_row + (c0 .. c1)] -> probabilities (relative to the new
// maximum, exponents of 2), dropped and rounded into weights[row * weight_row + ...] (which may be the scores). The
// order of a row's sums depends on its columns alone.
template <class A, class Weight>
void softmax_step(const Problem& p, const Row* row, int64_t rows, int64_t b, int64_t k0, int64_t c0, int64_t c1,
                  A* score, int64_t score_row, A* keep, Weight* weights, int64_t weight_row, A* maximum, A* sum,
                  SoftmaxStep<A>* step) {
  using V = Vec<A>;
  constexpr int64_t kLanes = V::kLanes, kPair = 2 * kLanes;
  const V hidden = V::set1(-static_cast<A>(__builtin_inf()));
  for (int64_t r = 0; r < rows; ++r) {
    A* s = score + r * score_row;
    finish_scores<A>(p, row[r], k0, c0, c1, s, nullptr);
    V most[4] = {hidden, hidden, hidden, hidden};
    int64_t i = c0;
    for (; i + 4 * kLanes <= c1; i += 4 * kLanes) {
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) most[u] = max(most[u], V::load(s + i + u * kLanes));
    }
    for (; i < c1; i += kLanes) most[0] = max(most[0], V::load(s + i));
    max(max(most[0], most[1]), max(most[2], most[3])).store(step->partial + r * kLanes);
  }
  const V vfactor = V::set1(static_cast<A>(p.exp2_factor));
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t left = min64(rows - r, kLanes);
    const V here = reduce_each_max<A>(step->partial + r * kLanes, left) * vfactor, old = V::load(maximum + r, left);
    const V now = select((here > old) | is_nan(here), here, old);
    const V base = select(now == hidden, V::zero(), now);
    now.store(maximum + r, left);
    base.store(step->base + r, left);
    select(old == base, V::set1(1), exp2_or_zero(old - base)).store(step->factor + r, left);
  }
  const bool drop = p.drop_below != 0;
  for (int64_t r = 0; r < rows; ++r) {
    const A* s = score + r * score_row;
    Weight* to = weights + r * weight_row;
    const V base = V::set1(-step->base[r]);
    V total[2] = {V::zero(), V::zero()};  // of the even and the odd vectors
    if (drop) draw_keep<A>(p, row[r], b, k0, c0, c1, keep);
    const auto weigh = [&](int64_t at, V* total_of) {
      V w = exp2_or_zero(fma(V::load(s + at), vfactor, base));
      *total_of = *total_of + w;
      if (drop) w = w * V::load(keep + at);
      return w;
    };
    int64_t i = c0;
    if (i % kPair != 0) {
      store_weights(weigh(i, &total[1]), to + i);
      i += kLanes;
    }
    for (; i + kPair <= c1; i += kPair) {
      const V w = weigh(i, &total[0]);
      store_weight_pair(w, weigh(i + kLanes, &total[1]), to + i);
    }
    if (i < c1) store_weights(weigh(i, &total[0]), to + i);
    (total[0] + total[1]).store(step->partial + r * kLanes);
  }
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t left = min64(rows - r, kLanes);
    fma(V::load(sum + r, left), V::load(step->factor + r, left), reduce_each_add<A>(step->partial + r * kLanes, left))
        .store(sum + r, left);
  }
}

template <class A>
double row_lse(const Problem& p, const Row& row, A maximum, A sum) {
  if (sum == 0) return -__builtin_inf();
  if (p.sinks && sum == 1) {
    const double sink = float_at(*p.sinks, row.head * p.sinks->stride[0]);
    if (maximum == static_cast<A>(sink * kLog2E)) return sink;  // nothing visible beside it: exactly the sink
  }
  return static_cast<double>(maximum) * kLn2 + __builtin_log(static_cast<double>(sum));
}

// Whether a row sees no key at all: its result is 0 then, whatever its sink.
ISOTILE_INLINE bool sees_nothing(const Problem& p, const Row& row) {
  for (int64_t key = row.lo; key < row.hi; ++key) {
    if (mask_shows(p, row, key)) return false;
  }
  return true;
}

// Row r of the group: out = o / sum, and lse.
template <class T>
void finish_row(const Problem& p, const Group& group, const Row& row, int64_t r, Accumulator<T> maximum,
                Accumulator<T> sum, const Accumulator<T>* o, const TensorView& out, const TensorView& lse) {
  using V = Vec<Accumulator<T>>;
  const RowSource<T> out_rows = group.queries_of<T>(out);
  // With a sink that is not finite the sum is NaN even of no terms.
  const bool nothing = sum == 0 || (sum != sum && sees_nothing(p, row));
  const V factor = V::set1(nothing ? 0 : static_cast<Accumulator<T>>(p.keep_scale) / sum);
  T* to = const_cast<T*>(out_rows.row(r));
  for (int64_t i = 0; i < p.dv; i += V::kLanes) {
    const V x = nothing ? V::zero() : V::load(o + i) * factor;
    const int64_t left = min64(V::kLanes, p.dv - i);
    if (out_rows.stride_col == 1) {
      x.store(to + i, left);
    } else {
      x.store_strided(to + i * out_rows.stride_col, out_rows.stride_col, left);
    }
  }
  if (lse.present()) set_float(lse, group.row_offset(lse, row), row_lse(p, row, maximum, sum));
}

}  // namespace isotile::ISOTILE_ISA::attention_detail
