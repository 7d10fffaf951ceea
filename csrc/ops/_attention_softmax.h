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

// One row's step over a block: score[c0, c1) -> probabilities (relative to the new maximum, exponent of 2), dropped and
// rounded into `weights`
// (which may be `score`). Returns the factor for what was summed before.
template <class A, class Weight>
A softmax_step(const Problem& p, const Row& row, int64_t b, int64_t k0, int64_t c0, int64_t c1, A* score, A* keep,
               Weight* weights, A* maximum, A* sum) {
  using V = Vec<A>;
  const A inf = static_cast<A>(__builtin_inf());
  finish_scores<A>(p, row, k0, c0, c1, score, nullptr);
  V most = V::set1(-inf);
  for (int64_t i = c0; i < c1; i += V::kLanes) most = max(most, V::load(score + i));
  const A factor = static_cast<A>(p.exp2_factor), here = reduce_max(most) * factor;
  const A old = *maximum, now = here > old || here != here ? here : old;
  const A base = now == -inf ? A{0} : now;
  const V vfactor = V::set1(factor), vbase = V::set1(-base);
  V total = V::zero();
  const bool drop = p.drop_below != 0;
  if (drop) draw_keep<A>(p, row, b, k0, c0, c1, keep);
  for (int64_t i = c0; i < c1; i += V::kLanes) {
    V w = exp2(fma(V::load(score + i), vfactor, vbase));
    total = total + w;
    if (drop) w = w * V::load(keep + i);
    store_weights(w, weights + i);
  }
  const A correction = old == base ? A{1} : exp2_scalar(old - base);
  *maximum = now;
  *sum = *sum * correction + reduce_add(total);
  return correction;
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
