// out = softmax(score(q . k)) v, lse = log sum exp(score): blocked over keys with a running maximum (online softmax,
// Milakov & Gimelshein 2018; blocked as FlashAttention, Dao et al. 2022). Nothing of size sq x sk is kept.
//
// A task is one batch entry, one key/value head and up to kMaxRows rows (see _attention.h). It packs each block of keys
// once, then takes six rows at a time through scores, exponentials and the product with v while they are in L1. Blocks
// of keys begin at fixed multiples of a size that depends on the head dims only, and skipping hidden keys adds nothing,
// so a row's result depends neither on the other rows nor on the number of threads.
#include "ops/_attention.h"

namespace isotile::ISOTILE_ISA {
namespace attention_detail {
namespace {

constexpr int64_t kMaxRows = 192;

template <class T>
int64_t forward_block_keys(int64_t d, int64_t dv) {
  const int64_t bytes_per_key = (d + dv) * static_cast<int64_t>(sizeof(typename Packed<T>::Elem));
  int64_t keys = 192;
  while (keys > 48 && keys * bytes_per_key > (400 << 10)) keys /= 2;
  return keys;
}

// One row's step over a block: score[c0, c1) -> probabilities (relative to the new maximum, exponent of 2), dropped and
// rounded into `weights`. Returns the factor for what was summed before.
template <class T>
Accumulator<T> softmax_step(const Problem& p, const Row& row, int64_t b, int64_t k0, int64_t c0, int64_t c1, Accumulator<T>* score,
                            Accumulator<T>* keep, typename Packed<T>::Elem* weights, Accumulator<T>* maximum,
                            Accumulator<T>* sum) {
  using A = Accumulator<T>;
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
    if constexpr (Packed<T>::kPair == 1) {
      w.store(weights + i);
    } else {
      w.store(reinterpret_cast<BFloat16*>(weights) + i);
    }
  }
  const A correction = exp2_scalar(old - base);
  *maximum = now;
  *sum = *sum * correction + reduce_add(total);
  return correction;
}

template <class T>
struct ForwardTask {
  using P = Packed<T>;
  using A = typename P::Acc;
  using W = typename P::Word;

  const Problem& p;
  const TensorView &out, &lse;
  int64_t block;  // keys in a block

  void run(int64_t b, int64_t kv_head, int64_t first, int64_t count) const {
    const Group group(p, b, kv_head);
    const int64_t padded = round_up(count, kTileRows);
    const int64_t d_words = row_words<T>(p.d), d_used = (p.d + P::kPair - 1) / P::kPair, v_columns = row_lanes<T>(p.dv),
                  v_words = row_words<T>(p.dv);
    Arena arena;
    W *q, *natural, *kt, *v, *weights;
    A *o, *scores, *keep;
    Outcasts<T> bad;
    const auto cut = [&] {
      q = arena.take<W>(padded * d_words);
      natural = arena.take<W>(block * max64(d_words, v_words));
      kt = arena.take<W>(round_up(block, panel_width<T>()) * d_used);
      v = arena.take<W>(block * v_columns);
      weights = arena.take<W>(P::kPair == 1 ? 0 : kTileRows * block / P::kPair);
      o = arena.take<A>(padded * v_columns);
      scores = arena.take<A>(kTileRows * block);
      keep = arena.take<A>(block);
      bad.values = arena.take<A>(bad.elements(block, max64(v_words, v_columns)));
    };
    cut();
    const Scratch<char> memory(arena.used);
    arena = {memory.data(), 0};
    cut();
    Row rows[kMaxRows];
    A maximum[kMaxRows], sum[kMaxRows];
    int64_t lo = p.sk, hi = 0;
    for (int64_t r = 0; r < padded; ++r) {
      if (r >= count) {
        rows[r] = rows[count - 1];
        rows[r].lo = rows[r].hi = 0;
        maximum[r] = sum[r] = 0;
        continue;
      }
      rows[r] = group.row(first + r);
      maximum[r] = -static_cast<A>(__builtin_inf());
      sum[r] = 0;
      if (p.sinks) {
        const A sink = static_cast<A>(float_at(*p.sinks, rows[r].head * p.sinks->stride[0]) * kLog2E);
        if (sink != maximum[r]) {
          maximum[r] = sink;
          sum[r] = 1 + (sink - sink);  // NaN for what is not finite
        }
      }
      if (rows[r].hi > rows[r].lo) {
        lo = min64(lo, rows[r].lo);
        hi = max64(hi, rows[r].hi);
      }
    }
    gather_rows<T>(group.queries_of<T>(*p.q), first, count, padded, p.d, q, d_words);
    for (int64_t i = 0; i < padded * v_columns; ++i) o[i] = 0;
    const RowSource<T> key_rows = group.keys_of<T>(*p.k), value_rows = group.keys_of<T>(*p.v);
    for (int64_t k0 = lo < hi ? lo / block * block : hi; k0 < hi; k0 += block) {
      const int64_t n = min64(block, hi - k0), n_padded = round_up(n, lanes<T>());
      gather_rows<T>(key_rows, k0, n, n_padded, p.d, natural, d_words);
      transpose_panels<T>(natural, n_padded, d_words, d_used, kt);
      W* value_natural = P::kPair == 1 ? v : natural;
      gather_rows<T>(value_rows, k0, n, n_padded, p.dv, value_natural, v_words);
      bad.collect(value_natural, n_padded, v_words, value_natural);
      if constexpr (P::kPair == 2) pair_rows(natural, n_padded, v_words, v, v_columns);
      for (int64_t s = 0; s < padded; s += kTileRows) {
        int64_t from = n, to = 0;
        for (int64_t r = s; r < s + kTileRows; ++r) {
          if (rows[r].hi <= rows[r].lo) continue;
          from = min64(from, max64(rows[r].lo - k0, 0));
          to = max64(to, min64(rows[r].hi - k0, n));
        }
        if (from >= to) continue;
        const int64_t c0 = from / lanes<T>() * lanes<T>(), c1 = round_up(to, lanes<T>());
        tile_panels<T>(q + s * d_words, d_words, kt, d_used, c0, c1, scores, block);
        A correction[kTileRows];
        W* strip_weights = P::kPair == 1 ? reinterpret_cast<W*>(scores) : weights;
        for (int64_t r = 0; r < kTileRows; ++r) {
          typename P::Elem* w = reinterpret_cast<typename P::Elem*>(strip_weights) + r * block;
          correction[r] = softmax_step<T>(p, rows[s + r], b, k0, c0, c1, scores + r * block, keep, w, maximum + s + r,
                                          sum + s + r);
        }
        tile_rows<T, Start::kScale>(strip_weights + c0 / P::kPair, block / P::kPair, 1, v + c0 / P::kPair * v_columns, v_columns,
                                    (c1 - c0) / P::kPair, v_columns, o + s * v_columns, v_columns, correction);
        if (!bad.any) continue;
        for (int64_t r = 0; r < kTileRows; ++r) {
          for (int64_t j = c0; j < min64(c1, n); ++j) {
            if (!visible(p, rows[s + r], k0 + j)) continue;
            bad.add(j, natural_at<T>(strip_weights, block / P::kPair, r, j), o + (s + r) * v_columns, p.dv);
          }
        }
      }
    }
    const RowSource<T> out_rows = group.queries_of<T>(out);
    for (int64_t r = 0; r < count; ++r) {
      const A factor = sum[r] == 0 ? A{0} : static_cast<A>(p.keep_scale) / sum[r];
      T* to = const_cast<T*>(out_rows.row(first + r));
      const A* acc = o + r * v_columns;
      for (int64_t i = 0; i < p.dv; i += Vec<A>::kLanes) {
        const Vec<A> x = Vec<A>::load(acc + i) * Vec<A>::set1(factor);
        const int left = static_cast<int>(min64(Vec<A>::kLanes, p.dv - i));
        if (out_rows.stride_col == 1) {
          x.store(to + i, left);
        } else {
          x.store_strided(to + i * out_rows.stride_col, out_rows.stride_col, left);
        }
      }
      if (lse.present()) set_float(lse, group.row_offset(lse, rows[r]), row_lse(rows[r], maximum[r], sum[r]));
    }
  }

  double row_lse(const Row& row, A maximum, A sum) const {
    if (sum == 0) return -__builtin_inf();
    if (p.sinks && sum == 1) {
      const double sink = float_at(*p.sinks, row.head * p.sinks->stride[0]);
      if (maximum == static_cast<A>(sink * kLog2E)) return sink;  // nothing visible beside it: exactly the sink
    }
    return static_cast<double>(maximum) * kLn2 + __builtin_log(static_cast<double>(sum));
  }
};

template <class T>
void forward(const Problem& p, const TensorView& out, const TensorView& lse) {
  if (p.batch * p.hk * p.rows == 0) return;
  const ForwardTask<T> task{p, out, lse, forward_block_keys<T>(p.d, p.dv)};
  int64_t rows = kMaxRows;
  while (rows > 48 && p.batch * p.hk * ((p.rows + rows - 1) / rows) < 4 * num_threads()) rows /= 2;
  const int64_t pieces = (p.rows + rows - 1) / rows;
  parallel_dynamic(p.batch * p.hk * pieces, [&](int64_t i) {
    const int64_t piece = pieces - 1 - i % pieces, head = i / pieces;  // causal: the longest first
    task.run(head / p.hk, head % p.hk, piece * rows, min64(rows, p.rows - piece * rows));
  });
}

}  // namespace
}  // namespace attention_detail

void attention(const TensorView* t, const double* s) {
  const attention_detail::Problem p = attention_detail::read_problem(t, s);
  dispatch_float(t[0].dtype, [&](auto type) {
    attention_detail::forward<typename decltype(type)::type>(p, t[8], t[9]);
  });
}

}  // namespace isotile::ISOTILE_ISA
