// Products of few rows, where reading b is the work: b goes from memory into the products, or at most through a block
// in L1. The order of accumulation is that of _gemm_run.h.
#pragma once
#include <type_traits>

#include "base/scratch.h"
#include "ops/_gemm.h"
#include "ops/_gemm_pack.h"
#include "ops/_gemm_tile.h"

namespace isotile {
namespace ISOTILE_ISA {

constexpr int64_t kFewRows = 16;
// Steps of b that are packed at once; made ones come in multiples of 128 elements. Long columns of 16 bits that become
// float32 are read in longer pieces and fewer at a time: the hardware's own prefetch follows those.
constexpr int64_t kStepsAtOnce = 32, kMadeStepsAtOnce = 64, kNarrowSteps = 128;
constexpr int kNarrowVecs = 2;
template <class Kind, class Src>
inline bool narrow(const Gemm& g) {
  return Kind::kPerStep == 1 && sizeof(Src) == 2 && g.b_k == 1 && g.k >= 2048;
}

// One chunk of a problem's rows: where each one's steps start.
template <class Kind>
struct FewRows {
  const typename Kind::Packed* a[kFewRows];
  int64_t m;

  FewRows(const RowsOfA<Kind>& rows, int64_t m, int64_t k0, int64_t kc) : m(m) {
    for (int64_t i = 0; i < m; ++i) a[i] = rows.at(i, k0, kc);
  }
};

// b's columns lie next to each other: kSteps steps (rows of b) at a time go through one vector of columns for all rows.
template <class Kind, bool kFull, int kSteps, class Src>
ISOTILE_INLINE void few_rows_steps(const Src* b, int64_t b_k, int64_t left, int64_t cols, const FewRows<Kind>& few,
                                   int64_t s, typename Kind::Acc* sums, int64_t width) {
  using V = Vec<typename Kind::Acc>;
  constexpr int64_t kPer = Kind::kPerStep;
  typename Kind::Operand v[kSteps];
#pragma GCC unroll 8
  for (int u = 0; u < kSteps; ++u) v[u] = Kind::template lanes<kFull>(b + u * kPer * b_k, b_k, left - u * kPer, cols);
  for (int64_t i = 0; i < few.m; ++i) {
    typename Kind::Acc* at = sums + i * width;
    V sum = V::load(at);
#pragma GCC unroll 8
    for (int u = 0; u < kSteps; ++u) sum = Kind::multiply_add(Kind::broadcast(few.a[i] + s + u), v[u], sum);
    sum.store(at);
  }
}

// sums [m][width] = the sum over one chunk of b's rows; they stay in L1 or L2 meanwhile.
template <class Kind, class Src>
inline void sum_rows_of_b(const Src* b, int64_t b_k, int64_t kc, int64_t cols, const FewRows<Kind>& few,
                          typename Kind::Acc* sums, int64_t width) {
  using V = Vec<typename Kind::Acc>;
  constexpr int64_t kSteps = 8, kPer = Kind::kPerStep, kLanes = Kind::kLanes;
  const int64_t steps = Kind::steps(kc);
  for (int64_t i = 0; i < few.m * width; i += kLanes) V::zero().store(sums + i);
  int64_t s = 0;
  for (; (s + kSteps) * kPer <= kc; s += kSteps) {
    const Src* from = b + s * kPer * b_k;
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes)
      few_rows_steps<Kind, true, kSteps>(from + j, b_k, kSteps * kPer, 0, few, s, sums + j, width);
    if (j < cols) few_rows_steps<Kind, false, kSteps>(from + j, b_k, kSteps * kPer, cols - j, few, s, sums + j, width);
  }
  for (; s < steps; ++s) {
    const Src* from = b + s * kPer * b_k;
    for (int64_t j = 0; j < cols; j += kLanes)
      few_rows_steps<Kind, false, 1>(from + j, b_k, kc - s * kPer, cols - j, few, s, sums + j, width);
  }
}

// Otherwise: blocks of a panel of b are packed into L1, so many steps at once, and used. sums [m][width] = the sum over
// one chunk.
template <class Kind, class Src>
inline void sum_blocks_of_b(const ColumnPanel<Kind>& whole, int64_t steps_at_once, const FewRows<Kind>& few,
                            typename Kind::Packed* packed, typename Kind::Acc* sums) {
  constexpr int64_t kAhead = 2;
  const int64_t kc = whole.kc, width = whole.width, block = steps_at_once * Kind::kPerStep;
  for (int64_t k0 = 0; k0 < kc; k0 += block) {
    const ColumnPanel<Kind> panel = whole.advanced(k0, least(block, kc - k0));
    panel.template pack<Src>(packed, 0, ColumnPanel<Kind>::kParts);
    const int64_t steps = Kind::steps(panel.kc), s = Kind::steps(k0);
    Prefetch prefetch = panel.prefetch(0, ColumnPanel<Kind>::kParts, steps / 4);
    if (prefetch.rows_left > 0) prefetch.row += kAhead * block * panel.sk * panel.item;
    for (int64_t p = 0; p < panel_count(few.m); ++p) {
      const int64_t row = panel_row(few.m, p), rows = panel_row(few.m, p + 1) - row;
      const typename Kind::Packed* a[kTileRows];
      for (int64_t i = 0; i < rows; ++i) a[i] = few.a[row + i] + s;
      tile_function<Kind>(rows, width)(steps, a, packed, width, sums + row * width, width,
                                       k0 == 0 ? Into::kSet : Into::kContinue, &prefetch);
    }
  }
}

template <class Kind, class Src>
constexpr bool kBlocksInRegisters = transposes_quads<Kind, Src>();
constexpr int64_t kDotColumns = 16;  // of dot_columns, at a time

template <class Kind, class Src>
inline void dot_columns(const Src* b, int64_t b_n, int64_t kc, int64_t left, int64_t following, int64_t cols,
                        const FewRows<Kind>& few, float* sums, int64_t width);

// The same for so few rows that storing the block costs more than the products: it stays in registers.
#if defined(__AVX512F__)
template <class Kind, class Src, int kRows>
inline void dot_columns(const Src* b, int64_t b_n, int64_t kc, int64_t left, int64_t following, int64_t cols,
                        const typename Kind::Packed* const* a, float* sums, int64_t width) {
  using V = Vec<float>;
  constexpr int64_t kPer = Kind::kPerStep, kBlock = 16, kAhead = 2048 / static_cast<int64_t>(sizeof(Src));
  const int64_t steps = Kind::steps(kc), whole = kc / kPer / kBlock * kBlock;
  for (int64_t i = 0; i < kRows * width; i += 16) V::zero().store(sums + i);
  const auto block_of = [&](int64_t s, int64_t j, int64_t last, int64_t ahead) __attribute__((always_inline)) {
    const Block16 block = transpose_block<Kind>(b + j * b_n + s * kPer, b_n, last, ahead);
    V sum[kRows];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sum[i] = V::load(sums + i * width + j);
#pragma GCC unroll 16
    for (int u = 0; u < kBlock; ++u)
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i)
        sum[i] = Kind::multiply_add(Kind::broadcast(a[i] + s + u), Kind::from_float(block.step[u]), sum[i]);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) sum[i].store(sums + i * width + j);
  };
  for (int64_t s = 0; s < whole; s += kBlock) {
    // At their end, the beginning of the next columns.
    const int64_t ahead = s * kPer + kAhead < left ? kAhead : following == 0 ? 0 : following + kAhead - left;
    int64_t j = 0;
    for (; j + 16 <= cols; j += 16) block_of(s, j, 15, ahead);
    if (j < cols) block_of(s, j, cols - 1 - j, 0);
  }
  for (int64_t s = whole; s < steps; ++s) {
    for (int64_t j = 0; j < width; j += 16) {
      typename Kind::Packed column[16] = {};
      for (int64_t c = 0; c < 16 && j + c < cols; ++c)
        column[c] = Kind::pack(b + (j + c) * b_n + s * kPer, int64_t{1}, kc - s * kPer);
      for (int i = 0; i < kRows; ++i) {
        float* at = sums + i * width + j;
        Kind::multiply_add(Kind::broadcast(a[i] + s), Kind::load(column), V::load(at)).store(at);
      }
    }
  }
}

#elif defined(__AVX2__)
template <class Kind, class Src, int kRows>
inline void dot_columns(const Src* b, int64_t b_n, int64_t kc, int64_t left, int64_t following, int64_t cols,
                        const typename Kind::Packed* const* a, float* sums, int64_t width) {
  using V = Vec<float>;
  constexpr int64_t kLanes = 8, kBlock = 8, kAhead = 512 / static_cast<int64_t>(sizeof(Src));
  constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Src));
  constexpr int kGroups = kRows <= 2 ? 2 : 1;  // of lanes: more sums than one addition's latency
  const int64_t whole = kc / kBlock * kBlock;
  const auto columns_from = [&](int64_t j, auto full) __attribute__((always_inline)) {
    constexpr bool kFull = decltype(full)::value;
    V sum[kGroups][kRows];
    const Src* column[kGroups];
    int64_t last[kGroups];
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g) {
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[g][i] = V::zero();
      const int64_t first = kFull ? j + g * kLanes : least(j + g * kLanes, cols - 1);
      column[g] = b + first * b_n;
      last[g] = kFull ? kLanes - 1 : least(kLanes - 1, cols - 1 - first);  // it is repeated
    }
    for (int64_t s = 0; s < whole; s += kBlock) {
      // At their end, the beginning of the next columns.
      const int64_t ahead = s + kAhead < left ? kAhead : following == 0 ? 0 : following + kAhead - left;
      if (kFull && s % kLine == 0 && ahead != 0)
#pragma GCC unroll 16
        for (int64_t c = 0; c < kGroups * kLanes; ++c) __builtin_prefetch(column[0] + c * b_n + s + ahead, 0, 2);
#pragma GCC unroll 2
      for (int64_t quad = 0; quad < kBlock; quad += 4) {
        Quads q[kGroups];
#pragma GCC unroll 2
        for (int g = 0; g < kGroups; ++g) q[g] = transpose_quads<Kind>(column[g] + s + quad, b_n, kFull ? 7 : last[g]);
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u)
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) {
            const V x = V::set1(a[i][s + quad + u]);
#pragma GCC unroll 2
            for (int g = 0; g < kGroups; ++g) sum[g][i] = fma(x, V{q[g].step[u]}, sum[g][i]);
          }
      }
    }
    for (int64_t s = whole; s < kc; ++s) {
#pragma GCC unroll 2
      for (int g = 0; g < kGroups; ++g) {
        float step[kLanes];
        for (int64_t c = 0; c < kLanes; ++c) step[c] = Kind::pack(column[g] + least(c, last[g]) * b_n + s, 1, 1);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i) sum[g][i] = fma(V::set1(a[i][s]), V::load(step), sum[g][i]);
      }
    }
#pragma GCC unroll 2
    for (int g = 0; g < kGroups; ++g)
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
        if (kFull || j + g * kLanes < width) sum[g][i].store(sums + i * width + j + g * kLanes);
  };
  int64_t j = 0;
  for (; j + kGroups * kLanes <= cols; j += kGroups * kLanes) columns_from(j, std::true_type{});
  for (; j < cols; j += kGroups * kLanes) columns_from(j, std::false_type{});
}
#endif

#if defined(__AVX2__)
// left: elements of each column from here to its end; following: from here to the start of the next columns, 0 if there
// are none.
template <class Kind, class Src>
inline void dot_columns(const Src* b, int64_t b_n, int64_t kc, int64_t left, int64_t following, int64_t cols,
                        const FewRows<Kind>& few, float* sums, int64_t width) {
  switch (few.m) {
    case 1: return dot_columns<Kind, Src, 1>(b, b_n, kc, left, following, cols, few.a, sums, width);
    case 2: return dot_columns<Kind, Src, 2>(b, b_n, kc, left, following, cols, few.a, sums, width);
    case 3: return dot_columns<Kind, Src, 3>(b, b_n, kc, left, following, cols, few.a, sums, width);
    default: return dot_columns<Kind, Src, 4>(b, b_n, kc, left, following, cols, few.a, sums, width);
  }
}
#endif

// Whether the register tile reads b's elements themselves.
template <class Kind, class Src>
constexpr bool kReadInPlace = std::is_same_v<Src, typename Kind::Packed> ||
                              (std::is_same_v<float, typename Kind::Packed> && sizeof(Src) == 2);

// Columns [n0, n1) of b that lies in panels, n0 the first of one. Each block of a panel comes into L1 once; what comes
// next is fetched while all rows pass over it.
template <class Kind, class Src>
inline void few_rows_of_panels(const Gemm& g, int64_t n0, int64_t n1, const RowsOfA<Kind>& a) {
  using Acc = typename Kind::Acc;
  using V = Vec<Acc>;
  constexpr int64_t kWidth = kRegisterVecs * Kind::kLanes, kPer = Kind::kPerStep;
  constexpr int64_t kStepBytes = kPanelColumns * static_cast<int64_t>(sizeof(Src)), kAhead = 8192;
  static_assert(kPanelColumns % kWidth == 0);
  const int64_t panels = panel_count(g.m);
  const int64_t block = panels == 1 && kWidth == kPanelColumns ? Kind::kChunk : kStepsAtOnce * kPer;
  Scratch<Acc> totals(g.m * kPanelColumns), chunk_sums(g.k > Kind::kChunk ? g.m * kPanelColumns : 0);
  for (int64_t j = n0; j < n1; j += kPanelColumns) {
    const int64_t cols = least(kPanelColumns, n1 - j), across = ceil_div(cols, kWidth), width = across * kWidth;
    for (int64_t k0 = 0; k0 < g.k; k0 += Kind::kChunk) {
      const int64_t kc = least(g.k - k0, Kind::kChunk);
      Acc* sums = k0 == 0 ? totals.data() : chunk_sums.data();
      const Src* chunk = reinterpret_cast<const Src*>(panel_of<Kind>(g, sizeof(Src), k0, kc, j, cols).src);
      for (int64_t k = 0; k < kc; k += block) {
        const int64_t steps = Kind::steps(least(block, kc - k));
        const Src* b = chunk + k * g.b_k;
        Prefetch prefetch{reinterpret_cast<const char*>(b) + kAhead, kAhead, 0, 1,
                          ceil_div(4 * kStepBytes / 64, across * panels)};
        for (int64_t c = 0; c < width; c += kWidth) {
          for (int64_t p = 0; p < panels; ++p) {
            const int64_t row = panel_row(g.m, p), rows = panel_row(g.m, p + 1) - row;
            const typename Kind::Packed* at[kTileRows];
            for (int64_t i = 0; i < rows; ++i) at[i] = a.at(row + i, k0, kc) + k / kPer;
            tile_with_rows<Kind, kRegisterVecs, Src>(rows)(steps, at, b + c, kPanelColumns,
                                                           sums + row * width + c, width,
                                                           k == 0 ? Into::kSet : Into::kContinue, &prefetch);
          }
        }
      }
      if (k0 == 0) continue;
      for (int64_t i = 0; i < g.m * width; i += Kind::kLanes)
        (V::load(totals.data() + i) + V::load(sums + i)).store(totals.data() + i);
    }
    finish(g.out, totals.data(), width, 0, g.m, j, cols);
  }
}

// Columns [n0, n1) of any other b.
template <class Kind, class Src>
inline void few_rows_of_elements(const Gemm& g, int64_t n0, int64_t n1, const RowsOfA<Kind>& a) {
  using Acc = typename Kind::Acc;
  using V = Vec<Acc>;
  constexpr int64_t kWidth = kRegisterVecs * Kind::kLanes;
  const bool by_rows = g.b_n == 1 && g.m <= 4;
  // One vector of columns at a time for dot_columns: columns a power of two apart compete for the same cache sets.
  const bool by_dots = kBlocksInRegisters<Kind, Src> && !by_rows && g.b_k == 1 && g.m <= 4 && !g.make_b;
  const int64_t steps = g.make_b != nullptr ? kMadeStepsAtOnce : narrow<Kind, Src>(g) ? kNarrowSteps : kStepsAtOnce;
  const int64_t width_of_block = narrow<Kind, Src>(g) ? least(kNarrowVecs, kRegisterVecs) * Kind::kLanes : kWidth;
  const bool wide = by_rows && g.b_panel == 0;
  const int64_t most_width = wide      ? most(8 * Kind::kLanes, 4096 / g.m / Kind::kLanes * Kind::kLanes)
                             : by_dots ? kDotColumns
                                       : width_of_block;
  Scratch<Acc> totals(g.m * most_width), chunk_sums(g.k > Kind::kChunk ? g.m * most_width : 0);
  Scratch<typename Kind::Packed> packed(steps * width_of_block);
  for (int64_t j = n0; j < n1; j += most_width) {
    const int64_t cols = least(most_width, n1 - j), width = ceil_div(cols, Kind::kLanes) * Kind::kLanes;
    for (int64_t k0 = 0; k0 < g.k; k0 += Kind::kChunk) {
      const int64_t kc = least(g.k - k0, Kind::kChunk);
      const FewRows<Kind> few(a, g.m, k0, kc);
      Acc* sums = k0 == 0 ? totals.data() : chunk_sums.data();
      const Src* from = g.make_b != nullptr ? nullptr : static_cast<const Src*>(g.b) + offset_of_b(g, k0, j);
      const auto by_blocks = [&] {
        const ColumnPanel<Kind> panel = panel_of<Kind>(g, sizeof(Src), k0, kc, j, cols);
        sum_blocks_of_b<Kind, Src>(panel, steps, few, packed.data(), sums);
      };
      if (by_rows) {
        sum_rows_of_b<Kind>(from, g.b_k, kc, cols, few, sums, width);
      } else if constexpr (kBlocksInRegisters<Kind, Src>) {
        const int64_t following = j + 2 * most_width <= n1 ? most_width * g.b_n - k0 : 0;
        if (by_dots) dot_columns<Kind>(from, g.b_n, kc, g.k - k0, following, cols, few, sums, width);
        else by_blocks();
      } else {
        by_blocks();
      }
      if (k0 == 0) continue;
      for (int64_t i = 0; i < g.m * width; i += Kind::kLanes)
        (V::load(totals.data() + i) + V::load(sums + i)).store(totals.data() + i);
    }
    finish(g.out, totals.data(), width, 0, g.m, j, cols);
  }
}

// Columns [n0, n1) of a problem of few rows.
template <class Kind, class Src>
inline bool few_rows(const Gemm& g, int64_t n0, int64_t n1, const RowsOfA<Kind>& a) {
  if (g.k == 0 || g.m > kFewRows) return false;
  if constexpr (kReadInPlace<Kind, Src>) {
    if (g.b_panel != 0) {
      few_rows_of_panels<Kind, Src>(g, n0, n1, a);
      return true;
    }
  }
  if constexpr (std::is_same_v<Src, uint32_t>) return false;
  else few_rows_of_elements<Kind, Src>(g, n0, n1, a);
  return true;
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
