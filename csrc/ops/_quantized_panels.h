// Quantised integers, more than a few rows, where vpdpbusd has no matrix tiles beside it: y = x @ weight.T with 32 rows
// of the weight (a panel) across lanes.
//
// A panel is unpacked a chunk of k at a time into [k / 4][32 rows][4 bytes], unsigned: four-bit codes as they are,
// eight bits plus 128. A row of x is used where it lies, four q's at a time in all lanes. The zero point (128 for eight
// bits) is in what the sums start from: -zero times the sum of q. A group is summed exactly in int32, then scaled into
// float32.
#pragma once
#include "base/scratch.h"
#include "ops/_gemm_pack.h"
#include "ops/_gemm_tile.h"
#include "ops/_quantized_few_rows.h"

#if defined(__AVX512VNNI__) && !ISOTILE_HAS_TILES
namespace isotile {
namespace ISOTILE_ISA {

constexpr int64_t kPanel = 32;
constexpr int64_t kStepBytes = 4 * kPanel;  // of an unpacked panel, for four elements of k
constexpr int64_t kChunkOfPanel = 4096;     // of k, at most: 128 KB unpacked

// The zero point that all weights share, or 1: the sums of q are kept that many times larger.
inline int32_t shared_zero(const QuantizedWeight& w) { return !w.four_bits() ? 128 : w.zeros == nullptr ? 8 : 1; }

// Rows of x as integers: q [m][ld], zeros from k on; sums [padded_groups][m] of q over each group, times shared_zero().
struct QuantizedRows {
  int64_t m;
  const int8_t* q;
  int64_t ld;
  const int32_t* sums;
  const float* scales;
};

// Groups of whole pieces: those behind the row's end are of zeros.
inline int64_t padded_groups(const QuantizedWeight& w) {
  return w.groups == 1 ? 1 : ceil_div(w.k, kPiece) * kPiece / w.group;
}

// The sums of q over each of padded_groups, m apart.
inline void sum_groups(const QuantizedWeight& w, const int8_t* q, int64_t m, int32_t* sums) {
  const int64_t padded = ceil_div(w.k, kPiece) * kPiece, length = w.groups == 1 ? padded : w.group;
  const __m256i zero = _mm256_set1_epi8(static_cast<char>(shared_zero(w)));
  for (int64_t g = 0; g < padded_groups(w); ++g) {
    __m256i sum = _mm256_setzero_si256();
    for (int64_t k = g * length; k < least((g + 1) * length, padded); k += 32)
      sum = _mm256_dpbusd_epi32(sum, zero, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + k)));
    sums[g * m] = _mm512_reduce_add_epi32(_mm512_zextsi256_si512(sum));
  }
}

// Scales and zero points of a panel, [groups][32].
class PanelFactors {
 public:
  explicit PanelFactors(const QuantizedWeight& w)
      : ld_(ceil_div(w.groups, 16) * 16), rows_(kPanel * ld_), scales_(kPanel * ld_),
        zeros_(w.zeros != nullptr ? kPanel * ld_ : 0) {
    for (int64_t i = 0; i < kPanel * ld_; ++i) rows_[i] = 0.0f;
  }

  void load(const QuantizedWeight& w, int64_t j0, int64_t columns) {
    for (int64_t i = 0; i < columns; ++i)
      RowFactors::load_row(w.scales, w.scales_dtype, (j0 + i) * w.groups, w.groups, rows_.data() + i * ld_);
    across(scales_.data());
    if (w.zeros == nullptr) return;
    for (int64_t i = 0; i < columns; ++i) {
      float* row = rows_.data() + i * ld_;
      if (w.has_offsets()) RowFactors::load_row(w.zeros, w.zeros_dtype, (j0 + i) * w.groups, w.groups, row);
      else
        for (int64_t g = 0; g < w.groups; ++g) row[g] = static_cast<float>(w.zero(j0 + i, g));
    }
    across(zeros_.data());
  }

  ISOTILE_INLINE __m512 scale(int64_t g, int h) const { return _mm512_loadu_ps(scales_.data() + g * kPanel + 16 * h); }
  ISOTILE_INLINE __m512 zero(int64_t g, int h) const { return _mm512_loadu_ps(zeros_.data() + g * kPanel + 16 * h); }

 private:
  void across(float* to) const {
    for (int64_t h = 0; h < kPanel; h += 16) {
      for (int64_t g = 0; g < ld_; g += 16) {
        __m512 block[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) block[i] = _mm512_loadu_ps(rows_.data() + (h + i) * ld_ + g);
        transpose_16x16(block);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + (g + i) * kPanel + h, block[i]);
      }
    }
  }

  int64_t ld_;
  Scratch<float> rows_, scales_, zeros_;
};

// Elements [k0, k1) of rows [j0, j0 + columns) of the weight, whole pieces; the other rows of the panel are 0.
inline void unpack_panel(const QuantizedWeight& w, int64_t j0, int64_t columns, int64_t k0, int64_t k1, uint8_t* out,
                         Prefetch* prefetch) {
  const int64_t bytes = w.four_bits() ? kPiece / 2 : kPiece;  // of a piece
  for (int64_t k = k0; k < k1; k += kPiece) {
    for (int64_t part = 0; part < bytes; part += 64) {
      const int64_t at = k / kPiece * bytes + part, left = w.row_bytes - at;
      const __mmask64 mask = left >= 64 ? ~__mmask64{0} : left <= 0 ? 0 : (__mmask64{1} << left) - 1;
      for (int64_t h = 0; h < kPanel; h += 16) {
        prefetch->next<3>();
        __m512 words[16];
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i)
          words[i] = h + i < columns ? _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(mask, w.row(j0 + h + i) + at))
                                     : _mm512_setzero_ps();
        transpose_16x16(words);
        uint8_t* to = out + (k - k0 + part) / 4 * kStepBytes + 4 * h;
        const __m512i low = _mm512_set1_epi8(15), turn = _mm512_set1_epi8(static_cast<char>(128));
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) {
          const __m512i v = _mm512_castps_si512(words[i]);
          if (w.four_bits()) {
            _mm512_storeu_si512(to + i * kStepBytes, _mm512_and_si512(v, low));
            _mm512_storeu_si512(to + (16 + i) * kStepBytes, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
          } else {
            _mm512_storeu_si512(to + i * kStepBytes, _mm512_xor_si512(v, turn));
          }
        }
      }
    }
  }
}

enum class Zeros { kShared, kOwn, kOffsets };

// Sums over elements [k0, k1) of k, whole groups or a part of the only one, of kRows rows of x from `row` on -> sums
// [kRows][32]: int32 until a group is done, then float32, added to what the groups before left there.
template <int kRows, Zeros kZeros>
inline void sum_panel(const QuantizedWeight& w, const PanelFactors& f, const QuantizedRows& x, int64_t row, int64_t k0,
                      int64_t k1, const uint8_t* panel, float* sums, Prefetch* prefetch) {
  const bool grouped = w.groups > 1, begins = grouped || k0 == 0, ends = grouped || k1 >= w.k;
  const int64_t length = grouped ? w.group : k1 - k0;
  const int8_t* q[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) q[r] = x.q + (row + r) * x.ld;
  int64_t g = grouped ? k0 / length : 0;
  for (int64_t k = k0; k < k1; ++g) {
    __m512i acc[kRows][2];
    const int32_t* of_group = x.sums + g * x.m + row;
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i sum = _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_set1_epi32(of_group[r]));
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h)
        acc[r][h] = kZeros == Zeros::kShared ? sum
                    : kZeros == Zeros::kOwn  ? _mm512_mullo_epi32(_mm512_cvtps_epi32(f.zero(g, h)), sum)
                                             : _mm512_setzero_si512();
    }
    if (!begins) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) acc[r][h] = _mm512_loadu_si512(sums + r * kPanel + 16 * h);
    }
    for (const int64_t end = least(k + length, k1); k < end; k += 32) {
      prefetch->next<3>();
#pragma GCC unroll 8
      for (int u = 0; u < 32; u += 4, panel += kStepBytes) {
        const __m512i w0 = _mm512_loadu_si512(panel), w1 = _mm512_loadu_si512(panel + 64);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
          int32_t four;
          __builtin_memcpy(&four, q[r] + k + u, 4);
          const __m512i v = _mm512_set1_epi32(four);
          acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], w0, v);
          acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], w1, v);
        }
      }
    }
    if (!ends) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
        for (int h = 0; h < 2; ++h) _mm512_storeu_si512(sums + r * kPanel + 16 * h, acc[r][h]);
      return;
    }
    const bool first = g == 0;
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512 scale = f.scale(g, h);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        float* to = sums + r * kPanel + 16 * h;
        const __m512 before = first ? _mm512_setzero_ps() : _mm512_loadu_ps(to);
        __m512 sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(acc[r][h]), scale, before);
        if (kZeros == Zeros::kOffsets)
          sum = _mm512_fmadd_ps(_mm512_set1_ps(static_cast<float>(of_group[r])), f.zero(g, h), sum);
        _mm512_storeu_ps(to, sum);
      }
    }
  }
}

using SumPanel = void (*)(const QuantizedWeight&, const PanelFactors&, const QuantizedRows&, int64_t, int64_t, int64_t,
                          const uint8_t*, float*, Prefetch*);
template <int kRows>
inline SumPanel sum_panel_of(const QuantizedWeight& w) {
  return w.zeros == nullptr ? sum_panel<kRows, Zeros::kShared>
         : w.has_offsets()  ? sum_panel<kRows, Zeros::kOffsets>
                            : sum_panel<kRows, Zeros::kOwn>;
}
inline SumPanel sum_panel_of(const QuantizedWeight& w, int64_t rows) {
  switch (rows) {
    case 1: return sum_panel_of<1>(w);
    case 2: return sum_panel_of<2>(w);
    case 3: return sum_panel_of<3>(w);
    case 4: return sum_panel_of<4>(w);
    case 5: return sum_panel_of<5>(w);
    case 6: return sum_panel_of<6>(w);
    case 7: return sum_panel_of<7>(w);
    default: return sum_panel_of<8>(w);
  }
}

// Panels [begin, end) of the weight, against all m rows of x.
inline void integer_panels(const QuantizedWeight& w, const Epilogue& out, const QuantizedRows& x, int64_t begin,
                           int64_t end) {
  constexpr int64_t kRows = 8, kSpread = 8;  // blocks of rows in which all of that comes
  const int64_t m = x.m, padded = ceil_div(w.k, kPiece) * kPiece, blocks = ceil_div(m, kRows);
  const int64_t bytes_of_piece = w.four_bits() ? kPiece / 2 : kPiece, chunk = even_chunk(padded, kChunkOfPanel);
  Scratch<uint8_t> panel(chunk / 4 * kStepBytes);
  Scratch<float> sums(m * kPanel);
  PanelFactors f(w);
  for (int64_t j0 = begin * kPanel; j0 < least(end * kPanel, w.n); j0 += kPanel) {
    const int64_t columns = least(kPanel, w.n - j0);
    f.load(w, j0, columns);
    for (int64_t k0 = 0; k0 < padded; k0 += chunk) {
      const int64_t k1 = least(padded, k0 + chunk);
      // What is unpacked next is fetched while this is, and while the first blocks of rows pass over it.
      const bool more = k1 < padded;
      const int64_t next_j = more ? j0 : j0 + kPanel, next_k = more ? k1 : 0;
      Prefetch prefetch;
      if (next_j < least(end * kPanel, w.n)) {
        prefetch.row = reinterpret_cast<const char*>(w.row(next_j)) + next_k / kPiece * bytes_of_piece;
        prefetch.row_lines = ceil_div(least(padded - next_k, chunk) / kPiece * bytes_of_piece, 64);
        prefetch.row_stride = w.row_bytes;
        prefetch.rows_left = least(kPanel, w.n - next_j);
        const int64_t calls = least(blocks, kSpread) * (k1 - k0) / 32 + (k1 - k0) / kPiece * bytes_of_piece / 32;
        prefetch.per_call = ceil_div(kPanel * prefetch.row_lines, calls);
      }
      unpack_panel(w, j0, columns, k0, k1, panel.data(), &prefetch);
      for (int64_t b = 0; b < blocks; ++b) {
        const int64_t row = b * m / blocks, rows = (b + 1) * m / blocks - row;
        sum_panel_of(w, rows)(w, f, x, row, k0, k1, panel.data(), sums.data() + row * kPanel, &prefetch);
      }
    }
    for (int64_t i = 0; i < m; ++i)
      for (int64_t h = 0; h < kPanel; h += 16) {
        float* at = sums.data() + i * kPanel + h;
        _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(x.scales[i])));
      }
    finish(out, sums.data(), kPanel, 0, m, j0, columns);
  }
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
#endif
