// Small float32 products without packing: the register tile reads a and b where they lie, so that there is no scratch
// memory and no pass over the operands before the first product. One chunk of k only, each element's products added
// one after another: the bits are those of _gemm_run.h.
#pragma once
#include "base/parallel.h"
#include "ops/_gemm.h"
#include "ops/_gemm_few_rows.h"
#include "ops/_gemm_pack.h"
#include "ops/_gemm_tile.h"

namespace isotile {
namespace ISOTILE_ISA {

// c [kRows, kVecs vectors] = a [kRows rows at `a`, k stride a_k] x b [k, cols], row stride b_k. The last vector has
// `last` columns; kFull: it is whole.
template <int kRows, int kVecs, bool kFull>
__attribute__((noinline)) void direct_tile(int64_t k, const float* const* a, int64_t a_k, const float* b, int64_t b_k,
                                           int64_t last, float* c, int64_t ldc, bool masked_store) {
  using V = Vec<float>;
  constexpr int kLanes = V::kLanes;
  const float* row[kRows];
  V acc[kRows][kVecs];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    row[i] = a[i];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) acc[i][v] = V::zero();
  }
  for (int64_t s = 0; s < k; ++s, b += b_k) {
    V bv[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v)
      bv[v] = kFull || v + 1 < kVecs ? V::load(b + v * kLanes) : V::load(b + v * kLanes, last);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const V av = V::set1(row[i][s * a_k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] = fma(av, bv[v], acc[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) {
      float* to = c + i * ldc + v * kLanes;
      if (!kFull && v + 1 == kVecs && masked_store) acc[i][v].store(to, last);
      else acc[i][v].store(to);
    }
  }
}

using DirectTile = void (*)(int64_t, const float* const*, int64_t, const float*, int64_t, int64_t, float*, int64_t,
                            bool);

template <int kVecs, bool kFull>
inline DirectTile direct_tile_of(int64_t rows) {
  switch (rows) {
    case 1: return direct_tile<1, kVecs, kFull>;
    case 2: return direct_tile<2, kVecs, kFull>;
    case 3: return direct_tile<3, kVecs, kFull>;
    case 4: return direct_tile<4, kVecs, kFull>;
    case 5: return direct_tile<5, kVecs, kFull>;
    default: return direct_tile<6, kVecs, kFull>;
  }
}

template <bool kFull>
inline DirectTile direct_tile_of(int64_t rows, int64_t vecs) {
  switch (vecs) {
    case 1: return direct_tile_of<1, kFull>(rows);
    case 2: return direct_tile_of<2, kFull>(rows);
    case 3: return direct_tile_of<kRegisterVecs < 3 ? kRegisterVecs : 3, kFull>(rows);
    default: return direct_tile_of<kRegisterVecs, kFull>(rows);
  }
}

// Whether b's rows are whole lines in a cache near enough to be read again for every six rows of a.
inline bool direct(const Gemm& g, int64_t m, int64_t k) {
  constexpr int64_t kNear = int64_t{1} << 15, kFewRowsNear = int64_t{1} << 18;  // elements of b
  return g.b_n == 1 && k <= FloatKind<float>::kChunk && k * g.n <= (m <= kFewRows ? kFewRowsNear : kNear);
}

inline void run_direct(const Gemm& g) {
  constexpr int64_t kInL1 = 6144;  // elements
  constexpr int64_t kLanes = Vec<float>::kLanes, kWidth = kRegisterVecs * kLanes;
  const bool in_place = g.out.plain(DType::kFloat32);
  const float* a = static_cast<const float*>(g.a.data) + g.a.offset;
  const float* b = static_cast<const float*>(g.b) + g.b_offset;
  const int64_t panels = ceil_div(g.m, kTileRows), y_step = g.out.y.rows.step();
  float tile[kTileRows * kWidth];
  const auto run = [&](int64_t p, int64_t j) {
    const int64_t cols = least(g.n - j, kWidth), vecs = ceil_div(cols, kLanes), last = cols - (vecs - 1) * kLanes;
    const int64_t row = p * g.m / panels, rows = (p + 1) * g.m / panels - row;
    const float* at[kTileRows];
    for (int64_t i = 0; i < rows; ++i) at[i] = a + g.a.rows.at(row + i);
    const DirectTile run = last == kLanes ? direct_tile_of<true>(rows, vecs) : direct_tile_of<false>(rows, vecs);
    if (in_place) {
      float* y = static_cast<float*>(g.out.y.data) + g.out.y.offset + row * y_step + j;
      run(g.k, at, g.a.col, b + j, g.b_k, last, y, y_step, true);
    } else {
      run(g.k, at, g.a.col, b + j, g.b_k, last, tile, kWidth, false);
      finish(g.out, tile, kWidth, row, rows, j, cols);
    }
  };
  // Columns stay in L1 while all rows pass. If all of b is in L1, the result goes row by row: page by page.
  if (g.k * g.n <= kInL1) {
    for (int64_t p = 0; p < panels; ++p)
      for (int64_t j = 0; j < g.n; j += kWidth) run(p, j);
  } else {
    for (int64_t j = 0; j < g.n; j += kWidth)
      for (int64_t p = 0; p < panels; ++p) run(p, j);
  }
}

// The whole list, where every product of it is small; false: nothing is done.
inline bool run_direct(const GemmList& list) {
  constexpr int64_t kSerialWork = 1 << 17;  // multiply-adds; above it several threads are worth their start
  const int64_t count = list.count();
  int64_t work = 0;
  for (int64_t i = 0; i < count; ++i) {
    if (!direct(list.first, list.m(i), list.k(i))) return false;
    work += list.m(i) * list.first.n * most(list.k(i), 1);
  }
  if (work > kSerialWork && num_threads() > 1) return false;
  Gemm g = list.first;
  for (int64_t i = 0; i < count; ++i) {
    g.m = list.m(i);
    g.k = list.k(i);
    list.place(i, &g);
    run_direct(g);
  }
  return true;
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
