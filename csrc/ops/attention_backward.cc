// Gradients of attention. With p = exp(score - lse), w = p kept / (1 - dropout), and D = rowsum(grad_out * out) -
// grad_lse:
//   grad_v = w^T grad_out          g = p (kept / (1 - dropout) (grad_out . v) - D)       grad_mask = g
//   z = g * d(score)/d(scale q.k)  grad_q = scale z k     grad_k = scale z^T q           grad_sink = -sum exp(sink -
//   lse) D
// Probabilities are computed again from lse, so memory stays linear in the sequence length (FlashAttention-2, Dao
// 2023).
//
// The work is cut into tiles of up to row_block() rows by a block of keys. There are two schedules: one pass in which a
// task is a key/value head and makes everything (5 products a tile), and, where there are too few heads for the
// threads, two passes, over blocks of keys for grad_k and grad_v and over blocks of rows for grad_q (7 products a
// tile). Tiles, and the order in which they are added, are the same in both, so the results are bitwise equal.
//
// On matrix tiles (tile.h) w and z are wanted in pairs of rows as the right-hand side, so grad_k and grad_v are made
// transposed: grad_v^T = grad_out^T w, grad_k^T = q^T z.
#include "ops/_attention.h"

namespace isotile::ISOTILE_ISA {
namespace attention_detail {
namespace {

template <class T>
constexpr int64_t row_block() {
  return Packed<T>::kTiles ? 128 : 96;
}

template <class T>
int64_t backward_block_keys(int64_t d, int64_t dv) {
  const int64_t bytes_per_key = (d + dv) * static_cast<int64_t>(sizeof(Accumulator<T>));
  if (Packed<T>::kTiles) return d + dv <= 256 ? 256 : 128;
  int64_t keys = 192;
  while (keys > 48 && keys * bytes_per_key > (200 << 10)) keys /= 2;
  return keys;
}

template <class T>
struct BackwardProblem {
  Problem p;
  const TensorView &grad_out, &grad_lse, &out, &lse, &grad_q, &grad_k, &grad_v, &grad_mask;
  int64_t block;
};

// D of `count` rows from row `first`, and lse as an exponent of 2.
template <class T>
void row_terms(const BackwardProblem<T>& bp, const Group& group, int64_t first, int64_t count, Accumulator<T>* d_term,
               Accumulator<T>* lse2) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  const Problem& p = bp.p;
  const RowSource<T> grad_rows = group.queries_of<T>(bp.grad_out), out_rows = group.queries_of<T>(bp.out);
  for (int64_t r = 0; r < count; ++r) {
    const T *g = grad_rows.row(first + r), *o = out_rows.row(first + r);
    V sum = V::zero();
    for (int64_t i = 0; i < p.dv; i += V::kLanes) {
      const int left = static_cast<int>(min64(V::kLanes, p.dv - i));
      const V a = grad_rows.stride_col == 1 ? V::load(g + i, left)
                                            : V::load_strided(g + i * grad_rows.stride_col, grad_rows.stride_col, left);
      const V b = out_rows.stride_col == 1 ? V::load(o + i, left)
                                           : V::load_strided(o + i * out_rows.stride_col, out_rows.stride_col, left);
      sum = fma(a, b, sum);
    }
    const Row row = group.row(first + r);
    d_term[r] = reduce_add(sum);
    if (bp.grad_lse.present()) d_term[r] -= static_cast<A>(float_at(bp.grad_lse, group.row_offset(bp.grad_lse, row)));
    lse2[r] = static_cast<A>(float_at(bp.lse, group.row_offset(bp.lse, row)) * kLog2E);
  }
}

// Working memory of one task, and the tile.
template <class T>
struct BackwardTask {
  using P = Packed<T>;
  using A = typename P::Acc;
  using W = typename P::Word;
  using V = Vec<A>;
  static constexpr int kStrip = P::kTiles ? 32 : kTileRows;
  static constexpr int64_t kRowBlock = row_block<T>();
  static constexpr int64_t kOverhang = P::kTiles ? 0 : kTileRows;  // the last tile of keys reads and adds past them

  const BackwardProblem<T>& bp;
  const Problem& p;
  const Group group;
  const int64_t block, block_row;  // keys in a block; width of a row of probabilities, with room for a tile's overhang
  const int64_t d_used, d_words, d_columns, v_used, v_words, v_columns;
  W *k_natural, *k_rows, *kt, *v_natural, *vt;  // the block of keys
  W *q_natural, *q_rows, *g_natural, *g_rows;   // the block of rows; g is grad_out
  W *q_cleaned, *g_cleaned;
  const W *k_operand, *q_operand, *g_operand;  // as the right-hand side of a product, finite
  A *score, *grad, *keep, *slope;              // one strip of rows
  W *weights, *z_rows, *z_strip;               // w and z: all rows (in pairs), z of the strip
  A *grad_k, *grad_v;                          // accumulators of the block of keys, transposed with kTiles
  A* turned;                                   // 16 keys of them
  Scratch<char> memory;
  Row rows[kRowBlock];
  int64_t keys_from = 0, keys_count = 0, rows_from = 0, rows_count = 0, rows_padded = 0;
  Outcasts<T> k_bad, q_bad, g_bad;

  BackwardTask(const BackwardProblem<T>& problem, int64_t b, int64_t kv_head)
      : bp(problem),
        p(problem.p),
        group(problem.p, b, kv_head),
        block(problem.block),
        block_row(problem.block + 16),
        d_used(depth_words<T>(p.d)),
        d_words(row_words<T>(p.d)),
        d_columns(row_lanes<T>(p.d)),
        v_used(depth_words<T>(p.dv)),
        v_words(row_words<T>(p.dv)),
        v_columns(row_lanes<T>(p.dv)),
        memory(cut(nullptr)) {
    cut(memory.data());
  }

  int64_t cut(char* base) {
    Arena arena{base, 0};
    k_natural = arena.take<W>(block * d_words);
    k_rows = arena.take<W>(P::kPair == 1 ? 0 : block / 2 * d_columns);
    kt = arena.take<W>(round_up(block, panel_width<T>()) * d_used);
    v_natural = arena.take<W>(block * v_words);
    vt = arena.take<W>(round_up(block, panel_width<T>()) * v_used);
    q_natural = arena.take<W>(kRowBlock * d_words);
    q_rows = arena.take<W>(P::kPair == 1 ? 0 : kRowBlock / 2 * d_columns);
    g_natural = arena.take<W>(kRowBlock * v_words);
    g_rows = arena.take<W>(P::kPair == 1 ? 0 : kRowBlock / 2 * v_columns);
    score = arena.take<A>(kStrip * block);
    grad = arena.take<A>(kStrip * block);
    keep = arena.take<A>(block);
    slope = arena.take<A>(block);
    weights = arena.take<W>(kRowBlock / P::kPair * block_row);
    z_rows = arena.take<W>(kRowBlock / P::kPair * block_row);
    z_strip = arena.take<W>(P::kPair == 1 ? 0 : kStrip * block / 2);
    grad_k = arena.take<A>((block + kOverhang) * d_columns);
    grad_v = arena.take<A>((block + kOverhang) * v_columns);
    turned = arena.take<A>(P::kTiles ? 16 * max64(d_columns, v_columns) : 0);
    q_cleaned = arena.take<W>(kRowBlock * d_words);
    g_cleaned = arena.take<W>(kRowBlock * v_words);
    k_bad.values = arena.take<A>(k_bad.elements(block, d_words));
    q_bad.values = arena.take<A>(q_bad.elements(kRowBlock, d_words));
    g_bad.values = arena.take<A>(g_bad.elements(kRowBlock, v_words));
    return arena.used;
  }

  void load_keys(int64_t k0, bool for_queries) {
    keys_from = k0;
    keys_count = max64(0, min64(block, group.keys - k0));
    const int64_t padded = round_up(keys_count, P::kColumns);
    const W* keys = packed_rows<T>(group.keys_of<T>(*p.k), k0, keys_count, padded, p.d, k_natural, d_words);
    transpose_panels<T>(keys, padded, d_words, d_used, kt);
    const W* values = packed_rows<T>(group.keys_of<T>(*p.v), k0, keys_count, padded, p.dv, v_natural, v_words);
    transpose_panels<T>(values, padded, v_words, v_used, vt);
    if (!for_queries) return;
    k_operand = k_bad.collect(keys, padded, d_words, k_natural);
    if constexpr (P::kPair == 2) {
      pair_rows(k_operand, padded, d_words, k_rows, d_columns);
      k_operand = k_rows;
    }
  }

  void load_rows(int64_t r0, bool for_keys) {
    rows_from = r0;
    rows_count = min64(kRowBlock, p.rows - r0);
    rows_padded = round_up(rows_count, kStrip);
    for (int64_t r = 0; r < rows_padded; ++r) {
      rows[r] = group.row(r0 + min64(r, rows_count - 1));
      if (r >= rows_count) rows[r].lo = rows[r].hi = 0;
    }
    gather_rows<T>(group.queries_of<T>(*p.q), r0, rows_count, rows_padded, p.d, q_natural, d_words);
    gather_rows<T>(group.queries_of<T>(bp.grad_out), r0, rows_count, rows_padded, p.dv, g_natural, v_words);
    if (!for_keys) return;
    q_operand = q_bad.collect(q_natural, rows_padded, d_words, q_cleaned);
    g_operand = g_bad.collect(g_natural, rows_padded, v_words, g_cleaned);
    if constexpr (P::kPair == 2) {
      pair_rows(q_operand, rows_padded, d_words, q_rows, d_columns);
      pair_rows(g_operand, rows_padded, v_words, g_rows, v_columns);
      q_operand = q_rows;
      g_operand = g_rows;
    }
#if ISOTILE_HAS_TILES
    if constexpr (P::kTiles) {
      turn_words(q_rows, rows_padded / 2, d_columns, q_cleaned);
      turn_words(g_rows, rows_padded / 2, v_columns, g_cleaned);
      q_operand = q_cleaned;
      g_operand = g_cleaned;
    }
#endif
  }
#if ISOTILE_HAS_TILES
  // [rows, columns] words -> [columns, rows]; both multiples of 16.
  static void turn_words(const uint32_t* from, int64_t row_count, int64_t columns, uint32_t* to) {
    for (int64_t r = 0; r < row_count; r += 16) {
      for (int64_t c = 0; c < columns; c += 16) {
        transpose_16x16(from + r * columns + c, columns, to + c * row_count + r, row_count);
      }
    }
  }
#endif

  // Keys [from, to) of the block, relative, that rows [first, last) of the row block see, mask apart.
  ISOTILE_INLINE void seen_keys(int64_t first, int64_t last, int64_t* from, int64_t* to) const {
    *from = keys_count;
    *to = 0;
    for (int64_t r = first; r < last; ++r) {
      const int64_t lo = max64(rows[r].lo - keys_from, 0), hi = min64(rows[r].hi - keys_from, keys_count);
      if (lo >= hi) continue;
      *from = min64(*from, lo);
      *to = max64(*to, hi);
    }
  }

  // One row of the strip: score and grad (= grad_out . v) over [c0, c1) -> w in score, z in grad.
  void row_gradients(const Row& row, int64_t c0, int64_t c1, A* s, A* g, A d_term, A lse2, bool grad_mask_too) {
    const bool drop = p.drop_below != 0, capped = p.softcap != 0;
    finish_scores<A>(p, row, keys_from, c0, c1, s, capped ? slope : nullptr);
    if (drop) draw_keep<A>(p, row, group.b, keys_from, c0, c1, keep);
    const V hidden = V::set1(-static_cast<A>(__builtin_inf())), factor = V::set1(static_cast<A>(p.exp2_factor));
    const V minus_lse = V::set1(-lse2), d = V::set1(d_term), scale_up = V::set1(static_cast<A>(p.keep_scale));
    for (int64_t i = c0; i < c1; i += V::kLanes) {
      const V x = V::load(s + i);
      const auto gone = x == hidden;
      V prob = exp2_or_zero(fma(x, factor, minus_lse)), back = V::load(g + i), w = prob;
      if (drop) {
        const V kept = V::load(keep + i) * scale_up;
        w = w * kept;
        back = back * kept;
      }
      V z = prob * (back - d);
      select(gone, V::zero(), w).store(s + i);
      select(gone, V::zero(), z).store(g + i);
    }
    if (grad_mask_too) store_grad_mask(row, c0, c1, g);
    if (capped) {
      for (int64_t i = c0; i < c1; i += V::kLanes) {
        const V z = V::load(g + i);
        select(z == V::zero(), z, z * V::load(slope + i)).store(g + i);
      }
    }
  }

  void store_grad_mask(const Row& row, int64_t c0, int64_t c1, const A* g) const {
    const TensorView& view = bp.grad_mask;
    const int nb = p.batch_dims;
    const int64_t stride = view.stride[nb + 2], n = min64(c1, keys_count) - c0;
    const int64_t offset = batch_offset(view, nb, group.b) + row.head * view.stride[nb] +
                           row.query * view.stride[nb + 1] + (keys_from + c0) * stride;
    dispatch_float(view.dtype, [&](auto type) {
      using M = typename decltype(type)::type;
      M* to = static_cast<M*>(view.data) + offset;
      for (int64_t i = 0; i < n; i += V::kLanes) {
        const int left = static_cast<int>(min64(V::kLanes, n - i));
        if (stride == 1) {
          V::load(g + c0 + i, left).store(to + i, left);
        } else {
          V::load(g + c0 + i, left).store_strided(to + i * stride, stride, left);
        }
      }
    });
  }

  ISOTILE_INLINE A weight_at(const W* buffer, int64_t r, int64_t j) const {
    if constexpr (P::kPair == 1) {
      return buffer[r * block_row + j];
    } else {
      return to_float(BFloat16{static_cast<uint16_t>(buffer[r / 2 * block_row + j] >> (r % 2 * 16))});
    }
  }

  // The tile of the loaded rows and keys. grad_q: accumulator of the rows, or null. d_term, lse2: of the rows.
  void tile_gradients(const A* d_term, const A* lse2, A* grad_q, bool keys_too) {
    const int64_t n_padded = round_up(keys_count, P::kColumns);
    for (int64_t s = 0; s < rows_padded; s += kStrip) {
      int64_t from, to;
      seen_keys(s, s + kStrip, &from, &to);
      int64_t c0 = 0, c1 = 0;
      if (from < to) {
        c0 = from / P::kColumns * P::kColumns;
        c1 = round_up(to, P::kColumns);
        strip_panels<T>(kStrip, q_natural + s * d_words, d_words, kt, d_used, c0, c1, score, block);
        strip_panels<T>(kStrip, g_natural + s * v_words, v_words, vt, v_used, c0, c1, grad, block);
        for (int64_t r = 0; r < kStrip; ++r) {
          const bool real = s + r < rows_count;
          if (real) {
            row_gradients(rows[s + r], c0, c1, score + r * block, grad + r * block, d_term[s + r], lse2[s + r],
                          grad_q && bp.grad_mask.present());
          } else {
            for (int64_t i = c0; i < c1; ++i) score[r * block + i] = grad[r * block + i] = 0;
          }
        }
      }
      place(score, s, c0, c1, n_padded, weights, nullptr);
      place(grad, s, c0, c1, n_padded, z_rows, z_strip);
      if (grad_q && from < to) {
        const W* z = P::kPair == 1 ? z_rows + s * block_row + c0 : z_strip + c0 / P::kPair;
        strip_rows<T, Start::kAdd>(kStrip, z, P::kPair == 1 ? block_row : block / 2,
                                   k_operand + c0 / P::kPair * d_columns, (c1 - c0) / P::kPair, d_columns,
                                   grad_q + s * d_columns, d_columns, nullptr);
        for (int64_t r = s; k_bad.any && r < min64(s + kStrip, rows_count); ++r) {
          for (int64_t j = from; j < to; ++j) {
            if (visible(p, rows[r], keys_from + j)) k_bad.add(j, weight_at(z_rows, r, j), grad_q + r * d_columns, p.d);
          }
        }
      }
    }
    if (!keys_too) return;
    // What one tile of keys is seen by: rows [first, last), since lo and hi never fall.
    constexpr int64_t kKeys = P::kTiles ? 32 : kTileRows, kWords = P::kPair * P::kDepth;
    for (int64_t j = 0; j < keys_count; j += kKeys) {
      int64_t first = 0, last = rows_count;
      while (first < last && rows[first].hi <= keys_from + j) ++first;
      while (last > first && rows[last - 1].lo >= keys_from + j + kKeys) --last;
      if (first == last) continue;
      first = first / kWords * P::kDepth;
      last = (last + kWords - 1) / kWords * P::kDepth;
      accumulate_keys(weights, g_operand, g_bad, v_columns, p.dv, j, first, last, grad_v);
      accumulate_keys(z_rows, q_operand, q_bad, d_columns, p.d, j, first, last, grad_k);
    }
  }

  // A tile of keys from j: to += weights^T operand (with kTiles: to^T += operand^T weights), over words [first, last)
  // of rows.
  void accumulate_keys(const W* weight, const W* operand, const Outcasts<T>& bad, int64_t columns, int64_t used,
                       int64_t j, int64_t first, int64_t last, A* to) const {
    constexpr int64_t kKeys = P::kTiles ? 32 : kTileRows;
#if ISOTILE_HAS_TILES
    if constexpr (P::kTiles) {
      const int64_t words = rows_padded / 2;
      tile_product<true>(columns, 32, operand + first, 4 * words, weight + first * block_row + j, 4 * block_row, 64,
                         (last - first) / 16, to + j, 4 * block);
    }
#endif
    if constexpr (!P::kTiles) {
      tile_rows<T, Start::kAdd>(weight + first * block_row + j, 1, block_row, operand + first * columns, columns,
                                last - first, columns, to + j * columns, columns, nullptr);
    }
    if (!bad.any) return;
    for (int64_t r = first * P::kPair; r < min64(last * P::kPair, rows_count); ++r) {
      for (int64_t c = j; c < min64(j + kKeys, keys_count); ++c) {
        if (!visible(p, rows[r], keys_from + c)) continue;
        bad.add(r, weight_at(weight, r, c), P::kTiles ? to + c : to + c * columns, used, P::kTiles ? block : 1);
      }
    }
  }

  // Strip s of w or z into the buffer of all rows (0 outside [c0, c1)), and, as bf16, row by row into `strip`.
  void place(const A* from, int64_t s, int64_t c0, int64_t c1, int64_t n_padded, W* all, W* strip) const {
    const int64_t filled = n_padded + kOverhang;
    if constexpr (P::kPair == 1) {
      for (int64_t r = 0; r < kStrip; ++r) {
        A* to = all + (s + r) * block_row;
        for (int64_t i = 0; i < c0; ++i) to[i] = 0;
        for (int64_t i = c0; i < c1; i += V::kLanes) V::load(from + r * block + i).store(to + i);
        for (int64_t i = c1; i < filled; ++i) to[i] = 0;
      }
    } else {
      for (int64_t r = 0; r < kStrip; r += 2) {
        W* to = all + (s + r) / 2 * block_row;
        BFloat16* x = strip ? reinterpret_cast<BFloat16*>(strip) + r * block : nullptr;
        for (int64_t i = 0; i < c0; ++i) to[i] = 0;
        for (int64_t i = c0; i < c1; i += V::kLanes) {
          store_pair(V::load(from + r * block + i), V::load(from + (r + 1) * block + i), to + i, x ? x + i : nullptr,
                     block);
        }
        for (int64_t i = c1; i < filled; ++i) to[i] = 0;
      }
    }
  }
#if ISOTILE_HAS_BF16_DOT
  // The words (a, b) of two rows, and, unless `row` is null, each of them there and `row_stride` elements further on.
  static ISOTILE_INLINE void store_pair(V a, V b, W* pairs, BFloat16* row, int64_t row_stride) {
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(b.v, a.v);
    if (row) {
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row), _mm512_castsi512_si256(both));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(row + row_stride), _mm512_extracti64x4_epi64(both, 1));
    }
    const __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(both));
    const __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(both, 1));
    _mm512_storeu_si512(pairs, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
  }
#endif

  // Rows [r0, r0 + count) of a gradient from its accumulator.
  void store_rows(const TensorView& view, const RowSource<T>& to, const A* from, int64_t columns, int64_t used,
                  int64_t r0, int64_t count, A factor) const {
    if (!view.present()) return;
    const V scale = V::set1(factor);
    for (int64_t r = 0; r < count; ++r) {
      T* row = const_cast<T*>(to.row(r0 + r));
      for (int64_t i = 0; i < used; i += V::kLanes) {
        const V x = V::load(from + r * columns + i) * scale;
        const int left = static_cast<int>(min64(V::kLanes, used - i));
        if (to.stride_col == 1) {
          x.store(row + i, left);
        } else {
          x.store_strided(row + i * to.stride_col, to.stride_col, left);
        }
      }
    }
  }
  void store_keys(int64_t k0) const {
    const int64_t count = min64(block, p.sk - k0);
    if (bp.grad_k.present())
      store_block(bp.grad_k, grad_k, d_columns, p.d, k0, count, static_cast<A>(p.scale));
    if (bp.grad_v.present()) store_block(bp.grad_v, grad_v, v_columns, p.dv, k0, count, A{1});
  }
  void store_block(const TensorView& view, const A* from, int64_t columns, int64_t used, int64_t k0, int64_t count,
                   A factor) const {
    const RowSource<T> to = group.keys_of<T>(view);
#if ISOTILE_HAS_TILES
    if constexpr (P::kTiles) {
      for (int64_t j = 0; j < count; j += 16) {
        for (int64_t c = 0; c < columns; c += 16) transpose_16x16(from + c * block + j, block, turned + c, columns);
        store_rows(view, to, turned, columns, used, k0 + j, min64(16, count - j), factor);
      }
      return;
    }
#endif
    store_rows(view, to, from, columns, used, k0, count, factor);
  }
  void store_queries(int64_t r0, int64_t count, const A* from) const {
    if (bp.grad_q.present())
      store_rows(bp.grad_q, group.queries_of<T>(bp.grad_q), from, d_columns, p.d, r0, count, static_cast<A>(p.scale));
  }
  void clear_keys(int64_t k0) {
    const int64_t count = min64(block, p.sk - k0);
    if constexpr (P::kTiles) {
      const int64_t width = round_up(count, 32);
      for (int64_t c = 0; c < d_columns; ++c) clear(grad_k + c * block, width);
      for (int64_t c = 0; c < v_columns; ++c) clear(grad_v + c * block, width);
    } else {
      clear(grad_k, (count + kOverhang) * d_columns);
      clear(grad_v, (count + kOverhang) * v_columns);
    }
  }
  static void clear(A* to, int64_t count) {
    for (int64_t i = 0; i < count; ++i) to[i] = 0;
  }

  // Does any row of [r0, r0 + kRowBlock) see a key of the block at k0?
  bool meets(int64_t r0, int64_t k0) const {
    const Row first = group.row(r0), last = group.row(min64(r0 + kRowBlock, p.rows) - 1);
    return first.lo < k0 + block && last.hi > k0 && k0 < group.keys;
  }

  void clear_grad_mask(int64_t r0, int64_t k0, int64_t k1) const {
    if (!bp.grad_mask.present()) return;
    const int nb = p.batch_dims;
    for (int64_t r = r0; r < min64(r0 + kRowBlock, p.rows); ++r) {
      const Row row = group.row(r);
      const int64_t offset = batch_offset(bp.grad_mask, nb, group.b) + row.head * bp.grad_mask.stride[nb] +
                             row.query * bp.grad_mask.stride[nb + 1];
      for (int64_t j = k0; j < k1; ++j) set_float(bp.grad_mask, offset + j * bp.grad_mask.stride[nb + 2], 0);
    }
  }

  // One pass: all of this key/value head.
  void run_all() {
    const ProductScope<T> products;
    const int64_t padded = round_up(p.rows, kRowBlock);
    Scratch<A> d_term(padded), lse2(padded), grad_q(padded * d_columns);
    row_terms<T>(bp, group, 0, p.rows, d_term.data(), lse2.data());
    clear(grad_q.data(), padded * d_columns);
    for (int64_t r0 = 0; r0 < p.rows; r0 += kRowBlock) clear_grad_mask(r0, 0, p.sk);
    for (int64_t k0 = 0; k0 < p.sk; k0 += block) {
      clear_keys(k0);
      bool loaded = false;
      for (int64_t r0 = 0; r0 < p.rows; r0 += kRowBlock) {
        if (!meets(r0, k0)) continue;
        if (!loaded) load_keys(k0, true);
        loaded = true;
        load_rows(r0, true);
        tile_gradients(d_term.data() + r0, lse2.data() + r0, grad_q.data() + r0 * d_columns, true);
      }
      store_keys(k0);
    }
    store_queries(0, p.rows, grad_q.data());
  }

  // First of two passes: one block of keys.
  void run_keys(int64_t k0) {
    const ProductScope<T> products;
    Scratch<A> d_term(kRowBlock), lse2(kRowBlock);
    clear_keys(k0);
    bool loaded = false;
    for (int64_t r0 = 0; r0 < p.rows; r0 += kRowBlock) {
      if (!meets(r0, k0)) continue;
      if (!loaded) load_keys(k0, false);
      loaded = true;
      row_terms<T>(bp, group, r0, min64(kRowBlock, p.rows - r0), d_term.data(), lse2.data());
      load_rows(r0, true);
      tile_gradients(d_term.data(), lse2.data(), nullptr, true);
    }
    store_keys(k0);
  }

  // Second of two passes: one block of rows.
  void run_rows(int64_t r0) {
    const ProductScope<T> products;
    Scratch<A> d_term(kRowBlock), lse2(kRowBlock), grad_q(kRowBlock * d_columns);
    clear(grad_q.data(), kRowBlock * d_columns);
    load_rows(r0, false);
    row_terms<T>(bp, group, r0, rows_count, d_term.data(), lse2.data());
    clear_grad_mask(r0, 0, p.sk);
    for (int64_t k0 = 0; k0 < p.sk; k0 += block) {
      if (!meets(r0, k0)) continue;
      load_keys(k0, true);
      tile_gradients(d_term.data(), lse2.data(), grad_q.data(), false);
    }
    store_queries(r0, rows_count, grad_q.data());
  }
};

// grad_sinks[h] = - sum over batch and queries of exp(sink - lse) D, in that order.
template <class T>
void sink_gradients(const BackwardProblem<T>& bp, const TensorView& grad_sinks) {
  using A = Accumulator<T>;
  const Problem& p = bp.p;
  parallel_for(0, p.hq, 1, [&](int64_t begin, int64_t end) {
    for (int64_t h = begin; h < end; ++h) {
      const double sink = float_at(*p.sinks, h * p.sinks->stride[0]);
      double total = 0;
      for (int64_t b = 0; b < p.batch; ++b) {
        const Group group(p, b, h / p.group);
        for (int64_t i = 0; i < p.sq; ++i) {
          A d_term, lse2;
          row_terms<T>(bp, group, i * p.group + h % p.group, 1, &d_term, &lse2);
          const double probability = __builtin_exp2(sink * kLog2E - static_cast<double>(lse2));
          if (sink != -__builtin_inf()) total -= probability * static_cast<double>(d_term);
        }
      }
      set_float(grad_sinks, h * grad_sinks.stride[0], total);
    }
  });
}

template <class T>
void backward(const Problem& p, const TensorView* t) {
  const BackwardProblem<T> bp{p,     t[0],  t[1],  t[10], t[11],
                              t[12], t[13], t[14], t[15], backward_block_keys<T>(p.d, p.dv)};
  if (t[16].present() && p.sinks) sink_gradients<T>(bp, t[16]);
  const int64_t heads = p.batch * p.hk, threads = num_threads();
  const int64_t key_blocks = (p.sk + bp.block - 1) / bp.block;
  const int64_t row_blocks = (p.rows + row_block<T>() - 1) / row_block<T>();
  if (heads == 0) return;
  const int64_t rounds = (heads + threads - 1) / threads;
  const bool too_large = p.rows * p.d > int64_t{1} << 24;  // of grad_q's accumulator
  if (5 * rounds * threads <= 7 * heads && !too_large) {
    run_tasks(p, heads, [&](int64_t i) { BackwardTask<T>(bp, i / p.hk, i % p.hk).run_all(); });
    return;
  }
  run_tasks(p, heads * key_blocks, [&](int64_t i) {
    const int64_t head = i / key_blocks;
    BackwardTask<T>(bp, head / p.hk, head % p.hk).run_keys(i % key_blocks * bp.block);
  });
  if (!bp.grad_q.present() && !bp.grad_mask.present()) return;
  run_tasks(p, heads * row_blocks, [&](int64_t i) {
    const int64_t head = i / row_blocks;
    BackwardTask<T>(bp, head / p.hk, head % p.hk).run_rows((row_blocks - 1 - i % row_blocks) * row_block<T>());
  });
}

}  // namespace
}  // namespace attention_detail

void attention_backward(const TensorView* t, const double* s) {
  const attention_detail::Problem p = attention_detail::read_problem(t + 2, s);
  dispatch_float(p.q->dtype, [&](auto type) { attention_detail::backward<typename decltype(type)::type>(p, t); });
}

}  // namespace isotile::ISOTILE_ISA
