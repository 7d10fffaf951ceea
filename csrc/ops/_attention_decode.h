// Few rows against many keys (decoding): K and V are read where they are, once, by all rows of their head, and the keys
// are split into parts whose number depends on sk alone, so that one sequence can use many threads.
#pragma once
#include "ops/_attention_softmax.h"

namespace isotile::ISOTILE_ISA::attention_detail {

constexpr int64_t kDecodeRows = 16;    // at most, or, for one query,
constexpr int64_t kDecodeHeads = 128;  // heads of a group
constexpr int64_t kDecodeBlock = 256;  // keys between two looks at the maximum
constexpr int64_t kDecodePartKeys = 512;
constexpr int64_t kDecodeParts = 64;
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kDecodeSums = 16;  // accumulators
#else
constexpr int kDecodeSums = 8;
#endif

// Rows of so many elements are asked for this much ahead of their use, in rows: the hardware's own prefetch stops at
// each page.
template <class T>
ISOTILE_INLINE int64_t rows_ahead(int64_t elements) {
  constexpr int64_t kBytes = 4096;
  return max64(1, kBytes / (elements * static_cast<int64_t>(sizeof(T)) + 1));
}

// out[i] = sum of v[i], i < kDecodeSums.
template <class A>
ISOTILE_INLINE void reduce_each(const Vec<A>* v, A* out) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) {
    combine_16(v, [](Vec<A> a, Vec<A> b) { return a + b; }).store(out);
    return;
  }
#endif
#pragma GCC unroll 16
  for (int i = 0; i < kDecodeSums; ++i) out[i] = reduce_add(v[i]);
}

// Vectors of a key's row as T stores it, to be multiplied with packed words of the query.
template <class T>
struct KeyVectors {
  using P = Packed<T>;
  static constexpr int kStep = Vec<typename P::Acc>::kLanes;  // elements
  static ISOTILE_INLINE typename P::BVec load(const T* p) { return Vec<typename P::Acc>::load(p); }
  static ISOTILE_INLINE typename P::BVec load(const T* p, int64_t n) { return Vec<typename P::Acc>::load(p, n); }
};
#if ISOTILE_HAS_BF16_DOT
template <>
struct KeyVectors<BFloat16> {
  static constexpr int kStep = 32;
  static ISOTILE_INLINE __m512bh load(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static ISOTILE_INLINE __m512bh load(const BFloat16* p, int64_t n) {
    return (__m512bh)_mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint64_t{1} << n) - 1), p);
  }
};
#endif

// score[row * score_row + j] = q[row] . k[j] for kRows rows and j < n, and for some j beyond n (from key n - 1).
template <class T, int kRows>
void key_products(const T* k, int64_t k_row, int64_t d, const typename Packed<T>::Word* q, int64_t q_row, int64_t n,
                  Accumulator<T>* score, int64_t score_row) {
  using A = Accumulator<T>;
  using V = Vec<A>;
  using K = KeyVectors<T>;
  constexpr int kKeys = kDecodeSums / kRows, kTogether = kRows == 1 ? 1 : 2;  // one row: in the order of memory
  const int64_t full = d / K::kStep, rest = d % K::kStep, ahead = rows_ahead<T>(d) * k_row;
  for (int64_t j = 0; j < n; j += kKeys) {
    V sums[kDecodeSums];  // [kRows][kKeys]
#pragma GCC unroll 16
    for (int part = 0; part < kKeys; part += kTogether) {
      const T* keys[kTogether];
      V acc[kTogether][kRows];
#pragma GCC unroll 16
      for (int i = 0; i < kTogether; ++i) {
        keys[i] = k + min64(j + part + i, n - 1) * k_row;
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) acc[i][r] = V::zero();
      }
      for (int64_t c = 0; c < full; ++c) {
        typename Packed<T>::BVec x[kTogether];
#pragma GCC unroll 16
        for (int i = 0; i < kTogether; ++i) {
          x[i] = K::load(keys[i] + c * K::kStep);
          __builtin_prefetch(keys[i] + c * K::kStep + ahead, 0, 3);
        }
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const typename Packed<T>::BVec y = Packed<T>::load(q + r * q_row + c * V::kLanes);
#pragma GCC unroll 16
          for (int i = 0; i < kTogether; ++i) acc[i][r] = Packed<T>::dot(y, x[i], acc[i][r]);
        }
      }
      if (rest > 0) {
#pragma GCC unroll 16
        for (int r = 0; r < kRows; ++r) {
          const typename Packed<T>::BVec y = Packed<T>::load(q + r * q_row + full * V::kLanes);
#pragma GCC unroll 16
          for (int i = 0; i < kTogether; ++i)
            acc[i][r] = Packed<T>::dot(y, K::load(keys[i] + full * K::kStep, rest), acc[i][r]);
        }
      }
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
        for (int i = 0; i < kTogether; ++i) sums[r * kKeys + part + i] = acc[i][r];
      }
    }
    alignas(64) A out[kDecodeSums];
    reduce_each<A>(sums, out);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 16
      for (int i = 0; i < kKeys; ++i) score[r * score_row + j + i] = out[r * kKeys + i];
    }
  }
}

// Of the values that come `elements` after those at hand: every stride-th line is asked for, from `first` on.
struct Ahead {
  int64_t elements, first, stride;
};

// o[row, column] += sum over n keys of weight[row, key] v[key, column], for kRows rows and kVecs vectors of columns:
// whole ones, or a single one of the first `columns`.
template <class T, int kRows, int kVecs, bool kPartial>
ISOTILE_INLINE void add_values(const T* v, int64_t v_row, int64_t columns, const Accumulator<T>* weight,
                               int64_t weight_row, int64_t n, Accumulator<T>* o, int64_t o_row, const Ahead& ahead) {
  using V = Vec<Accumulator<T>>;
  V acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) acc[r][i] = V::load(o + r * o_row + i * V::kLanes);
  }
  constexpr int64_t kBytes = kVecs * V::kLanes * static_cast<int64_t>(sizeof(T));
  for (int64_t j = 0; j < n; ++j) {
    V x[kVecs];
    for (int64_t at = 64 * ahead.first; at < kBytes; at += 64 * ahead.stride)
      __builtin_prefetch(reinterpret_cast<const char*>(v + j * v_row + ahead.elements) + at, 0, 3);
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) {
      if constexpr (kPartial) {
        x[i] = V::load(v + j * v_row, columns);
      } else {
        x[i] = V::load(v + j * v_row + i * V::kLanes);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const V w = V::set1(weight[r * weight_row + j]);
#pragma GCC unroll 8
      for (int i = 0; i < kVecs; ++i) acc[r][i] = fma(w, x[i], acc[r][i]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int i = 0; i < kVecs; ++i) acc[r][i].store(o + r * o_row + i * V::kLanes);
  }
}

// What fits the registers with kRows rows, then halves of it down to one vector, then what is left.
template <class T, int kRows, int kVecs>
ISOTILE_INLINE void value_products(const T* v, int64_t v_row, int64_t dv, const Accumulator<T>* weight,
                                   int64_t weight_row, int64_t n, Accumulator<T>* o, int64_t o_row,
                                   const Ahead& ahead) {
  constexpr int64_t kColumns = kVecs * Vec<Accumulator<T>>::kLanes;
  int64_t c = 0;
  for (; c + kColumns <= dv; c += kColumns) {
    add_values<T, kRows, kVecs, false>(v + c, v_row, kColumns, weight, weight_row, n, o + c, o_row, ahead);
  }
  if (c == dv) return;
  if constexpr (kVecs > 1) {
    value_products<T, kRows, kVecs / 2>(v + c, v_row, dv - c, weight, weight_row, n, o + c, o_row, ahead);
  } else {
    add_values<T, kRows, 1, true>(v + c, v_row, dv - c, weight, weight_row, n, o + c, o_row, ahead);
  }
}

template <class T>
struct DecodeTask {
  using P = Packed<T>;
  using A = typename P::Acc;
  using W = typename P::Word;
  using V = Vec<A>;

  const Problem& p;
  int64_t part_keys, parts, columns;  // columns of an accumulator row
  A* partial;                         // [batch * hk][parts][rows][columns + 2]: o, maximum, sum

  A* partial_of(int64_t head, int64_t part, int64_t row) const {
    return partial + ((head * parts + part) * p.rows + row) * (columns + 2);
  }

  void run(int64_t b, int64_t kv_head, int64_t part) const {
    const Group group(p, b, kv_head);
    const int64_t words = row_words<T>(p.d), rows = p.rows;
    Arena arena;
    W* q;
    A *scores, *keep;
    Row* row;
    A *maximum, *sum;
    SoftmaxStep<A>* step;
    const auto cut = [&] {
      q = arena.take<W>(rows * words);
      maximum = arena.take<A>(rows);
      sum = arena.take<A>(rows);
      step = arena.take<SoftmaxStep<A>>(1);
      scores = arena.take<A>(rows * kDecodeBlock);
      keep = arena.take<A>(kDecodeBlock);
      row = arena.take<Row>(rows);
    };
    cut();
    const Scratch<char> memory(arena.used);
    arena = {memory.data(), 0};
    cut();
    int64_t lo = p.sk, hi = 0;
    bool ragged = p.mask != nullptr;  // rows that do not see the same keys
    for (int64_t r = 0; r < rows; ++r) {
      row[r] = group.row(r);
      ragged = ragged || row[r].lo != row[0].lo || row[r].hi != row[0].hi;
      A* to = partial_of(b * p.hk + kv_head, part, r);
      for (int64_t i = 0; i < columns; ++i) to[i] = 0;
      to[columns] = maximum[r] = -static_cast<A>(__builtin_inf());
      to[columns + 1] = sum[r] = 0;
      if (row[r].lo >= row[r].hi) continue;
      lo = min64(lo, row[r].lo);
      hi = max64(hi, row[r].hi);
    }
    lo = max64(lo, part * part_keys);
    hi = min64(hi, (part + 1) * part_keys);
    if (lo >= hi) return;
    gather_rows<T>(group.queries_of<T>(*p.q), 0, rows, rows, p.d, q, words);
    const RowSource<T> keys = group.keys_of<T>(*p.k), values = group.keys_of<T>(*p.v);
    A* o = partial_of(b * p.hk + kv_head, part, 0);
    const int64_t o_row = columns + 2;
    for (int64_t k0 = lo / kDecodeBlock * kDecodeBlock; k0 < hi; k0 += kDecodeBlock) {
      const int64_t c0 = max64(0, (lo - k0) / kDecodeSums * kDecodeSums), n = min64(kDecodeBlock, hi - k0),
                    c1 = round_up(n, 16);
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t j = n; j < c1; ++j) scores[r * kDecodeBlock + j] = 0;
      }
      const T* k = keys.row(k0 + c0);
      const T* v = values.row(k0);
      each_row_group<4>(rows, [&](auto size, int64_t r) {
        key_products<T, decltype(size)::value>(k, keys.stride_seq, p.d, q + r * words, words, n - c0,
                                               scores + r * kDecodeBlock + c0, kDecodeBlock);
      });
      for (int64_t r = 0; r < rows; r += kSoftmaxRows) {
        const int64_t count = min64(kSoftmaxRows, rows - r);
        A* from = scores + r * kDecodeBlock;
        softmax_step<A>(p, row + r, count, b, k0, c0, c1, from, kDecodeBlock, keep, from, kDecodeBlock, maximum + r,
                        sum + r, step);
        for (int64_t i = 0; i < count; ++i) scale_row(o + (r + i) * o_row, columns, step->factor[i]);
      }
      const Scratch<A> before(ragged ? rows * o_row : 0);
      if (ragged) __builtin_memcpy(before.data(), o, static_cast<size_t>(rows * o_row) * sizeof(A));
      // Two rows at a time leave room for eight vectors of columns, four for four: memory is then read in order, which
      // decides the speed.
      constexpr int kVecs = kDecodeSums / 2;
      const bool narrow = p.dv <= kVecs / 2 * V::kLanes;
      const int64_t step =
          rows > 2 || p.dv > 128 ? 32 : kDecodeBlock;  // keys whose values stay in L1 for all rows and columns
      const int64_t together = narrow ? 4 : 2, turns = rows > together ? 2 : 1;  // the first two share the asking
      const int64_t keys_ahead = step == kDecodeBlock ? rows_ahead<T>(p.dv) : step;
      for (int64_t j = max64(c0, lo - k0); j < n; j += step) {  // before lo no row sees anything: 0 * NaN
        const auto multiply = [&](auto size, int64_t r) {
          constexpr int kRows = decltype(size)::value;
          const int64_t turn = r / together;
          const Ahead ahead{keys_ahead * values.stride_seq, turn < turns ? turn : INT64_MAX / 64, turns};
          value_products<T, kRows, kRows == 4 ? kVecs / 2 : kVecs>(
              v + j * values.stride_seq, values.stride_seq, p.dv, scores + r * kDecodeBlock + j, kDecodeBlock,
              min64(step, n - j), o + r * o_row, o_row, ahead);
        };
        if (narrow) {
          each_row_group<4>(rows, multiply);
        } else {
          each_row_group<2>(rows, multiply);
        }
      }
      if (!ragged) continue;
      for (int64_t r = 0; r < rows; ++r)
        redo_visible(row[r], k0, c0, n, values, scores + r * kDecodeBlock, before.data() + r * o_row, o + r * o_row);
    }
    for (int64_t r = 0; r < rows; ++r) {
      o[r * o_row + columns] = maximum[r];
      o[r * o_row + columns + 1] = sum[r];
    }
  }

  // Not finite? Then perhaps through a hidden value (0 * NaN): once more, in the same order, without those.
  void redo_visible(const Row& row, int64_t k0, int64_t c0, int64_t n, const RowSource<T>& values, const A* weight,
                    const A* before, A* o) const {
    V sum = V::zero();
    for (int64_t i = 0; i < columns; i += V::kLanes) sum = fma(V::load(o + i), V::zero(), sum);
    if (reduce_add(sum) == 0) return;
    for (int64_t i = 0; i < p.dv; i += V::kLanes) {
      V acc = V::load(before + i);
      for (int64_t j = c0; j < n; ++j) {
        if (visible(p, row, k0 + j))
          acc = fma(V::set1(weight[j]), V::load(values.row(k0 + j) + i, min64(V::kLanes, p.dv - i)), acc);
      }
      acc.store(o + i);
    }
  }

  template <int kSize>
  struct Size {
    static constexpr int value = kSize;
  };
  // f(size, row) for the rows in groups of up to kMost.
  template <int kMost, class F>
  static ISOTILE_INLINE void each_row_group(int64_t rows, const F& f) {
    int64_t r = 0;
    if constexpr (kMost == 4) {
      for (; r + 4 <= rows; r += 4) f(Size<4>{}, r);
    }
    for (; r + 2 <= rows; r += 2) f(Size<2>{}, r);
    if (r < rows) f(Size<1>{}, r);
  }
};

template <class T>
ISOTILE_INLINE bool decodes(const Problem& p) {
  const bool few = p.rows <= kDecodeRows || (p.sq == 1 && p.rows <= kDecodeHeads);
  const auto unit = [&](const TensorView& t) {
    return t.stride[p.batch_dims + 2] == 1 || t.size[p.batch_dims + 2] == 1;
  };
  return few && unit(*p.k) && unit(*p.v);
}

template <class T>
void decode(const Problem& p, const TensorView& out, const TensorView& lse) {
  using A = Accumulator<T>;
  const int64_t columns = row_lanes<T>(p.dv);
  const int64_t part_keys = max64(kDecodePartKeys, round_up((p.sk + kDecodeParts - 1) / kDecodeParts, kDecodePartKeys));
  const int64_t parts = (p.sk + part_keys - 1) / part_keys, heads = p.batch * p.hk;
  const Scratch<A> partial(heads * parts * p.rows * (columns + 2));
  const DecodeTask<T> task{p, part_keys, parts, columns, partial.data()};
  run_tasks(p, heads * parts, [&](int64_t i) { task.run(i / parts / p.hk, i / parts % p.hk, i % parts); });
  parallel_for(0, heads, 16, [&](int64_t begin, int64_t end) {
    const Scratch<A> total(parts == 1 && !p.sinks ? 0 : columns);
    for (int64_t head = begin; head < end; ++head) {
      const Group group(p, head / p.hk, head % p.hk);
      for (int64_t r = 0; r < p.rows; ++r) {
        const Row row = group.row(r);
        A maximum, sum;
        if (!total.data()) {  // one part and nothing beside it
          const A* all = task.partial_of(head, 0, r);
          finish_row<T>(p, group, row, r, all[columns], all[columns + 1], all, out, lse);
          continue;
        }
        start_row<A>(p, row, &maximum, &sum);
        const A sink = maximum;
        for (int64_t i = 0; i < parts; ++i) {
          const A m = task.partial_of(head, i, r)[columns];
          if (m > maximum || m != m) maximum = m;
        }
        const A base = maximum == -static_cast<A>(__builtin_inf()) ? A{0} : maximum;
        sum = sum == 0 ? A{0} : sum * exp2_scalar(sink - base);
        for (int64_t i = 0; i < columns; ++i) total[i] = 0;
        for (int64_t i = 0; i < parts; ++i) {
          const A* from = task.partial_of(head, i, r);
          const A factor = exp2_scalar(from[columns] - base);
          sum += from[columns + 1] * factor;
          for (int64_t c = 0; c < columns; c += Vec<A>::kLanes) {
            fma(Vec<A>::load(from + c), Vec<A>::set1(factor), Vec<A>::load(total.data() + c)).store(total.data() + c);
          }
        }
        finish_row<T>(p, group, row, r, maximum, sum, total.data(), out, lse);
      }
    }
  });
}

}  // namespace isotile::ISOTILE_ISA::attention_detail
