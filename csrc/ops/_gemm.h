// The matrix product behind matmul and its relatives: packed panels, a register tile of kRows x (kVecs vectors).
//
// One accumulation order everywhere: k is cut into chunks of Kind::kChunk; within a chunk each output element adds
// its products one after another (pairs of them with vdpbf16ps), and the chunks' sums are added in order. The chunk
// is a constant of the kind, so an element's bits do not depend on m, n, the batch, the strides, the blocking, the
// cache sizes or the number of threads: a row of a batch equals that row alone.
//
// A task is a block of rows times a block of columns. It packs b chunk by chunk into [panel][step][kVecs * kLanes]
// (from memory once for each block of rows, into L2) and runs all row panels [step][rows] of a over each panel.
// a is packed once for everybody when several column blocks read it.
#pragma once
#include "base/dtype.h"
#include "base/parallel.h"
#include "base/scratch.h"
#include "base/tensor_view.h"
#include "ops/_gemm_epilogue.h"
#include "ops/_gemm_pack.h"
#include "simd/vec.h"

namespace isotile {
namespace ISOTILE_ISA {

// y [m, n] = epilogue(a [m, k] @ b [k, n]). Strides in elements.
struct Gemm {
  int64_t m = 0, n = 0, k = 0;
  Matrix a;                      // rows m, columns k
  const void* b = nullptr;
  int64_t b_offset = 0, b_k = 0, b_n = 0;
  Epilogue out;
};

// ---- The register tile --------------------------------------------------------------------------------------------

// acc [kRows, kVecs vectors] += a [step][kRows] x b [step][kVecs vectors], step after step.
template <class Kind, int kRows, int kVecs>
struct Tile {
  using V = Vec<typename Kind::Acc>;
  V acc[kRows][kVecs];

  ISOTILE_INLINE void clear() {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] = V::zero();
  }
  ISOTILE_INLINE void step(const typename Kind::Packed* a, const typename Kind::Packed* b) {
    typename Kind::Operand bv[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) bv[v] = Kind::load(b + v * Kind::kLanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const typename Kind::Operand av = Kind::broadcast(a + i);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] = Kind::multiply_add(av, bv[v], acc[i][v]);
    }
  }
};

// c [kRows, kVecs vectors] (row stride ldc) = or += the tile's sum over `steps`. prefetch fetches what comes next.
template <class Kind, int kRows, int kVecs>
__attribute__((noinline)) void gemm_tile(int64_t steps, const typename Kind::Packed* a, const typename Kind::Packed* b,
                                         typename Kind::Acc* c, int64_t ldc, bool add, Prefetch* prefetch) {
  using V = Vec<typename Kind::Acc>;
  constexpr int kWidth = kVecs * Kind::kLanes;
  Tile<Kind, kRows, kVecs> tile;
  tile.clear();
  int64_t s = 0;
  for (; s + 4 <= steps; s += 4) {
    prefetch->next();
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) {
      tile.step(a, b);
      a += kRows;
      b += kWidth;
    }
  }
  for (; s < steps; ++s) {
    tile.step(a, b);
    a += kRows;
    b += kWidth;
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      typename Kind::Acc* at = c + i * ldc + v * Kind::kLanes;
      (add ? V::load(at) + tile.acc[i][v] : tile.acc[i][v]).store(at);
    }
  }
}

template <class Kind>
using TileFunction = void (*)(int64_t, const typename Kind::Packed*, const typename Kind::Packed*,
                              typename Kind::Acc*, int64_t, bool, Prefetch*);

template <class Kind, int kVecs>
inline TileFunction<Kind> tile_with_rows(int64_t rows) {
  switch (rows) {
    case 1: return gemm_tile<Kind, 1, kVecs>;
    case 2: return gemm_tile<Kind, 2, kVecs>;
    case 3: return gemm_tile<Kind, 3, kVecs>;
    case 4: return gemm_tile<Kind, 4, kVecs>;
    case 5: return gemm_tile<Kind, 5, kVecs>;
    default: return gemm_tile<Kind, 6, kVecs>;
  }
}

template <class Kind>
inline TileFunction<Kind> tile_function(int64_t rows, int64_t width) {
  switch (width / Kind::kLanes) {
    case 1: return tile_with_rows<Kind, 1>(rows);
    case 2: return tile_with_rows<Kind, 2>(rows);
    case 3: return tile_with_rows<Kind, kRegisterVecs < 3 ? kRegisterVecs : 3>(rows);
    default: return tile_with_rows<Kind, kRegisterVecs>(rows);
  }
}

// ---- The work list ------------------------------------------------------------------------------------------------

constexpr int64_t kTileRows = 6;

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows are dealt evenly to the panels, so that none is much thinner than the others.
inline int64_t panel_count(int64_t m) { return ceil_div(m, kTileRows); }
inline int64_t panel_row(int64_t m, int64_t panel) { return panel * m / panel_count(m); }

struct Blocking {
  int64_t columns;  // of a task, a multiple of the panel's width
  int64_t panels;   // row panels of a task, at most
};

// One thread's way through the list of all problems' parts, in order and only forward. `parts` counts them for one problem.
struct Cursor {
  int64_t problem = 0;
  int64_t first = 0;     // the problem's first part in the list
  int64_t packed = 0;    // where its packed a starts
};

template <class Kind, class Source, class Parts>
inline void advance(Cursor* cursor, const Source& source, int64_t part, const Parts& parts) {
  for (;;) {
    const int64_t count = parts(cursor->problem);
    if (part < cursor->first + count) return;
    cursor->first += count;
    cursor->packed += source.m(cursor->problem) * Kind::steps(source.k(cursor->problem));
    ++cursor->problem;
  }
}

// Row panel `panel` of a, chunk [k0, k0 + kc).
template <class Kind, class Src>
inline void pack_a_panel(const Gemm& g, int64_t panel, int64_t k0, int64_t kc, typename Kind::Packed* dst) {
  const int64_t row = panel_row(g.m, panel), rows = panel_row(g.m, panel + 1) - row;
  const Src* data = static_cast<const Src*>(g.a.data) + g.a.offset + k0 * g.a.col;
  const Src* at[kTileRows];
  for (int64_t i = 0; i < rows; ++i) at[i] = data + g.a.rows.at(row + i);
  pack_rows<Kind>(dst, at, rows, g.a.col, kc);
}

// One task: row panels [p0, p1) x columns [n0, n1). shared_a: the problem's packed a, or null to pack it here.
template <class Kind, class SrcA, class SrcB>
inline void run_task(const Gemm& g, int64_t p0, int64_t p1, int64_t n0, int64_t n1,
                     const typename Kind::Packed* shared_a) {
  using Acc = typename Kind::Acc;
  using Packed = typename Kind::Packed;
  constexpr int64_t kWidth = kRegisterVecs * Kind::kLanes;
  const int64_t m0 = panel_row(g.m, p0), rows = panel_row(g.m, p1) - m0;
  const int64_t chunks = g.k == 0 ? 1 : ceil_div(g.k, Kind::kChunk);
  const int64_t most_steps = Kind::steps(least(g.k, Kind::kChunk));
  const int64_t width = ceil_div(n1 - n0, Kind::kLanes) * Kind::kLanes;
  const bool in_place = g.out.plain(Kind::kAccType) && g.out.y.rows.even();
  const int64_t y_step = g.out.y.rows.step();
  const bool keep = chunks > 1 && !(in_place && width == n1 - n0);

  Scratch<Packed> b_packed(2 * kWidth * most_steps);
  Scratch<Packed> a_packed(shared_a == nullptr ? rows * most_steps : 0);
  Scratch<Acc> sums(keep ? rows * width : kTileRows * kWidth);

  // All panels of b, chunk after chunk. While one is multiplied, the next is fetched and packed part by part.
  const int64_t across = ceil_div(n1 - n0, kWidth), total = across * chunks, panels = p1 - p0;
  using Panel = ColumnPanel<Kind, SrcB>;
  const SrcB* b = static_cast<const SrcB*>(g.b) + g.b_offset;
  const auto panel_at = [&](int64_t index) {
    const int64_t k0 = index / across * Kind::kChunk, j = index % across * kWidth;
    const int64_t cols = least(n1 - n0 - j, kWidth);
    return Panel{b + k0 * g.b_k + (n0 + j) * g.b_n, g.b_k, g.b_n, least(g.k - k0, Kind::kChunk), cols,
                 ceil_div(cols, Kind::kLanes) * Kind::kLanes};
  };
  Panel next = panel_at(0);
  next.pack(b_packed.data(), 0, Panel::kParts);
  const Packed* a = nullptr;
  for (int64_t index = 0; index < total; ++index) {
    const Panel panel = next;
    const int64_t k0 = index / across * Kind::kChunk, j = index % across * kWidth, steps = Kind::steps(panel.kc);
    const Packed* b_panel = b_packed.data() + index % 2 * kWidth * most_steps;
    Packed* b_next = b_packed.data() + (index + 1) % 2 * kWidth * most_steps;
    const bool more = index + 1 < total, last = k0 + Kind::kChunk >= g.k;
    if (more) next = panel_at(index + 1);
    if (j == 0) {
      if (shared_a == nullptr) {
        for (int64_t p = p0; p < p1; ++p)
          pack_a_panel<Kind, SrcA>(g, p, k0, panel.kc, a_packed.data() + (panel_row(g.m, p) - m0) * steps);
      }
      a = shared_a == nullptr ? a_packed.data() : shared_a + g.m * Kind::steps(k0) + m0 * steps;
    }
    for (int64_t p = p0; p < p1; ++p) {
      const int64_t row = panel_row(g.m, p), h = panel_row(g.m, p + 1) - row;
      const int64_t part = (p - p0) * Panel::kParts / panels, part_end = (p - p0 + 1) * Panel::kParts / panels;
      Prefetch prefetch;
      if (more && part_end > part) prefetch = next.prefetch(part, part_end, steps / 4);
      const Packed* a_panel = a + (row - m0) * steps;
      const TileFunction<Kind> tile = tile_function<Kind>(h, panel.width);
      if (in_place && panel.cols == panel.width) {
        Acc* y = static_cast<Acc*>(g.out.y.data) + g.out.y.offset + row * y_step + n0 + j;
        tile(steps, a_panel, b_panel, y, y_step, k0 > 0, &prefetch);
      } else {
        Acc* c = keep ? sums.data() + j * rows + (row - m0) * panel.width : sums.data();
        tile(steps, a_panel, b_panel, c, panel.width, k0 > 0, &prefetch);
        if (last) finish(g.out, c, panel.width, row, h, n0 + j, panel.cols);
      }
      if (more && part_end > part) next.pack(b_next, part, part_end);
    }
  }
}

// All problems of a Source: count(), m(i), n(), k(i), problem(i).
template <class Kind, class SrcA, class SrcB, class Source>
inline void run_gemm(const Source& source) {
  using Packed = typename Kind::Packed;
  constexpr int64_t kWidth = kRegisterVecs * Kind::kLanes;
  constexpr int64_t kSerialWork = 1 << 17;              // multiply-adds; below it threads cost more than they bring
  constexpr int64_t kSharedBytes = int64_t{1} << 29;    // above it each task packs its own rows of a
  const int64_t count = source.count(), n = source.n();
  int64_t work = 0, packed = 0, panels = 0, most_panels = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t m = source.m(i), k = source.k(i);
    work += m * n * most(k, 1);
    packed += m * Kind::steps(k);
    panels += panel_count(m);
    most_panels = most(most_panels, panel_count(m));
  }
  if (n == 0 || panels == 0) return;
  const int64_t threads = work <= kSerialWork ? 1 : num_threads();

  // Columns first: they only cost a another pass over packed a; another block of rows packs b again.
  Blocking block{2 * kWidth, least(most_panels, 340)};
  const auto tasks = [&](int64_t columns, int64_t rows) { return ceil_div(n, columns) * ceil_div(panels, rows); };
  if (tasks(block.columns, block.panels) < 4 * threads) block.columns = kWidth;
  while (block.panels > 4 && tasks(block.columns, block.panels) < 2 * threads) block.panels = ceil_div(block.panels, 2);
  const int64_t column_blocks = ceil_div(n, block.columns);
  const auto row_blocks = [&](int64_t i) { return ceil_div(panel_count(source.m(i)), block.panels); };
  int64_t total = 0;
  for (int64_t i = 0; i < count; ++i) total += row_blocks(i) * column_blocks;

  const bool share = column_blocks > 1 && packed * static_cast<int64_t>(sizeof(Packed)) <= kSharedBytes;
  Scratch<Packed> shared(share ? packed : 0);
  if (share) {
    const auto pack = [&](int64_t begin, int64_t end) {
      Cursor cursor;
      int64_t current = -1;
      Gemm g;
      for (int64_t part = begin; part < end; ++part) {
        advance<Kind>(&cursor, source, part, [&](int64_t i) { return panel_count(source.m(i)); });
        if (cursor.problem != current) g = source.problem(current = cursor.problem);
        const int64_t panel = part - cursor.first, row = panel_row(g.m, panel);
        for (int64_t k0 = 0; k0 < g.k; k0 += Kind::kChunk) {
          const int64_t kc = least(g.k - k0, Kind::kChunk);
          pack_a_panel<Kind, SrcA>(g, panel, k0, kc,
                                   shared.data() + cursor.packed + g.m * Kind::steps(k0) + row * Kind::steps(kc));
        }
      }
    };
    if (threads == 1 || packed < (1 << 15)) pack(0, panels);
    else parallel_for(0, panels, ceil_div(panels, threads), pack);
  }

  int64_t next = 0;
  const auto work_off = [&](int64_t, int64_t) {
    Cursor cursor;
    int64_t current = -1;
    Gemm g;
    for (;;) {
      const int64_t part = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (part >= total) return;
      advance<Kind>(&cursor, source, part, [&](int64_t i) { return row_blocks(i) * column_blocks; });
      if (cursor.problem != current) g = source.problem(current = cursor.problem);
      const int64_t local = part - cursor.first, rows = row_blocks(cursor.problem);
      const int64_t p = panel_count(g.m), block_row = local % rows, column = local / rows;
      run_task<Kind, SrcA, SrcB>(g, block_row * p / rows, (block_row + 1) * p / rows, column * block.columns,
                          least(n, (column + 1) * block.columns), share ? shared.data() + cursor.packed : nullptr);
    }
  };
  if (threads == 1 || total == 1) work_off(0, 1);
  else parallel_for(0, least(threads, total), 1, work_off);
}

// Chooses the kind of arithmetic for the operands' dtype.
template <class Source>
inline void run_gemm(DType dtype, const Source& source) {
  switch (dtype) {
    case DType::kFloat32: return run_gemm<FloatKind<float>, float, float>(source);
    case DType::kFloat16: return run_gemm<FloatKind<float>, Float16, Float16>(source);
    case DType::kFloat64: return run_gemm<FloatKind<double>, double, double>(source);
    case DType::kBFloat16:
#if ISOTILE_HAS_BF16_DOT
      return run_gemm<PairKind, BFloat16, BFloat16>(source);
#else
      return run_gemm<FloatKind<float>, BFloat16, BFloat16>(source);
#endif
    default: fail("isotile matmul: operands must be float32, bfloat16, float16 or float64");
  }
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
