// Packing of a matrix product's operands: a into rows of steps, b into panels of steps.
#pragma once
#include <type_traits>

#include "ops/_gemm.h"
#include "ops/_gemm_tile.h"

namespace isotile {
namespace ISOTILE_ISA {

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
constexpr int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

// Rows are dealt evenly to the panels, so that none is much thinner than the others.
inline int64_t panel_count(int64_t m) { return ceil_div(m, kTileRows); }
inline int64_t panel_row(int64_t m, int64_t panel) { return panel * m / panel_count(m); }

// Transposes of 4 steps x 8 columns, for b whose steps lie next to each other. On x86 with 256-bit registers: these
// shuffles go twice as fast as 512-bit ones, and half of the work is done by the loads. Where whole panels are packed,
// 512-bit blocks of 16 x 16 are still ahead: they read and write whole lines.
template <class Kind, class Src>
constexpr bool transposes_quads() {
#if defined(__AVX2__)
  return sizeof(typename Kind::Packed) == 4 && sizeof(Src) <= 4;
#else
  return false;
#endif
}

#if defined(__AVX2__)
struct Quads {
  __m256 step[4];  // each 8 columns
};

// [p[0..3], q[0..3]] as packed steps.
template <class Kind>
ISOTILE_INLINE __m256 load_quads(const float* p, const float* q) {
  return _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)), _mm_loadu_ps(q), 1);
}
ISOTILE_INLINE __m128i load_half_quads(const void* p, const void* q) {
  const __m128i low = _mm_loadl_epi64(static_cast<const __m128i*>(p));
  return _mm_castps_si128(_mm_loadh_pi(_mm_castsi128_ps(low), static_cast<const __m64*>(q)));
}
template <class Kind>
ISOTILE_INLINE __m256 load_quads(const Float16* p, const Float16* q) { return _mm256_cvtph_ps(load_half_quads(p, q)); }
template <class Kind>
ISOTILE_INLINE __m256 load_quads(const BFloat16* p, const BFloat16* q) {
  if (Kind::kPerStep == 2)
    return load_quads<Kind>(reinterpret_cast<const float*>(p), reinterpret_cast<const float*>(q));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_half_quads(p, q)), 16));
}

// Column c starts at p + c * stride, but no column after `last` is read: it is repeated.
template <class Kind, class Src>
ISOTILE_INLINE Quads transpose_quads(const Src* p, int64_t stride, int64_t last) {
  const auto at = [&](int64_t c) { return p + (c < last ? c : last) * stride; };
  const __m256 r0 = load_quads<Kind>(at(0), at(4)), r1 = load_quads<Kind>(at(1), at(5));
  const __m256 r2 = load_quads<Kind>(at(2), at(6)), r3 = load_quads<Kind>(at(3), at(7));
  const __m256 low01 = _mm256_unpacklo_ps(r0, r1), high01 = _mm256_unpackhi_ps(r0, r1);
  const __m256 low23 = _mm256_unpacklo_ps(r2, r3), high23 = _mm256_unpackhi_ps(r2, r3);
  return {{_mm256_shuffle_ps(low01, low23, 0x44), _mm256_shuffle_ps(low01, low23, 0xee),
           _mm256_shuffle_ps(high01, high23, 0x44), _mm256_shuffle_ps(high01, high23, 0xee)}};
}

#if defined(__AVX512F__)
// Likewise 16 steps x 16 columns: a whole line of each column at once.
struct Block16 {
  __m512 step[16];
};

template <class Kind>
ISOTILE_INLINE __m512 load_steps(const float* p) {
  return _mm512_loadu_ps(p);
}
template <class Kind>
ISOTILE_INLINE __m512 load_steps(const Float16* p) {
  return Vec<float>::load(p).v;
}
template <class Kind>
ISOTILE_INLINE __m512 load_steps(const BFloat16* p) {
  return Kind::kPerStep == 2 ? _mm512_loadu_ps(p) : Vec<float>::load(p).v;
}

// ahead: how many elements further to fetch the column's line from, 0 for none.
template <class Kind, class Src>
ISOTILE_INLINE Block16 transpose_block(const Src* p, int64_t stride, int64_t last, int64_t ahead) {
  Block16 block;
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c) {
    const Src* column = p + (c < last ? c : last) * stride;
    if (ahead != 0) __builtin_prefetch(column + ahead, 0, 2);
    block.step[c] = load_steps<Kind>(column);
  }
  transpose_16x16(block.step);
  return block;
}
#endif

// Columns [j0, j1) of `cols`, j0 a multiple of 16 -> dst [step][width], whole lanes. Returns how many of the steps are
// done.
template <class Kind, class Src, class Packed>
inline int64_t pack_transposed(Packed* dst, const Src* src, int64_t stride, int64_t steps, int64_t cols, int64_t width,
                               int64_t j0, int64_t j1) {
  if constexpr (!transposes_quads<Kind, Src>()) {
    return 0;
  } else {
    const int64_t whole = steps / 4 * 4;
    int64_t blocks = 0;
#if defined(__AVX512F__)
    blocks = steps / 16 * 16;
    for (int64_t j = j0; j < j1; j += 16) {
      const int64_t last = j + 16 <= cols ? 15 : cols - 1 - j;
      float* to = reinterpret_cast<float*>(dst + j);
      for (int64_t s = 0; s < blocks; s += 16) {
        const Block16 block = transpose_block<Kind>(src + j * stride + s * Kind::kPerStep, stride, last, 0);
#pragma GCC unroll 16
        for (int i = 0; i < 16; ++i) _mm512_storeu_ps(to + (s + i) * width, block.step[i]);
      }
    }
#endif
    for (int64_t j = j0; j < j1; j += 8) {
      const Src* p = src + j * stride;
      float* to = reinterpret_cast<float*>(dst + j);
      for (int64_t s = blocks; s < whole; s += 4) {
        const Quads q = transpose_quads<Kind>(p + s * Kind::kPerStep, stride, j + 8 <= cols ? 7 : cols - 1 - j);
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) _mm256_storeu_ps(to + (s + i) * width, q.step[i]);
      }
    }
    return whole;
  }
}
#else
template <class Kind, class Src, class Packed>
inline int64_t pack_transposed(Packed*, const Src*, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t) {
  return 0;
}
#endif

// a as the register tile reads it: the steps of a row's chunk lie behind each other. Either the matrix itself, or packed
// chunk by chunk into [rows][row_stride].
template <class Kind>
struct RowsOfA {
  using Packed = typename Kind::Packed;
  const Packed* data = nullptr;
  const IndexMap* in_place = nullptr;  // of the matrix's rows; null where they are packed
  int64_t rows = 0;                    // of a packed chunk

  // Whole lines, and an odd number of them: neighbouring rows fall into different sets of every cache.
  static int64_t row_stride(int64_t kc) {
    constexpr int64_t kLine = 64 / static_cast<int64_t>(sizeof(Packed));
    return (ceil_div(Kind::steps(kc), kLine) | 1) * kLine;
  }
  // Where chunk k0 of a packed matrix begins; its length, if k0 is its k.
  static int64_t chunk_start(int64_t rows, int64_t k0) {
    const int64_t last = k0 % Kind::kChunk;
    return rows * (k0 / Kind::kChunk * row_stride(Kind::kChunk) + (last == 0 ? 0 : row_stride(last)));
  }
  const Packed* at(int64_t row, int64_t k0, int64_t kc) const {
    return in_place != nullptr ? data + (in_place->at(row) + k0) / Kind::kPerStep
                               : data + chunk_start(rows, k0) + row * row_stride(kc);
  }
};

#if defined(__AVX512F__)
constexpr int64_t kTransposed = 16;  // rows and steps
#else
constexpr int64_t kTransposed = 4;
#endif

// kTransposed rows at src, src + 1, ... by kTransposed whole steps, `col` apart -> dst [kTransposed][ld]. ahead: how
// many elements further to fetch from.
template <class Kind, class Src>
ISOTILE_INLINE void pack_transposed_rows(typename Kind::Packed* dst, int64_t ld, const Src* src, int64_t col,
                                         [[maybe_unused]] int64_t ahead) {
#if defined(__AVX512F__)
  if constexpr (sizeof(typename Kind::Packed) == 4) {
    __m512 block[16];
#pragma GCC unroll 16
    for (int64_t s = 0; s < 16; ++s) {
      const Src* from = src + s * Kind::kPerStep * col;
      __builtin_prefetch(from + ahead);
      block[s] = Kind::raw(Kind::template lanes<true>(from, col, Kind::kPerStep, 0));
    }
    transpose_16x16(block);
#pragma GCC unroll 16
    for (int64_t i = 0; i < 16; ++i) _mm512_storeu_ps(reinterpret_cast<float*>(dst + i * ld), block[i]);
    return;
  }
#endif
  for (int64_t i = 0; i < kTransposed; ++i)
    for (int64_t s = 0; s < kTransposed; ++s)
      dst[i * ld + s] = Kind::pack(src + i + s * Kind::kPerStep * col, col, Kind::kPerStep);
}

// Rows [begin, end) of a matrix, kc elements from src on -> dst [end - begin][row_stride(kc)].
template <class Kind, class Src>
inline void pack_rows(typename Kind::Packed* dst, const Src* src, const IndexMap& rows, int64_t begin, int64_t end,
                      int64_t col, int64_t kc) {
  constexpr int64_t kPer = Kind::kPerStep;
  const int64_t ld = RowsOfA<Kind>::row_stride(kc), whole = kc / kPer;
  const auto pack = [&](int64_t row, int64_t s0, int64_t s1) {
    const Src* from = src + rows.at(row);
    for (int64_t s = s0; s < s1; ++s)
      dst[(row - begin) * ld + s] = Kind::pack(from + s * kPer * col, col, kc - s * kPer);
  };
  int64_t row = begin;
  if (col != 1 && rows.even() && rows.step() == 1) {
    for (; row + kTransposed <= end; row += kTransposed) {
      typename Kind::Packed* to = dst + (row - begin) * ld;
      int64_t s = 0;
      for (; s + kTransposed <= whole; s += kTransposed) {
        const int64_t ahead = s + 3 * kTransposed <= whole ? 2 * kTransposed * kPer * col : 0;
        pack_transposed_rows<Kind>(to + s, ld, src + rows.at(row) + s * kPer * col, col, ahead);
      }
      for (int64_t i = 0; i < kTransposed; ++i) pack(row + i, s, Kind::steps(kc));
    }
  }
  const int64_t runs = col == 1 ? whole / Kind::kLanes * Kind::kLanes : 0;
  for (; row < end; ++row) {
    if (runs > 0) Kind::pack_run(dst + (row - begin) * ld, src + rows.at(row), runs);
    pack(row, runs, Kind::steps(kc));
  }
}

// A panel of b [kc, cols] (strides sk, sn) -> dst [step][width], width = cols rounded up to the lanes. What stands in
// the columns beyond cols is never part of a result, but it is multiplied too, and subnormals left there would slow it
// down: zeros, or with pack_transposed the last column again. The work comes in `parts`, to be spread between others;
// each part reads and writes its own place.
template <class Kind>
struct ColumnPanel {
  static constexpr int64_t kParts = 8;
  const char* src = nullptr;
  int64_t item = 0, sk = 0, sn = 0, kc = 0, cols = 0, width = 0;  // bytes of an element, strides in elements
  // Where b is made (see Gemm): what from, and the panel's first column and element of k. sk is 1 then, and src null.
  MakeB make = nullptr;
  const void* from = nullptr;
  int64_t first_column = 0, first_k = 0;

  // `elements` of k further on, of which `count` are left.
  ColumnPanel advanced(int64_t elements, int64_t count) const {
    ColumnPanel p = *this;
    if (make == nullptr) p.src += elements * sk * item;
    p.first_k += elements;
    p.kc = count;
    return p;
  }
  bool by_columns() const { return sk == 1 && sn != 1; }
  int64_t begin(int64_t part) const {
    return by_columns() ? ceil_div(ceil_div(width, 16) * part, kParts) * 16 : Kind::steps(kc) * part / kParts;
  }
  // Parts [part, end) as lines of memory.
  Prefetch prefetch(int64_t part, int64_t end, int64_t calls) const {
    Prefetch p;
    if ((sk != 1 && sn != 1) || make != nullptr) return p;
    const int64_t first = begin(part);
    const int64_t rows = by_columns() ? least(begin(end), cols) - first
                                      : least(begin(end) * Kind::kPerStep, kc) - first * Kind::kPerStep;
    if (rows <= 0) return p;
    const int64_t bytes = (by_columns() ? kc : most(1, least(cols, sk))) * item;
    p.row = src + (by_columns() ? first * sn : first * Kind::kPerStep * sk) * item;
    p.row_stride = (by_columns() ? sn : sk) * item;
    p.row_lines = ceil_div(bytes, 64);
    p.rows_left = rows;
    p.per_call = ceil_div(p.row_lines * rows, most(calls, 1));
    return p;
  }
  template <class Src>
  void pack(typename Kind::Packed* dst, int64_t part, int64_t end) const {
#if ISOTILE_HAS_BF16_DOT
    if constexpr (std::is_same_v<Kind, PairKind> && std::is_same_v<Src, BFloat16>)
      if (make != nullptr) return pack_made(dst, part, end);
#endif
    if constexpr (std::is_same_v<Src, typename Kind::Packed> && Kind::kPerStep == 2) return;  // they are read in place
    else if constexpr (std::is_same_v<Src, uint32_t>) pack_pairs(dst, part, end);
    else pack_elements<Src>(dst, part, end);
  }

 private:
  // Pairs of bfloat16 as two steps.
  void pack_pairs(typename Kind::Packed* dst, int64_t part, int64_t end) const {
    for (int64_t s = begin(part); s < begin(end); ++s) {
      const uint32_t* p = reinterpret_cast<const uint32_t*>(src) + s / 2 * kPanelColumns;
      for (int64_t j = 0; j < width; ++j)
        dst[s * width + j] = to_float(BFloat16{static_cast<uint16_t>(p[j] >> (s % 2 * 16))});
    }
  }

  template <class Src>
  void pack_elements(typename Kind::Packed* dst, int64_t part, int64_t end) const {
    const Src* src = reinterpret_cast<const Src*>(this->src);
    constexpr int64_t kPer = Kind::kPerStep;
    const int64_t steps = Kind::steps(kc), b0 = begin(part), b1 = begin(end);
    if (sn == 1) {
      for (int64_t s = b0; s < b1; ++s) {
        const Src* p = src + s * kPer * sk;
        int64_t j = 0;
        for (; j + Kind::kLanes <= cols; j += Kind::kLanes)
          Kind::store(Kind::template lanes<true>(p + j, sk, kc - s * kPer, 0), dst + s * width + j);
        if (j < cols) Kind::store(Kind::template lanes<false>(p + j, sk, kc - s * kPer, cols - j), dst + s * width + j);
      }
      return;
    }
    int64_t s0 = 0, s1 = steps, j0 = 0, j1 = cols;
    const auto clear_last_lanes = [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) Kind::store(Kind::zero(), dst + (s + 1) * width - Kind::kLanes);
    };
    if (by_columns()) {
      j0 = b0;
      j1 = least(b1, cols);
      if (cols < width && b0 < cols && cols <= b1) clear_last_lanes(0, steps);
      s0 = pack_transposed<Kind>(dst, src, sn, kc / kPer, cols, width, j0, j1);
    } else {
      s0 = b0;
      s1 = b1;
      if (cols < width) clear_last_lanes(b0, b1);
    }
    for (int64_t s = s0; s < s1; ++s) {
      const Src* p = src + s * kPer * sk;
      for (int64_t j = j0; j < j1; ++j) dst[s * width + j] = Kind::pack(p + j * sn, sk, kc - s * kPer);
    }
  }

#if ISOTILE_HAS_BF16_DOT
  void pack_made(typename Kind::Packed* dst, int64_t part, int64_t end) const {
    constexpr int64_t kAtOnce = 256;
    alignas(64) BFloat16 rows[16 * kAtOnce];
    for (int64_t j = begin(part); j < least(begin(end), width); j += 16) {
      const int64_t columns = least(16, cols - j);
      for (int64_t k = 0; k < kc; k += kAtOnce) {
        const int64_t count = least(kAtOnce, kc - k), s0 = k / 2, s1 = Kind::steps(k + count);
        make(from, first_column + j, columns, first_k + k, count, rows, kAtOnce);
        for (int64_t s = s0; s < s1; s += 16) {
          const Block16 block = transpose_block<Kind>(rows + 2 * (s - s0), kAtOnce, columns - 1, 0);
          float* to = reinterpret_cast<float*>(dst + s * width + j);
          for (int64_t i = 0; i < least(16, s1 - s); ++i) _mm512_storeu_ps(to + i * width, block.step[i]);
        }
      }
    }
  }
#endif
};

// Where element (k, j) of b lies.
inline int64_t offset_of_b(const Gemm& g, int64_t k, int64_t j) {
  const int64_t column = g.b_panel != 0 ? j / kPanelColumns * g.b_panel + j % kPanelColumns : j * g.b_n;
  return g.b_offset + k * g.b_k + column;
}

// Columns [j, j + cols) of chunk [k0, k0 + kc) of b; where b lies in panels, of one of them.
template <class Kind>
inline ColumnPanel<Kind> panel_of(const Gemm& g, int64_t item, int64_t k0, int64_t kc, int64_t j, int64_t cols) {
  const char* at = nullptr;
  if (g.make_b == nullptr) at = static_cast<const char*>(g.b) + offset_of_b(g, k0, j) * item;
  return {at, item, g.b_k, g.b_n, kc, cols, ceil_div(cols, Kind::kLanes) * Kind::kLanes, g.make_b, g.b, j, k0};
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
