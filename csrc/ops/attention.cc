// out = softmax(score(q . k)) v, lse = log sum exp(score): blocked over keys with a running maximum (online softmax,
// Milakov & Gimelshein 2018; blocked as FlashAttention, Dao et al. 2022). Nothing of size sq x sk is kept.
//
// A task is one batch entry, one key/value head and up to kMaxRows rows (see _attention.h). It packs each block of keys
// once, then takes six rows at a time through scores, exponentials and the product with v while they are in L1. Blocks
// of keys begin at fixed multiples of a size that depends on the head dims only, and skipping hidden keys adds nothing,
// so a row's result depends neither on the other rows nor on the number of threads.
#include <type_traits>

#include "ops/_attention.h"
#include "ops/_attention_decode.h"
#include "ops/_attention_softmax.h"

namespace isotile::ISOTILE_ISA {
namespace attention_detail {
namespace {

template <class T>
constexpr int64_t max_rows() {
  return Packed<T>::kTiles ? 512 : 192;
}

template <class T>
int64_t forward_block_keys(int64_t d, int64_t dv) {
  const int64_t bytes_per_key = (d + dv) * static_cast<int64_t>(sizeof(typename Packed<T>::Elem));
  if (Packed<T>::kTiles && d + dv <= 128) return 256;
  int64_t keys = 384;
  const int64_t fewest = Packed<T>::kTiles ? 96 : 48;  // a multiple of kColumns
  while (keys > fewest && keys * bytes_per_key > (200 << 10)) keys /= 2;
  return keys;
}

template <class T>
struct ForwardTask {
  using P = Packed<T>;
  using A = typename P::Acc;
  using W = typename P::Word;
  using Weight = std::conditional_t<P::kPair == 1, A, BFloat16>;
  static constexpr int64_t kMaxRows = max_rows<T>();
  static constexpr int64_t kRowUnit = P::kTiles ? 16 : P::kStrip;  // the last strip may be shorter by these

  const Problem& p;
  const TensorView &out, &lse;
  int64_t block;  // keys in a block

  void run(int64_t b, int64_t kv_head, int64_t first, int64_t count) const {
    const Group group(p, b, kv_head);
    const int64_t padded = round_up(count, kRowUnit);
    const int64_t d_words = row_words<T>(p.d), d_used = depth_words<T>(p.d), v_columns = row_lanes<T>(p.dv),
                  v_words = row_words<T>(p.dv);
    Arena arena;
    W *q, *natural, *kt, *v, *weights;
    A *o, *scores, *keep;
    SoftmaxStep<A>* step;
    Outcasts<T> bad;
    const auto cut = [&] {
      q = arena.take<W>(padded * d_words);
      natural = arena.take<W>(block * max64(d_words, v_words));
      kt = arena.take<W>(round_up(block, panel_width<T>()) * d_used);
      v = arena.take<W>(block * v_columns);
      weights = arena.take<W>(P::kPair == 1 ? 0 : P::kStrip * block / P::kPair);
      o = arena.take<A>(padded * v_columns);
      scores = arena.take<A>(P::kStrip * block);
      keep = arena.take<A>(block);
      step = arena.take<SoftmaxStep<A>>(1);
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
      start_row<A>(p, rows[r], maximum + r, sum + r);
      if (rows[r].hi > rows[r].lo) {
        lo = min64(lo, rows[r].lo);
        hi = max64(hi, rows[r].hi);
      }
    }
    gather_rows<T>(group.queries_of<T>(*p.q), first, count, padded, p.d, q, d_words);
    for (int64_t i = 0; i < padded * v_columns; ++i) o[i] = 0;
    const ProductScope<T> scope;
    const RowSource<T> key_rows = group.keys_of<T>(*p.k), value_rows = group.keys_of<T>(*p.v);
    for (int64_t k0 = lo < hi ? lo / block * block : hi; k0 < hi; k0 += block) {
      const int64_t n = min64(block, hi - k0), n_padded = round_up(n, P::kColumns);
      transpose_panels<T>(packed_rows<T>(key_rows, k0, n, n_padded, p.d, natural, d_words), n_padded, d_words, d_used,
                          kt);
      W* value_natural = P::kPair == 1 ? v : natural;
      const W* values = packed_rows<T>(value_rows, k0, n, n_padded, p.dv, value_natural, v_words);
      values = bad.collect(values, n_padded, v_words, value_natural);
      if constexpr (P::kPair == 2) {
        pair_rows(values, n_padded, v_words, v, v_columns);
        values = v;
      }
      for (int64_t s = 0; s < padded; s += P::kStrip) {
        const int64_t strip = min64(P::kStrip, padded - s);
        int64_t from = n, to = 0;
        for (int64_t r = s; r < s + strip; ++r) {
          if (rows[r].hi <= rows[r].lo) continue;
          from = min64(from, max64(rows[r].lo - k0, 0));
          to = max64(to, min64(rows[r].hi - k0, n));
        }
        if (from >= to) continue;
        const int64_t c0 = from / P::kColumns * P::kColumns, c1 = round_up(to, P::kColumns);
        strip_panels<T>(strip, q + s * d_words, d_words, kt, d_used, c0, c1, scores, block);
        W* strip_weights = P::kPair == 1 ? reinterpret_cast<W*>(scores) : weights;
        softmax_step<A>(p, rows + s, strip, b, k0, c0, c1, scores, block, keep,
                        reinterpret_cast<Weight*>(strip_weights), block, maximum + s, sum + s, step);
        strip_rows<T, Start::kScale>(strip, strip_weights + c0 / P::kPair, block / P::kPair,
                                     values + c0 / P::kPair * v_columns, (c1 - c0) / P::kPair, v_columns,
                                     o + s * v_columns, v_columns, step->factor);
        if (!bad.any) continue;
        for (int64_t r = 0; r < strip; ++r) {
          for (int64_t j = c0; j < min64(c1, n); ++j) {
            if (!visible(p, rows[s + r], k0 + j)) continue;
            bad.add(j, natural_at<T>(strip_weights, block / P::kPair, r, j), o + (s + r) * v_columns, p.dv);
          }
        }
      }
    }
    for (int64_t r = 0; r < count; ++r)
      finish_row<T>(p, group, rows[r], first + r, maximum[r], sum[r], o + r * v_columns, out, lse);
  }
};

template <class T>
void forward(const Problem& p, const TensorView& out, const TensorView& lse) {
  if (p.batch * p.hk * p.rows == 0) return;
  if (decodes<T>(p)) return decode<T>(p, out, lse);
  const ForwardTask<T> task{p, out, lse, forward_block_keys<T>(p.d, p.dv)};
  int64_t rows = max_rows<T>();
  while (rows > 48 && p.batch * p.hk * ((p.rows + rows - 1) / rows) < 4 * num_threads()) rows /= 2;
  const int64_t pieces = (p.rows + rows - 1) / rows;
  run_tasks(p, p.batch * p.hk * pieces, [&](int64_t i) {
    const int64_t piece = pieces - 1 - i % pieces, head = i / pieces;  // causal: the longest first
    task.run(head / p.hk, head % p.hk, piece * rows, min64(rows, p.rows - piece * rows));
  });
}

}  // namespace
}  // namespace attention_detail

void attention(const TensorView* t, const double* s) {
  const attention_detail::Problem p = attention_detail::read_problem(t, s);
  dispatch_float(t[0].dtype,
                 [&](auto type) { attention_detail::forward<typename decltype(type)::type>(p, t[8], t[9]); });
}

}  // namespace isotile::ISOTILE_ISA
