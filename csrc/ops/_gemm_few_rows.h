// Products of few rows, where reading b is the work: b goes straight from memory into the products, never into a
// packed copy. The order of accumulation is that of _gemm_run.h.
#pragma once
#include "base/scratch.h"
#include "ops/_gemm.h"
#include "ops/_gemm_pack.h"
#include "ops/_gemm_tile.h"

namespace isotile {
namespace ISOTILE_ISA {

constexpr int64_t kFewRows = 16;

// The packed rows of a problem, one chunk: panels [step][rows] behind each other.
template <class Kind>
struct FewRows {
  const typename Kind::Packed* a[ceil_div(kFewRows, kTileRows)];
  int64_t row[ceil_div(kFewRows, kTileRows) + 1];
  int64_t panels;

  FewRows(int64_t m, const typename Kind::Packed* packed, int64_t steps) : panels(ceil_div(m, kTileRows)) {
    for (int64_t p = 0; p <= panels; ++p) row[p] = p * m / panels;
    for (int64_t p = 0; p < panels; ++p) a[p] = packed + row[p] * steps;
  }
};

// b's columns lie next to each other: some steps (rows of b) at a time run over all columns, whose sums [m][width]
// stay in L1 or L2. sums = the sum over one chunk.
template <class Kind, class Src>
inline void sum_rows_of_b(const Src* b, int64_t b_k, int64_t kc, int64_t cols, const FewRows<Kind>& few,
                          typename Kind::Acc* sums, int64_t width) {
  using V = Vec<typename Kind::Acc>;
  constexpr int64_t kSteps = 8, kPer = Kind::kPerStep;
  const int64_t steps = Kind::steps(kc), m = few.row[few.panels];
  for (int64_t i = 0; i < m * width; i += Kind::kLanes) V::zero().store(sums + i);
  int64_t s = 0;
  for (; (s + kSteps) * kPer <= kc; s += kSteps) {
    const Src* from = b + s * kPer * b_k;
    for (int64_t j = 0; j < width; j += Kind::kLanes) {
      typename Kind::Operand v[kSteps];
#pragma GCC unroll 8
      for (int u = 0; u < kSteps; ++u) v[u] = Kind::lanes(from + u * kPer * b_k + j, b_k, kPer, cols - j);
      for (int64_t p = 0; p < few.panels; ++p) {
        const int64_t rows = few.row[p + 1] - few.row[p];
        const typename Kind::Packed* a = few.a[p] + s * rows;
        typename Kind::Acc* at = sums + few.row[p] * width + j;
        for (int64_t i = 0; i < rows; ++i, ++a, at += width) {
          V sum = V::load(at);
#pragma GCC unroll 8
          for (int u = 0; u < kSteps; ++u) sum = Kind::multiply_add(Kind::broadcast(a + u * rows), v[u], sum);
          sum.store(at);
        }
      }
    }
  }
  for (; s < steps; ++s) {
    for (int64_t j = 0; j < width; j += Kind::kLanes) {
      const typename Kind::Operand v = Kind::lanes(b + s * kPer * b_k + j, b_k, kc - s * kPer, cols - j);
      for (int64_t p = 0; p < few.panels; ++p) {
        const int64_t rows = few.row[p + 1] - few.row[p];
        for (int64_t i = 0; i < rows; ++i) {
          typename Kind::Acc* at = sums + (few.row[p] + i) * width + j;
          Kind::multiply_add(Kind::broadcast(few.a[p] + s * rows + i), v, V::load(at)).store(at);
        }
      }
    }
  }
}

constexpr int64_t kDotRows = 4;
#if defined(__AVX2__)
// b's steps lie next to each other: blocks of 16 steps x 8 columns are transposed in registers. sums [kRows][width] =
// the sum over one chunk, width at most 32 columns.
template <class Kind, class Src, int kRows>
inline void dot_columns(const Src* b, int64_t b_n, int64_t kc, int64_t cols, const typename Kind::Packed* a, float* sums,
                        int64_t width) {
  constexpr int64_t kPer = Kind::kPerStep, kBlock = 16, kAhead = 512 / static_cast<int64_t>(sizeof(Src));
  const int64_t steps = Kind::steps(kc), whole = kc / kPer;
  for (int64_t i = 0; i < kRows * width; i += 8) _mm256_storeu_ps(sums + i, _mm256_setzero_ps());
  int64_t s = 0;
  for (; s < whole / 4 * 4; s += kBlock) {
    const int64_t quads = least(kBlock, whole - s) / 4;
    for (int64_t j = 0; j < width; j += 8) {
      const Src* p = b + j * b_n + s * kPer;
      const int64_t last = least(7, cols - 1 - j);
      for (int64_t c = 0; c <= last; ++c) __builtin_prefetch(p + c * b_n + kAhead, 0, 2);
      __m256 sum[kRows];
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) sum[i] = _mm256_loadu_ps(sums + i * width + j);
      const typename Kind::Packed* at = a + s * kRows;
      for (int64_t q = 0; q < quads; ++q, p += 4 * kPer) {
        const Quads quad = last == 7 ? transpose_quads<Kind>(p, b_n, 7) : transpose_quads<Kind>(p, b_n, last);
#pragma GCC unroll 4
        for (int u = 0; u < 4; ++u)
#pragma GCC unroll 4
          for (int i = 0; i < kRows; ++i) sum[i] = Kind::multiply_add_half(at++, quad.step[u], sum[i]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) _mm256_storeu_ps(sums + i * width + j, sum[i]);
    }
  }
  for (s = whole / 4 * 4; s < steps; ++s) {
    for (int64_t j = 0; j < width; j += 8) {
      typename Kind::Packed column[8] = {};
      for (int64_t c = 0; c < 8 && j + c < cols; ++c)
        column[c] = Kind::pack(b + (j + c) * b_n + s * kPer, int64_t{1}, kc - s * kPer);
      const __m256 v = _mm256_loadu_ps(reinterpret_cast<const float*>(column));
      for (int i = 0; i < kRows; ++i)
        _mm256_storeu_ps(sums + i * width + j,
                         Kind::multiply_add_half(a + s * kRows + i, v, _mm256_loadu_ps(sums + i * width + j)));
    }
  }
}
#endif

template <class Kind, class Src>
inline void sum_columns_of_b(const Src* b, int64_t b_n, int64_t kc, int64_t cols, const FewRows<Kind>& few,
                             typename Kind::Acc* sums, int64_t width) {
#if defined(__AVX2__)
  if constexpr (transposes_quads<Kind, Src>()) {
    switch (few.row[1]) {
      case 1: return dot_columns<Kind, Src, 1>(b, b_n, kc, cols, few.a[0], sums, width);
      case 2: return dot_columns<Kind, Src, 2>(b, b_n, kc, cols, few.a[0], sums, width);
      case 3: return dot_columns<Kind, Src, 3>(b, b_n, kc, cols, few.a[0], sums, width);
      default: return dot_columns<Kind, Src, 4>(b, b_n, kc, cols, few.a[0], sums, width);
    }
  }
#endif
}

// Columns [n0, n1) of a problem of few rows; false where this is not the way. a: the problem's packed a.
template <class Kind, class Src>
inline bool few_rows(const Gemm& g, int64_t n0, int64_t n1, const typename Kind::Packed* a) {
  using Acc = typename Kind::Acc;
  using V = Vec<Acc>;
  const bool by_rows = g.b_n == 1, by_columns = g.b_k == 1 && g.m <= kDotRows && transposes_quads<Kind, Src>();
  if (g.k == 0 || g.m > kFewRows || !(by_rows || by_columns)) return false;
  const int64_t most_width = by_rows ? most(16 * Kind::kLanes, 8192 / g.m / Kind::kLanes * Kind::kLanes)
                                     : ceil_div(32, Kind::kLanes) * Kind::kLanes;
  Scratch<Acc> totals(g.m * most_width), chunk_sums(g.k > Kind::kChunk ? g.m * most_width : 0);
  const Src* b = static_cast<const Src*>(g.b) + g.b_offset;
  for (int64_t j = n0; j < n1; j += most_width) {
    const int64_t cols = least(most_width, n1 - j), width = ceil_div(cols, Kind::kLanes) * Kind::kLanes;
    for (int64_t k0 = 0; k0 < g.k; k0 += Kind::kChunk) {
      const int64_t kc = least(g.k - k0, Kind::kChunk);
      const FewRows<Kind> few(g.m, a + g.m * Kind::steps(k0), Kind::steps(kc));
      Acc* sums = k0 == 0 ? totals.data() : chunk_sums.data();
      const Src* from = b + k0 * g.b_k + j * g.b_n;
      if (by_rows) sum_rows_of_b<Kind>(from, g.b_k, kc, cols, few, sums, width);
      else sum_columns_of_b<Kind>(from, g.b_n, kc, cols, few, sums, width);
      if (k0 == 0) continue;
      for (int64_t i = 0; i < g.m * width; i += Kind::kLanes)
        (V::load(totals.data() + i) + V::load(sums + i)).store(totals.data() + i);
    }
    finish(g.out, totals.data(), width, 0, g.m, j, cols);
  }
  return true;
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
