// How lists of products run: packed panels, the register tile, tasks for the threads. Included by matmul.cc only. Sets
// with matrix tiles take bfloat16 and float16 to _gemm_amx.h instead, which keeps the same promise in its own order.
//
// One accumulation order everywhere: k is cut into chunks of Kind::kChunk; within a chunk each output element adds
// its products one after another (pairs of them with vdpbf16ps), and the chunks' sums are added in order. The chunk
// is a constant of the kind, so an element's bits do not depend on m, n, the batch, the strides, the blocking, the
// path taken or the number of threads: a row of a batch equals that row alone.
//
// A task is a block of rows times a block of columns. Many rows: rows of a are packed if they cannot be read where they
// lie, b panel by panel, chunk by chunk, into [step][kRegisterVecs vectors], and all row panels run over it. Few rows:
// see few_rows(). Small products: see run_direct().
#pragma once
#include <type_traits>

#include "base/cpu.h"
#include "base/dtype.h"
#include "base/parallel.h"
#include "base/scratch.h"
#include "ops/_gemm.h"
#include "ops/_gemm_amx.h"
#include "ops/_gemm_direct.h"
#include "ops/_gemm_few_rows.h"
#include "ops/_gemm_pack.h"
#include "ops/_gemm_tile.h"

namespace isotile {
namespace ISOTILE_ISA {

struct Blocking {
  int64_t columns;  // of a task, a multiple of the panel's width
  int64_t panels;   // row panels of a task, at most
};

// How many blocks to cut `units` of work into, `fewest` at least, so that `threads` are done soonest with `times` that
// many tasks. Each task costs a quarter of a unit besides.
inline int64_t even_blocks(int64_t fewest, int64_t units, int64_t times, int64_t threads) {
  int64_t best = fewest, soonest = 0;
  for (int64_t blocks = fewest; threads > 1 && blocks <= least(units, fewest + 2 * threads); ++blocks) {
    const int64_t time = ceil_div(times * blocks, threads) * (4 * ceil_div(units, blocks) + 1);
    if (blocks > fewest && time >= soonest) continue;
    best = blocks;
    soonest = time;
  }
  return best;
}

// What depends on the operands' dtypes besides the kind of arithmetic.
template <class Kind>
struct Packers {
  // Rows [begin, end) of a, chunk [k0, k0 + kc) -> [end - begin][row_stride].
  void (*pack_a)(const Gemm&, int64_t begin, int64_t end, int64_t k0, int64_t kc, typename Kind::Packed*);
  void (*pack_b)(const ColumnPanel<Kind>&, typename Kind::Packed*, int64_t part, int64_t end);
  bool (*few_rows)(const Gemm&, int64_t n0, int64_t n1, const RowsOfA<Kind>& a);
  int64_t b_item;
  bool a_as_it_is, b_as_it_is;  // whether the tile could read the operand's elements
};

// Whether `rows` rows of so many bytes, `step` bytes apart, stay together in `cache` bytes. A cache's sets repeat after
// a power of two: rows that are a large power of two apart meet in a part of them.
inline bool fits(int64_t rows, int64_t bytes, int64_t step, int64_t cache) {
  return rows * most(bytes, step & -step) <= cache;
}

// One task: row panels [p0, p1) x columns [n0, n1). shared_a: the problem's rows of a, or null to pack them here.
template <class Kind>
inline void run_task(const Packers<Kind>& packers, const Gemm& g, int64_t p0, int64_t p1, int64_t n0, int64_t n1,
                     const RowsOfA<Kind>* shared_a) {
  using Acc = typename Kind::Acc;
  using Packed = typename Kind::Packed;
  constexpr int64_t kWidth = kRegisterVecs * Kind::kLanes;
  const int64_t m0 = panel_row(g.m, p0), rows = panel_row(g.m, p1) - m0;
  const int64_t chunks = g.k == 0 ? 1 : ceil_div(g.k, Kind::kChunk);
  const int64_t most_k = least(g.k, Kind::kChunk);
  const int64_t width = ceil_div(n1 - n0, Kind::kLanes) * Kind::kLanes;
  const bool in_place = g.out.plain(Kind::kAccType) && g.out.y.rows.even();
  const int64_t y_step = g.out.y.rows.step();
  const bool keep = chunks > 1 && !(in_place && width == n1 - n0);

  const int64_t panel_size = kWidth * Kind::steps(most_k);
  Scratch<Packed> b_packed(2 * panel_size);
  Scratch<Packed> a_packed(shared_a == nullptr ? RowsOfA<Kind>::chunk_start(rows, most_k) : 0);
  Scratch<Acc> sums(keep ? rows * width : kTileRows * kWidth);

  // All panels of b, chunk after chunk. While one is multiplied, the next is fetched and packed part by part. Where b's
  // columns lie side by side it is only fetched: its first row panel packs it on its way, and few row panels read it in
  // place, if it stays near (a packed line costs about as much as three panels' reading it).
  const int64_t across = ceil_div(n1 - n0, kWidth), total = across * chunks, panels = p1 - p0;
  using Panel = ColumnPanel<Kind>;
  const auto panel_at = [&](int64_t index) {
    const int64_t k0 = index / across * Kind::kChunk, j = index % across * kWidth;
    const int64_t cols = least(n1 - n0 - j, kWidth);
    return panel_of<Kind>(g, packers.b_item, k0, least(g.k - k0, Kind::kChunk), n0 + j, cols);
  };
  constexpr int64_t kFewPanels = 40;
  const int64_t b_step = g.b_k * Kind::kPerStep;
  const auto as_it_is = [&](const Panel& panel) {
    return packers.b_as_it_is && panel.sn == 1 && (g.b_panel != 0 || panel.cols == kWidth);
  };
  const bool near = fits(most_k, kWidth * packers.b_item, b_step * packers.b_item, l2_cache_bytes() / 2);
  const bool unpacked = g.b_panel != 0 || (panels <= kFewPanels && near);
  Panel next = panel_at(0);
  Packed* b_next = b_packed.data();
  if (!as_it_is(next)) packers.pack_b(next, b_next, 0, Panel::kParts);
  for (int64_t index = 0; index < total; ++index) {
    const Panel panel = next;
    const int64_t k0 = index / across * Kind::kChunk, j = index % across * kWidth, steps = Kind::steps(panel.kc);
    const bool more = index + 1 < total, last = k0 + Kind::kChunk >= g.k;
    if (more) next = panel_at(index + 1);
    const bool ahead = more && !as_it_is(next);
    Packed* b_panel = b_next;
    if (ahead) b_next = b_panel == b_packed.data() ? b_packed.data() + panel_size : b_packed.data();
    if (j == 0 && shared_a == nullptr) packers.pack_a(g, m0, m0 + rows, k0, panel.kc, a_packed.data());
    const Into into = k0 > 0 ? Into::kAdd : Into::kSet;
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t row = panel_row(g.m, p), h = panel_row(g.m, p + 1) - row;
      const int64_t part = (p - p0) * Panel::kParts / panels, part_end = (p - p0 + 1) * Panel::kParts / panels;
      Prefetch prefetch;
      if (more && part_end > part) prefetch = next.prefetch(part, part_end, steps / 4);
      const Packed* a[kTileRows];
      for (int64_t i = 0; i < h; ++i)
        a[i] = shared_a == nullptr ? a_packed.data() + (row + i - m0) * RowsOfA<Kind>::row_stride(panel.kc)
                                   : shared_a->at(row + i, k0, panel.kc);
      const auto tile = [&](Acc* c, int64_t ldc) {
        const Packed* source = reinterpret_cast<const Packed*>(panel.src);
        if (unpacked && as_it_is(panel))
          tile_function<Kind>(h, panel.width)(steps, a, source, b_step, c, ldc, into, &prefetch);
        else if (p == p0 && as_it_is(panel))
          packing_tile<Kind>(h)(steps, a, source, g.b_k, b_panel, c, ldc, into, &prefetch);
        else
          tile_function<Kind>(h, panel.width)(steps, a, b_panel, panel.width, c, ldc, into, &prefetch);
      };
      if (in_place && panel.cols == panel.width) {
        tile(static_cast<Acc*>(g.out.y.data) + g.out.y.offset + row * y_step + n0 + j, y_step);
      } else {
        Acc* c = keep ? sums.data() + j * rows + (row - m0) * panel.width : sums.data();
        tile(c, panel.width);
        if (last) finish(g.out, c, panel.width, row, h, n0 + j, panel.cols);
      }
      if (ahead && part_end > part) packers.pack_b(next, b_next, part, part_end);
    }
  }
}

template <class Kind>
inline void run_list(const GemmList& source, const Packers<Kind>& packers) {
  using Packed = typename Kind::Packed;
  constexpr int64_t kWidth = kRegisterVecs * Kind::kLanes;
  constexpr int64_t kSerialWork = 1 << 17;     // multiply-adds; below it threads cost more than they bring
  constexpr int64_t kSerialPacking = 1 << 16;  // packed steps of a; likewise
  const int64_t count = source.count(), n = source.first.n;
  int64_t work = 0, panels = 0, most_panels = 0, most_k = 0;
  bool whole_steps = packers.a_as_it_is;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t m = source.m(i), k = source.k(i);
    work += m * n * most(k, 1);
    panels += panel_count(m);
    most_panels = most(most_panels, panel_count(m));
    most_k = most(most_k, k);
    whole_steps = whole_steps && k % Kind::kPerStep == 0;
  }
  if (n == 0 || panels == 0) return;
  const int64_t threads = work <= kSerialWork ? 1 : num_threads();
  const bool few = most_panels <= ceil_div(kFewRows, kTileRows);

  // A task's rows of one chunk stay in L2 while all its columns pass; each block of rows packs b again, which costs too
  // much where b is made first. Where sums are kept from chunk to chunk, they limit the columns.
  const int64_t near = l2_cache_bytes() / 4 * 3;
  constexpr int64_t kItem = sizeof(Packed);
  const int64_t chunk_bytes = most(1, Kind::steps(least(most_k, Kind::kChunk))) * kItem;
  const int64_t most_columns = (source.first.out.plain(Kind::kAccType) ? 64 : 16) * kWidth;
  const int64_t near_panels = source.first.make_b != nullptr ? 340 : near / chunk_bytes / kTileRows;
  Blocking block{most_columns, least(most_panels, most(20, least(340, near_panels)))};
  const auto tasks = [&] { return ceil_div(n, block.columns) * ceil_div(panels, block.panels); };
  const int64_t unit = few && source.first.b_panel != 0 ? kPanelColumns : kWidth;  // of columns
  if (few) {
    block.columns = most(unit, least(2048, ceil_div(ceil_div(n, 2 * threads), unit) * unit));
  } else if (threads > 1) {
    while (block.columns > 2 * kWidth && tasks() < 4 * threads) block.columns /= 2;
    while (block.panels > 4 && tasks() < 2 * threads) block.panels = ceil_div(block.panels, 2);
    if (tasks() < 2 * threads) block.columns = kWidth;
  }
  const auto row_blocks = [&](int64_t i) { return ceil_div(panel_count(source.m(i)), block.panels); };
  int64_t all_row_blocks = 0;
  for (int64_t i = 0; i < count; ++i) all_row_blocks += row_blocks(i);
  const int64_t units = ceil_div(n, unit);
  const int64_t column_blocks = even_blocks(ceil_div(n, block.columns), units, all_row_blocks, threads);
  const int64_t total = all_row_blocks * column_blocks;

  const Matrix& a = source.first.a;
  const auto rows_of_steps = [&] {  // rather than of halves of them
    if (Kind::kPerStep == 1) return true;
    bool all = a.rows.step() % Kind::kPerStep == 0 && reinterpret_cast<uintptr_t>(a.data) % kItem == 0;
    Gemm g = source.first;
    for (int64_t i = 0; i < count && all; ++i) {
      source.place(i, &g);
      all = g.a.offset % Kind::kPerStep == 0;
    }
    return all;
  };
  const bool in_place =
      whole_steps && a.col == 1 && a.rows.even() && rows_of_steps() &&
      (few || fits(block.panels * kTileRows, chunk_bytes, a.rows.step() / Kind::kPerStep * kItem, near));
  const auto packed_of = [&](int64_t i) {
    return in_place ? 0 : RowsOfA<Kind>::chunk_start(source.m(i), source.k(i));
  };
  int64_t packed = 0;
  for (int64_t i = 0; i < count; ++i) packed += packed_of(i);
  const bool share = few && !in_place;
  Scratch<Packed> shared(share ? packed : 0);
  if (share) {
    const auto pack = [&](int64_t begin, int64_t end) {
      Cursor cursor;
      int64_t current = -1;
      Gemm g = source.first;
      for (int64_t part = begin; part < end; ++part) {
        advance(&cursor, part, [&](int64_t i) { return ceil_div(source.m(i), kTransposed); }, packed_of);
        if (cursor.problem != current) source.place(current = cursor.problem, &g);
        const int64_t row = (part - cursor.first) * kTransposed, row_end = least(g.m, row + kTransposed);
        for (int64_t k0 = 0; k0 < g.k; k0 += Kind::kChunk) {
          const int64_t kc = least(g.k - k0, Kind::kChunk);
          packers.pack_a(g, row, row_end, k0, kc,
                         shared.data() + cursor.packed + RowsOfA<Kind>::chunk_start(g.m, k0) +
                             row * RowsOfA<Kind>::row_stride(kc));
        }
      }
    };
    int64_t parts = 0;
    for (int64_t i = 0; i < count; ++i) parts += ceil_div(source.m(i), kTransposed);
    if (threads == 1 || packed <= kSerialPacking) pack(0, parts);
    else parallel_for(0, parts, ceil_div(parts, threads), pack);
  }

  int64_t next = 0;
  const auto work_off = [&](int64_t, int64_t) {
    Cursor cursor;
    int64_t current = -1;
    Gemm g = source.first;
    for (;;) {
      const int64_t part = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (part >= total) return;
      advance(&cursor, part, [&](int64_t i) { return row_blocks(i) * column_blocks; }, packed_of);
      if (cursor.problem != current) source.place(current = cursor.problem, &g);
      const int64_t local = part - cursor.first, rows = row_blocks(cursor.problem);
      const int64_t p = panel_count(g.m), block_row = local % rows, column = local / rows;
      const int64_t n0 = column * units / column_blocks * unit;
      const int64_t n1 = least(n, (column + 1) * units / column_blocks * unit);
      RowsOfA<Kind> rows_of_a{shared.data() + cursor.packed, nullptr, g.m};
      if (in_place) rows_of_a = {static_cast<const Packed*>(g.a.data) + g.a.offset / Kind::kPerStep, &g.a.rows, 0};
      if ((share || in_place) && packers.few_rows(g, n0, n1, rows_of_a)) continue;
      run_task(packers, g, block_row * p / rows, (block_row + 1) * p / rows, n0, n1,
               share || in_place ? &rows_of_a : nullptr);
    }
  };
  if (threads == 1 || total == 1) work_off(0, 1);
  else parallel_for(0, least(threads, total), 1, work_off);
}

template <class Kind, class SrcA, class SrcB>
inline void run_kind(const GemmList& list) {
  using Packed = typename Kind::Packed;
  const Packers<Kind> packers{
      [](const Gemm& g, int64_t begin, int64_t end, int64_t k0, int64_t kc, Packed* dst) {
        const SrcA* data = static_cast<const SrcA*>(g.a.data) + g.a.offset + k0 * g.a.col;
        pack_rows<Kind>(dst, data, g.a.rows, begin, end, g.a.col, kc);
      },
      [](const ColumnPanel<Kind>& panel, Packed* dst, int64_t part, int64_t end) {
        panel.template pack<SrcB>(dst, part, end);
      },
      few_rows<Kind, SrcB>,
      static_cast<int64_t>(sizeof(SrcB)),
      std::is_same_v<SrcA, Packed> || Kind::kPerStep == 2,  // pairs of bfloat16
      std::is_same_v<SrcB, Packed>,
  };
  run_list<Kind>(list, packers);
}

#if ISOTILE_HAS_TILES
// float16 on tiles leaves the rows of a and columns of b that are not finite to this. Nothing in their results is
// finite, so that no bits depend on which arithmetic found them.
void redo_not_finite(const GemmList& list) {
  const auto finite = [](Float16 x) { return (x.bits & 0x7c00) != 0x7c00; };
  Gemm g = list.first;
  for (int64_t i = 0; i < list.count(); ++i) {
    g.m = list.m(i);
    g.k = list.k(i);
    list.place(i, &g);
    // Neighbours go together where their places are evenly apart.
    const bool even = g.a.rows.even() && g.out.y.rows.even() && g.out.preactivation.rows.even() &&
                      g.out.residual.rows.even();
    const auto redo = [&](int64_t count, bool neighbours, const auto& whole, const auto& cut) {
      for (int64_t begin = 0, end; begin < count; begin = end) {
        for (end = begin; end < count && !whole(end) && (neighbours || end == begin); ++end) {
        }
        if (end == begin) {
          ++end;
          continue;
        }
        OneGemm part;
        part.first = g;
        cut(&part.first, begin, end - begin);
        run_kind<FloatKind<float>, Float16, Float16>(part);
      }
    };
    const auto* a = static_cast<const Float16*>(g.a.data) + g.a.offset;
    const auto* b = static_cast<const Float16*>(g.b) + g.b_offset;
    redo(g.m, even,
         [&](int64_t row) {
           bool all = true;
           for (int64_t k = 0; k < g.k; ++k) all = all && finite(a[g.a.rows.at(row) + k * g.a.col]);
           return all;
         },
         [](Gemm* part, int64_t row, int64_t rows) {
           part->m = rows;
           Matrix* const matrices[] = {&part->a, &part->out.y, &part->out.preactivation, &part->out.residual};
           for (Matrix* matrix : matrices) matrix->offset += matrix->rows.at(row);
         });
    redo(g.n, true,
         [&](int64_t column) {
           bool all = true;
           for (int64_t k = 0; k < g.k; ++k) all = all && finite(b[column * g.b_n + k * g.b_k]);
           return all;
         },
         [](Gemm* part, int64_t column, int64_t columns) {
           part->n = columns;
           part->b_offset += column * part->b_n;
           Matrix* const matrices[] = {&part->out.y, &part->out.preactivation, &part->out.residual};
           for (Matrix* matrix : matrices) matrix->offset += column * matrix->col;
           const int64_t bias = column * part->out.bias_stride * item_size(part->out.bias_dtype);
           if (part->out.bias != nullptr) part->out.bias = static_cast<const char*>(part->out.bias) + bias;
         });
  }
}
#endif

void run_gemms(DType a, DType b, const GemmList& list) {
  const bool panels = list.first.b_panel != 0;
#if ISOTILE_HAS_BF16_DOT
  if (list.first.b_pairs) return run_kind<PairKind, BFloat16, uint32_t>(list);
#else
  if (list.first.b_pairs) return run_kind<FloatKind<float>, BFloat16, uint32_t>(list);
#endif
#if ISOTILE_HAS_TILES
  if (a == DType::kBFloat16 && b == DType::kBFloat16 && !panels) {
    run_tiled<Bf16Tiles>(list);
    return;
  }
  if (a == DType::kFloat16 && b == DType::kFloat16 && !panels) {
    if (run_tiled<F16Tiles>(list)) redo_not_finite(list);
    return;
  }
#endif
#if ISOTILE_HAS_BF16_DOT
  if (a == DType::kBFloat16 && b == DType::kBFloat16) return run_kind<PairKind, BFloat16, BFloat16>(list);
#endif
  dispatch_float(a, [&](auto type_a) {
    dispatch_float(b, [&](auto type_b) {
      using A = typename decltype(type_a)::type;
      using B = typename decltype(type_b)::type;
      using T = decltype(Accumulator<A>() + Accumulator<B>());
      if constexpr (sizeof(A) == 4 && sizeof(B) == 4) {
        if (!panels && run_direct(list)) return;
      }
      run_kind<FloatKind<T>, A, B>(list);
    });
  });
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
