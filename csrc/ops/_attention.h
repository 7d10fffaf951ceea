// What the attention kernels share: the problem as the kernel form states it, visibility, packing, the register tile,
// and the transform from q.k to a score.
//
// Rows. All query heads of one key/value head see the same keys, so the rows of one task are (query i, head g of the
// group), numbered i * group + g: neighbours stand at neighbouring positions, and K and V are packed once for all.
// Hidden keys. Apart from the mask, what a row sees is one interval [lo, hi), and lo and hi never fall as the row
// number grows. A score that is hidden becomes -inf, its weight 0. That is not enough where the weight meets NaN or
// infinity in the next product: such elements are taken out of the packed operand, and added for visible pairs alone.
#pragma once
#include <cstdint>

#include "base/dtype.h"
#include "base/parallel.h"
#include "base/scratch.h"
#include "base/tensor_view.h"
#include "simd/math.h"
#include "simd/tile.h"
#include "simd/vec.h"

namespace isotile::ISOTILE_ISA::attention_detail {

constexpr int kTileRows = 6;  // of the register tile
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kTileVecs = 4;  // 6 x 4 accumulators of 32 registers
#else
constexpr int kTileVecs = 2;  // 6 x 2 of 16
#endif

ISOTILE_INLINE constexpr int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }
ISOTILE_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
ISOTILE_INLINE int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

// One lease of scratch memory, cut into aligned pieces. A first pass with no memory measures what the second one takes.
struct Arena {
  char* base = nullptr;
  int64_t used = 0;
  template <class T>
  ISOTILE_INLINE T* take(int64_t count) {
    T* piece = reinterpret_cast<T*>(reinterpret_cast<uintptr_t>(base) + static_cast<uintptr_t>(used));
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return piece;
  }
};

ISOTILE_INLINE float exp2_scalar(float x) { return __builtin_exp2f(x); }
ISOTILE_INLINE double exp2_scalar(double x) { return __builtin_exp2(x); }

// How operands of dtype T are packed. A word holds kPair neighbours along the reduced dimension. With kTiles the
// products go over matrix tiles (tile.h), else over the register tile below. Rows are taken kStrip at a time, columns
// in multiples of kColumns, and the words of the reduced dimension in multiples of kDepth.
template <class T>
struct Packed {
  using Acc = Accumulator<T>;
  using Elem = Acc;
  using Word = Acc;
  using BVec = Vec<Acc>;
  static constexpr int kPair = 1, kStrip = kTileRows, kColumns = Vec<Acc>::kLanes, kDepth = 1;
  static constexpr bool kTiles = false;
  static ISOTILE_INLINE BVec load(const Word* p) { return Vec<Acc>::load(p); }
  static ISOTILE_INLINE BVec splat(const Word* p) { return Vec<Acc>::set1(*p); }
  static ISOTILE_INLINE Vec<Acc> dot(BVec a, BVec b, Vec<Acc> c) { return fma(a, b, c); }
};
#if ISOTILE_HAS_BF16_DOT
template <>
struct Packed<BFloat16> {
  using Acc = float;
  using Elem = uint16_t;
  using Word = uint32_t;
  using BVec = __m512bh;
  static constexpr bool kTiles = ISOTILE_HAS_TILES;
  static constexpr int kPair = 2, kStrip = kTiles ? 64 : kTileRows;
  static constexpr int kColumns = kTiles ? 32 : 16, kDepth = kTiles ? 16 : 1;
  static ISOTILE_INLINE BVec load(const Word* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static ISOTILE_INLINE BVec splat(const Word* p) { return (__m512bh)_mm512_set1_epi32(static_cast<int>(*p)); }
  static ISOTILE_INLINE Vec<float> dot(BVec a, BVec b, Vec<float> c) { return Vec<float>{_mm512_dpbf16_ps(c.v, b, a)}; }
};
#endif

enum class Start { kZero, kAdd, kScale };  // of a tile: from 0, from c, from c times a factor for each row

// c[6][NV vectors] = start + a [6, kk] . b [kk, NV vectors]; a(r, k) = a[r * a_row + k * a_k]. One chain of fused
// multiply-adds for each element in the order of k, so the result does not depend on how the caller cuts rows and
// columns.
template <class T, int NV, Start kStart>
ISOTILE_INLINE void tile_nv(const typename Packed<T>::Word* a, int64_t a_row, int64_t a_k,
                            const typename Packed<T>::Word* b, int64_t b_k, int64_t kk, Accumulator<T>* c,
                            int64_t c_row, const Accumulator<T>* factor) {
  using P = Packed<T>;
  using V = Vec<Accumulator<T>>;
  V acc[kTileRows][NV];
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) {
      if constexpr (kStart == Start::kZero) {
        acc[r][n] = V::zero();
      } else {
        acc[r][n] = V::load(c + r * c_row + n * V::kLanes);
        if constexpr (kStart == Start::kScale) acc[r][n] = acc[r][n] * V::set1(factor[r]);
      }
    }
  }
  for (int64_t k = 0; k < kk; ++k) {
    typename P::BVec bv[NV];
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) bv[n] = P::load(b + n * V::kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kTileRows; ++r) {
      const typename P::BVec av = P::splat(a + r * a_row);
#pragma GCC unroll 8
      for (int n = 0; n < NV; ++n) acc[r][n] = P::dot(av, bv[n], acc[r][n]);
    }
    a += a_k;
    b += b_k;
  }
#pragma GCC unroll 8
  for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 8
    for (int n = 0; n < NV; ++n) acc[r][n].store(c + r * c_row + n * V::kLanes);
  }
}

template <class T, Start kStart>
__attribute__((noinline)) void tile(int vecs, const typename Packed<T>::Word* a, int64_t a_row, int64_t a_k,
                                    const typename Packed<T>::Word* b, int64_t b_k, int64_t kk, Accumulator<T>* c,
                                    int64_t c_row, const Accumulator<T>* factor) {
  if (vecs >= kTileVecs) return tile_nv<T, kTileVecs, kStart>(a, a_row, a_k, b, b_k, kk, c, c_row, factor);
  if constexpr (kTileVecs > 2) {
    if (vecs == 3) return tile_nv<T, 3, kStart>(a, a_row, a_k, b, b_k, kk, c, c_row, factor);
    if (vecs == 2) return tile_nv<T, 2, kStart>(a, a_row, a_k, b, b_k, kk, c, c_row, factor);
  }
  tile_nv<T, 1, kStart>(a, a_row, a_k, b, b_k, kk, c, c_row, factor);
}

template <class T>
constexpr int lanes() {
  return Vec<Accumulator<T>>::kLanes;
}
template <class T>
constexpr int panel_width() {
  return Packed<T>::kTiles ? 16 : kTileVecs * lanes<T>();
}
// Words in a natural (row-major) packed row of n elements.
template <class T>
ISOTILE_INLINE int64_t row_words(int64_t n) {
  return max64(round_up((n + Packed<T>::kPair - 1) / Packed<T>::kPair, lanes<T>()), lanes<T>());
}
// Words of the reduced dimension of n elements that products go over.
template <class T>
ISOTILE_INLINE int64_t depth_words(int64_t n) {
  return round_up((n + Packed<T>::kPair - 1) / Packed<T>::kPair, Packed<T>::kDepth);
}
// Columns of an accumulator row, and of a row of pairs.
template <class T>
ISOTILE_INLINE int64_t row_lanes(int64_t n) {
  return max64(round_up(n, lanes<T>()), lanes<T>());
}

// A weight as the next product takes it. The conversion instruction flushes subnormals; so does the dot instruction.
template <class A>
ISOTILE_INLINE void store_weights(Vec<A> x, A* to) {
  x.store(to);
}
ISOTILE_INLINE void store_weights(Vec<float> x, BFloat16* to) {
#if ISOTILE_HAS_BF16_DOT
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(x.v));
#else
  x.store(to);
#endif
}

#if ISOTILE_HAS_TILES
constexpr tiles::Config kAllTiles = tiles::Config::uniform();

// c [16 kRows, 16 kColumns] = (or +=) a [16 kRows, 16 steps words] . b, with b's columns 16 .. 31 b_next bytes behind
// the first; all strides in bytes.
template <int kRows, int kColumns, bool kAdd>
ISOTILE_INLINE void tile_block(const char* a, int64_t a_row, const char* b, int64_t b_row, int64_t b_next,
                               int64_t steps, char* c, int64_t c_row) {
  const char* a1 = a + 16 * a_row;
  const char* b1 = b + b_next;
  char* c1 = c + 16 * c_row;
  if constexpr (kAdd) {
    tiles::load<0>(c, c_row);
    if constexpr (kColumns == 2) tiles::load<1>(c + 64, c_row);
    if constexpr (kRows == 2) tiles::load<2>(c1, c_row);
    if constexpr (kRows == 2 && kColumns == 2) tiles::load<3>(c1 + 64, c_row);
  } else {
    tiles::zero<0>();
    if constexpr (kColumns == 2) tiles::zero<1>();
    if constexpr (kRows == 2) tiles::zero<2>();
    if constexpr (kRows == 2 && kColumns == 2) tiles::zero<3>();
  }
  for (int64_t s = 0; s < steps; ++s) {
    tiles::load<4>(a + s * 64, a_row);
    tiles::load<6>(b + s * 16 * b_row, b_row);
    tiles::dot_bf16<0, 4, 6>();
    if constexpr (kColumns == 2) {
      tiles::load<7>(b1 + s * 16 * b_row, b_row);
      tiles::dot_bf16<1, 4, 7>();
    }
    if constexpr (kRows == 2) {
      tiles::load<5>(a1 + s * 64, a_row);
      tiles::dot_bf16<2, 5, 6>();
      if constexpr (kColumns == 2) tiles::dot_bf16<3, 5, 7>();
    }
  }
  tiles::store<0>(c, c_row);
  if constexpr (kColumns == 2) tiles::store<1>(c + 64, c_row);
  if constexpr (kRows == 2) tiles::store<2>(c1, c_row);
  if constexpr (kRows == 2 && kColumns == 2) tiles::store<3>(c1 + 64, c_row);
}

// rows x columns, both multiples of 16; b_next as above, between every two neighbouring sixteens of columns.
template <bool kAdd>
ISOTILE_INLINE void tile_product(int64_t rows, int64_t columns, const void* a, int64_t a_row, const void* b,
                                 int64_t b_row, int64_t b_next, int64_t steps, float* c, int64_t c_row) {
  for (int64_t i = 0; i < rows; i += 32) {
    const char* from_a = static_cast<const char*>(a) + i * a_row;
    for (int64_t j = 0; j < columns; j += 32) {
      const char* from_b = static_cast<const char*>(b) + j / 16 * b_next;
      char* to = reinterpret_cast<char*>(c) + i * c_row + j * 4;
      const bool two_rows = rows - i > 16, two_columns = columns - j > 16;
      if (two_rows && two_columns) {
        tile_block<2, 2, kAdd>(from_a, a_row, from_b, b_row, b_next, steps, to, c_row);
      } else if (two_rows) {
        tile_block<2, 1, kAdd>(from_a, a_row, from_b, b_row, b_next, steps, to, c_row);
      } else if (two_columns) {
        tile_block<1, 2, kAdd>(from_a, a_row, from_b, b_row, b_next, steps, to, c_row);
      } else {
        tile_block<1, 1, kAdd>(from_a, a_row, from_b, b_row, b_next, steps, to, c_row);
      }
    }
  }
}
#endif

// What a task opens before its products.
template <class T>
struct ProductScope {
#if ISOTILE_HAS_TILES
  tiles::Scope scope;
  ISOTILE_INLINE ProductScope() {
    if constexpr (Packed<T>::kTiles) scope.use(kAllTiles);
  }
#else
  ISOTILE_INLINE ProductScope() {}
#endif
};

// Six rows against transposed panels: c[6][c0, c1) = a . panels, c0 and c1 multiples of the lanes.
template <class T>
ISOTILE_INLINE void tile_panels(const typename Packed<T>::Word* a, int64_t a_row,
                                const typename Packed<T>::Word* panels, int64_t kk, int64_t c0, int64_t c1,
                                Accumulator<T>* c, int64_t c_row) {
  constexpr int64_t kWidth = panel_width<T>();
  for (int64_t j = c0; j < c1;) {
    const int64_t panel = j / kWidth, end = min64(c1, (panel + 1) * kWidth);
    tile<T, Start::kZero>(static_cast<int>((end - j) / lanes<T>()), a, a_row, 1,
                          panels + panel * kk * kWidth + (j - panel * kWidth), kWidth, kk, c + j, c_row, nullptr);
    j = end;
  }
}
// Six rows against row-major b [kk, columns], all columns.
template <class T, Start kStart>
ISOTILE_INLINE void tile_rows(const typename Packed<T>::Word* a, int64_t a_row, int64_t a_k,
                              const typename Packed<T>::Word* b, int64_t b_k, int64_t kk, int64_t columns,
                              Accumulator<T>* c, int64_t c_row, const Accumulator<T>* factor) {
  constexpr int64_t kWidth = panel_width<T>();
  for (int64_t j = 0; j < columns; j += kWidth) {
    tile<T, kStart>(static_cast<int>((min64(columns, j + kWidth) - j) / lanes<T>()), a, a_row, a_k, b + j, b_k, kk,
                    c + j, c_row, factor);
  }
}

template <class A>
ISOTILE_INLINE void scale_row(A* row, int64_t columns, A factor) {
  if (factor == 1) return;
  const Vec<A> f = Vec<A>::set1(factor);
  for (int64_t i = 0; i < columns; i += Vec<A>::kLanes) (Vec<A>::load(row + i) * f).store(row + i);
}
// A strip of `rows` rows against transposed panels: c[rows][c0, c1) = a . panels; c0 and c1 multiples of kColumns.
template <class T>
ISOTILE_INLINE void strip_panels(int64_t rows, const typename Packed<T>::Word* a, int64_t a_row,
                                 const typename Packed<T>::Word* panels, int64_t kk, int64_t c0, int64_t c1,
                                 Accumulator<T>* c, int64_t c_row) {
#if ISOTILE_HAS_TILES
  if constexpr (Packed<T>::kTiles) {
    tile_product<false>(rows, c1 - c0, a, 4 * a_row, panels + c0 * kk, 64, 64 * kk, kk / 16, c + c0, 4 * c_row);
    return;
  }
#endif
  (void)rows;
  tile_panels<T>(a, a_row, panels, kk, c0, c1, c, c_row);
}
// A strip against row-major b [kk words, columns]: c = c (kScale: times a factor for each row) + a . b; kk a multiple
// of kDepth.
template <class T, Start kStart>
ISOTILE_INLINE void strip_rows(int64_t rows, const typename Packed<T>::Word* a, int64_t a_row,
                               const typename Packed<T>::Word* b, int64_t kk, int64_t columns, Accumulator<T>* c,
                               int64_t c_row, const Accumulator<T>* factor) {
#if ISOTILE_HAS_TILES
  if constexpr (Packed<T>::kTiles) {
    for (int64_t r = 0; kStart == Start::kScale && r < rows; ++r) scale_row(c + r * c_row, columns, factor[r]);
    tile_product<true>(rows, columns, a, 4 * a_row, b, 4 * columns, 64, kk / 16, c, 4 * c_row);
    return;
  }
#endif
  (void)rows;
  tile_rows<T, kStart>(a, a_row, 1, b, columns, kk, columns, c, c_row, factor);
}

// ---- packing ----

template <class T>
struct RowSource {  // rows of one key/value head, or of the group of query heads that reads it
  const T* base;
  int64_t stride_seq, stride_head, stride_col, group;
  ISOTILE_INLINE const T* row(int64_t r) const {
    return group == 1 ? base + r * stride_seq : base + r / group * stride_seq + r % group * stride_head;
  }
};

// `count` rows of n elements from row `first`, converted, into dst [padded, words]; everything else 0.
template <class T>
void gather_rows(const RowSource<T>& source, int64_t first, int64_t count, int64_t padded, int64_t n,
                 typename Packed<T>::Word* dst, int64_t words) {
  using P = Packed<T>;
  for (int64_t r = 0; r < padded; ++r, dst += words) {
    if (r >= count) {
      for (int64_t i = 0; i < words; ++i) dst[i] = 0;
      continue;
    }
    const T* row = source.row(first + r);
    const int64_t stride = source.stride_col;
    if constexpr (P::kPair == 1) {
      using V = Vec<typename P::Acc>;
      for (int64_t i = 0; i < words; i += V::kLanes) {
        const int64_t left = n - i;
        if (left <= 0) {
          V::zero().store(dst + i);
        } else if (stride == 1) {
          (left >= V::kLanes ? V::load(row + i) : V::load(row + i, static_cast<int>(left))).store(dst + i);
        } else {
          V::load_strided(row + i * stride, stride, static_cast<int>(min64(left, V::kLanes))).store(dst + i);
        }
      }
    } else {
      uint16_t* out = reinterpret_cast<uint16_t*>(dst);
      if (stride == 1) {
        __builtin_memcpy(out, row, static_cast<size_t>(n) * sizeof(uint16_t));
      } else {
        for (int64_t i = 0; i < n; ++i) out[i] = row[i * stride].bits;
      }
      for (int64_t i = n; i < words * 2; ++i) out[i] = 0;
    }
  }
}

// The same where the rows lie in memory as dst would, and need no filling up: there; else gathered into dst.
template <class T>
ISOTILE_INLINE const typename Packed<T>::Word* packed_rows(const RowSource<T>& source, int64_t first, int64_t count,
                                                           int64_t padded, int64_t n, typename Packed<T>::Word* dst,
                                                           int64_t words) {
  if constexpr (sizeof(T) == sizeof(typename Packed<T>::Word)) {
    const bool dense = source.group == 1 && source.stride_col == 1 && source.stride_seq == words && n == words;
    if (dense && count == padded && count > 0) return source.row(first);
  }
  gather_rows<T>(source, first, count, padded, n, dst, words);
  return dst;
}

#if defined(__AVX512F__)
// (The masks are all ones: GCC 12 warns about the forms without.)
ISOTILE_INLINE void transpose_16x16(const void* from, int64_t from_row, void* to, int64_t to_row) {
  constexpr __mmask16 kAll = 0xffff;
  const float* src = static_cast<const float*>(from);
  float* dst = static_cast<float*>(to);
  __m512 a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(src + i * from_row);
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    b[2 * i] = _mm512_maskz_unpacklo_ps(kAll, a[2 * i], a[2 * i + 1]);
    b[2 * i + 1] = _mm512_maskz_unpackhi_ps(kAll, a[2 * i], a[2 * i + 1]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
#pragma GCC unroll 16
    for (int h = 0; h < 2; ++h) {
      const __m512d x = _mm512_castps_pd(b[4 * i + h]), y = _mm512_castps_pd(b[4 * i + 2 + h]);
      a[4 * i + 2 * h] = _mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, x, y));
      a[4 * i + 2 * h + 1] = _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, x, y));
    }
  }
  // a[4 i + c] holds, in 128-bit lane l, column 4 l + c of rows 4 i .. 4 i + 3
#pragma GCC unroll 16
  for (int c = 0; c < 4; ++c) {
    const __m512 p = _mm512_maskz_shuffle_f32x4(kAll, a[c], a[4 + c], 0x88),
                 q = _mm512_maskz_shuffle_f32x4(kAll, a[c], a[4 + c], 0xdd);
    const __m512 s = _mm512_maskz_shuffle_f32x4(kAll, a[8 + c], a[12 + c], 0x88),
                 t = _mm512_maskz_shuffle_f32x4(kAll, a[8 + c], a[12 + c], 0xdd);
    _mm512_storeu_ps(dst + (c)*to_row, _mm512_maskz_shuffle_f32x4(kAll, p, s, 0x88));
    _mm512_storeu_ps(dst + (4 + c) * to_row, _mm512_maskz_shuffle_f32x4(kAll, q, t, 0x88));
    _mm512_storeu_ps(dst + (8 + c) * to_row, _mm512_maskz_shuffle_f32x4(kAll, p, s, 0xdd));
    _mm512_storeu_ps(dst + (12 + c) * to_row, _mm512_maskz_shuffle_f32x4(kAll, q, t, 0xdd));
  }
}
#endif

// natural [rows, words] -> panels [rows / width][kk][width]; rows is a multiple of the lanes.
template <class T>
void transpose_panels(const typename Packed<T>::Word* natural, int64_t rows, int64_t words, int64_t kk,
                      typename Packed<T>::Word* panels) {
  constexpr int64_t kWidth = panel_width<T>();
  constexpr int64_t kStep = lanes<T>();
  for (int64_t j = 0; j < rows; j += kStep) {
    typename Packed<T>::Word* out = panels + j / kWidth * kk * kWidth + j % kWidth;
    const typename Packed<T>::Word* in = natural + j * words;
    int64_t k = 0;
#if defined(__AVX512F__)
    if constexpr (sizeof(*in) == 4) {
      for (; k + 16 <= kk; k += 16) transpose_16x16(in + k, words, out + k * kWidth, kWidth);
    }
#endif
    for (; k < kk; ++k) {
      for (int64_t r = 0; r < kStep; ++r) out[k * kWidth + r] = in[r * words + k];
    }
  }
}

// Rows 2 r and 2 r + 1 of natural bf16 [rows, words] -> pairs [rows / 2, columns] words; rows is even.
ISOTILE_INLINE void pair_rows(const uint32_t* natural, int64_t rows, int64_t words, uint32_t* pairs, int64_t columns) {
  for (int64_t r = 0; r < rows; r += 2) {
    const uint16_t* low = reinterpret_cast<const uint16_t*>(natural + r * words);
    const uint16_t* high = reinterpret_cast<const uint16_t*>(natural + (r + 1) * words);
    uint32_t* out = pairs + r / 2 * columns;
    const int64_t n = min64(columns, words * 2);
    for (int64_t i = 0; i < n; ++i) out[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
    for (int64_t i = n; i < columns; ++i) out[i] = 0;
  }
}

// Element (row, i) of a natural buffer, widened.
template <class T>
ISOTILE_INLINE Accumulator<T> natural_at(const typename Packed<T>::Word* natural, int64_t words, int64_t row,
                                         int64_t i) {
  if constexpr (Packed<T>::kPair == 1) {
    return natural[row * words + i];
  } else {
    return to_float(BFloat16{reinterpret_cast<const uint16_t*>(natural + row * words)[i]});
  }
}

template <class T>
bool all_finite(const typename Packed<T>::Word* natural, int64_t count) {
  if constexpr (Packed<T>::kPair == 1) {
    using V = Vec<Accumulator<T>>;
    V sum = V::zero();  // x * 0 is NaN unless x is finite
    for (int64_t i = 0; i < count; i += V::kLanes) sum = fma(V::load(natural + i), V::zero(), sum);
    return reduce_add(sum) == 0;
  } else {
    const uint16_t* bits = reinterpret_cast<const uint16_t*>(natural);
    uint16_t largest = 0;
    for (int64_t i = 0; i < count * 2; ++i) {
      const uint16_t exponent = bits[i] & 0x7f80u;
      largest = exponent > largest ? exponent : largest;
    }
    return largest != 0x7f80u;
  }
}

// The elements of a natural buffer that are not finite, apart from the rest.
template <class T>
struct Outcasts {
  using A = Accumulator<T>;
  A* values = nullptr;  // [rows, words * kPair], 0 where the element is finite
  int64_t rows = 0, width = 0;
  bool any = false;

  static int64_t elements(int64_t max_rows, int64_t words) { return max_rows * words * Packed<T>::kPair; }

  // Returns the rows with 0 in the place of what is not finite: `natural` itself if there is none, else `cleaned`
  // (which may be `natural`).
  const typename Packed<T>::Word* collect(const typename Packed<T>::Word* natural, int64_t row_count, int64_t words,
                                          typename Packed<T>::Word* cleaned) {
    using Elem = typename Packed<T>::Elem;
    rows = row_count;
    width = words * Packed<T>::kPair;
    any = !all_finite<T>(natural, row_count * words);
    if (!any) return natural;
    const Elem* from = reinterpret_cast<const Elem*>(natural);
    Elem* to = reinterpret_cast<Elem*>(cleaned);
    for (int64_t i = 0; i < rows * width; ++i) {
      const A x = natural_at<T>(natural, 0, 0, i);
      const bool finite = x - x == 0;
      values[i] = finite ? A{0} : x;
      to[i] = finite ? from[i] : Elem{0};
    }
    return cleaned;
  }
  // to[0, n) += weight * row; to's elements are `stride` apart.
  ISOTILE_INLINE void add(int64_t row, A weight, A* to, int64_t n, int64_t stride = 1) const {
    const A* x = values + row * width;
    for (int64_t i = 0; i < n; ++i) {
      if (x[i] != 0) to[i * stride] += weight * x[i];
    }
  }
};

// ---- the problem ----

constexpr double kLog2E = 1.4426950408889634074;
constexpr double kLn2 = 0.69314718055994530942;

ISOTILE_INLINE int64_t batch_offset(const TensorView& t, int batch_dims, int64_t b) {
  int64_t offset = 0;
  for (int i = batch_dims - 1; i >= 0; --i) {
    offset += b % t.size[i] * t.stride[i];
    b /= t.size[i];
  }
  return offset;
}

ISOTILE_INLINE double float_at(const TensorView& t, int64_t offset) {
  switch (t.dtype) {
    case DType::kFloat64:
      return static_cast<const double*>(t.data)[offset];
    case DType::kBFloat16:
      return to_double(static_cast<const BFloat16*>(t.data)[offset]);
    case DType::kFloat16:
      return to_double(static_cast<const Float16*>(t.data)[offset]);
    default:
      return static_cast<const float*>(t.data)[offset];
  }
}
ISOTILE_INLINE void set_float(const TensorView& t, int64_t offset, double x) {
  switch (t.dtype) {
    case DType::kFloat64:
      static_cast<double*>(t.data)[offset] = x;
      return;
    case DType::kBFloat16:
      from_double(x, static_cast<BFloat16*>(t.data) + offset);
      return;
    case DType::kFloat16:
      from_double(x, static_cast<Float16*>(t.data) + offset);
      return;
    default:
      static_cast<float*>(t.data)[offset] = static_cast<float>(x);
  }
}
ISOTILE_INLINE int64_t int_at(const TensorView& t, int64_t offset) {
  return t.dtype == DType::kInt32 ? static_cast<const int32_t*>(t.data)[offset]
                                  : static_cast<const int64_t*>(t.data)[offset];
}

struct Problem {
  const TensorView *q, *k, *v, *mask, *sinks, *slopes, *seqlens, *seed;  // null: absent, from mask on
  int batch_dims;
  int64_t batch, hq, hk, group, sq, sk, d, dv, rows;  // rows of one task: group * sq
  double dropout_p, scale, softcap;
  bool causal, bottom_right;
  int64_t window_left, window_right;
  bool general;                              // scores need more than the scale
  double score_scale;                        // applied to q.k before anything else; 1 when exp2_factor holds it
  double exp2_factor;                        // from score to the exponent of 2
  uint32_t seed_low, seed_high, drop_below;  // dropped where r >> 8 < drop_below
  double keep_scale;
};

// inputs: query, key, value, attn_mask, sinks, alibi_slopes, seqlens_k, dropout_seed
ISOTILE_INLINE Problem read_problem(const TensorView* t, const double* s) {
  const auto optional = [](const TensorView& view) { return view.present() ? &view : nullptr; };
  Problem p;
  p.q = &t[0];
  p.k = &t[1];
  p.v = &t[2];
  p.mask = optional(t[3]);
  p.sinks = optional(t[4]);
  p.slopes = optional(t[5]);
  p.seqlens = optional(t[6]);
  p.seed = optional(t[7]);
  const int nb = p.batch_dims = t[0].ndim - 3;
  p.batch = 1;
  for (int i = 0; i < nb; ++i) p.batch *= t[0].size[i];
  p.hq = t[0].size[nb];
  p.sq = t[0].size[nb + 1];
  p.d = t[0].size[nb + 2];
  p.hk = t[1].size[nb];
  p.sk = t[1].size[nb + 1];
  p.dv = t[2].size[nb + 2];
  p.group = p.hk > 0 ? p.hq / p.hk : 0;
  p.rows = p.group * p.sq;
  p.dropout_p = s[0];
  p.causal = s[1] != 0;
  p.scale = s[2];
  p.bottom_right = s[3] != 0;
  const auto window = [](double w) { return w < 0 ? int64_t{-1} : static_cast<int64_t>(w < 1e18 ? w : 1e18); };
  p.window_left = window(s[4]);
  p.window_right = window(s[5]);
  p.softcap = s[6];
  // A scale that is not positive (or NaN) must be applied before the maximum is taken.
  p.general = p.mask || p.slopes || p.softcap != 0 || !(p.scale > 0 && p.scale < 1e30);
  p.score_scale = p.general ? p.scale : 1;
  p.exp2_factor = p.general ? kLog2E : p.scale * kLog2E;
  p.seed_low = p.seed_high = p.drop_below = 0;
  p.keep_scale = 1;
  if (p.dropout_p > 0 && p.seed) {
    const uint64_t seed = static_cast<uint64_t>(int_at(*p.seed, 0));
    p.seed_low = static_cast<uint32_t>(seed);
    p.seed_high = static_cast<uint32_t>(seed >> 32);
    const double threshold = p.dropout_p * 16777216.0;
    p.drop_below = static_cast<uint32_t>(threshold);
    if (p.drop_below < threshold) ++p.drop_below;
    p.keep_scale = p.dropout_p < 1 ? 1 / (1 - p.dropout_p) : 0;
  }
  return p;
}

struct Row {
  int64_t lo, hi;  // the keys it sees, mask apart
  int64_t position, query, head;
  double slope;
  const char* mask;  // its row of the mask
};

// f(i) for i < count, by as many threads as `work` multiply-adds in all are worth: waking one costs some microseconds.
template <class F>
ISOTILE_INLINE void run_tasks(const Problem& p, int64_t count, const F& f) {
  constexpr double kSerialWork = 1 << 18;
  const double work = static_cast<double>(p.batch * p.hk) * static_cast<double>(p.rows * p.sk) *
                      static_cast<double>(p.d + p.dv);
  if (work > kSerialWork) return parallel_dynamic(count, f);
  for (int64_t i = 0; i < count; ++i) f(i);
}

// One batch entry and key/value head.
struct Group {
  const Problem* p;
  int64_t b, kv_head, keys, offset;
  const char* mask;

  ISOTILE_INLINE Group(const Problem& problem, int64_t batch_index, int64_t head)
      : p(&problem), b(batch_index), kv_head(head) {
    keys = p->sk;
    if (p->seqlens) keys = max64(0, min64(keys, int_at(*p->seqlens, batch_offset(*p->seqlens, p->batch_dims, b))));
    offset = p->bottom_right ? keys - p->sq : 0;
    mask = p->mask ? static_cast<const char*>(p->mask->data) +
                         item_size(p->mask->dtype) * batch_offset(*p->mask, p->batch_dims, b)
                   : nullptr;
  }
  ISOTILE_INLINE Row row(int64_t r) const {
    Row row;
    row.query = r / p->group;
    row.head = kv_head * p->group + r % p->group;
    row.position = row.query + offset;
    row.lo = p->window_left >= 0 ? max64(0, row.position - p->window_left) : 0;
    row.hi = keys;
    if (p->causal) row.hi = min64(row.hi, row.position + 1);
    if (p->window_right >= 0) row.hi = min64(row.hi, row.position + p->window_right + 1);
    row.hi = max64(row.hi, 0);
    row.slope = p->slopes ? float_at(*p->slopes, row.head * p->slopes->stride[0]) : 0;
    row.mask = nullptr;
    if (mask) {
      const int nb = p->batch_dims;
      row.mask =
          mask + item_size(p->mask->dtype) * (row.head * p->mask->stride[nb] + row.query * p->mask->stride[nb + 1]);
    }
    return row;
  }
  template <class T>
  ISOTILE_INLINE RowSource<T> keys_of(const TensorView& t) const {
    const int nb = p->batch_dims;
    return {static_cast<const T*>(t.data) + batch_offset(t, nb, b) + kv_head * t.stride[nb], t.stride[nb + 1],
            t.stride[nb], t.stride[nb + 2], 1};
  }
  template <class T>
  ISOTILE_INLINE RowSource<T> queries_of(const TensorView& t) const {
    const int nb = p->batch_dims;
    return {static_cast<const T*>(t.data) + batch_offset(t, nb, b) + kv_head * p->group * t.stride[nb],
            t.stride[nb + 1], t.stride[nb], t.stride[nb + 2], p->group};
  }
  // Offset of the (lse-shaped) element of a row.
  ISOTILE_INLINE int64_t row_offset(const TensorView& t, const Row& row) const {
    const int nb = p->batch_dims;
    return batch_offset(t, nb, b) + row.head * t.stride[nb] + row.query * t.stride[nb + 1];
  }
};

ISOTILE_INLINE bool mask_shows(const Problem& p, const Row& row, int64_t key) {
  if (!row.mask) return true;
  const int64_t offset = key * p.mask->stride[p.batch_dims + 2];
  if (p.mask->dtype == DType::kBool) return row.mask[offset] != 0;
  TensorView view = *p.mask;
  view.data = const_cast<char*>(row.mask);
  return float_at(view, offset) != -__builtin_inf();
}
ISOTILE_INLINE bool visible(const Problem& p, const Row& row, int64_t key) {
  return key >= row.lo && key < row.hi && mask_shows(p, row, key);
}

// ---- scores ----

template <class A, class M>
void add_mask(A* score, const M* mask, int64_t stride, int64_t n) {
  using V = Vec<A>;
  const V hidden = V::set1(-static_cast<A>(__builtin_inf()));
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const int left = static_cast<int>(min64(V::kLanes, n - i));
    const V m = stride == 1 ? V::load(mask + i, left) : V::load_strided(mask + i * stride, stride, left);
    select(m == hidden, hidden, V::load(score + i, left) + m).store(score + i, left);
  }
}

// q.k in score[c0, c1) (columns of the block that starts at key k0) -> the score, -inf where hidden. slope_out, when
// not null, gets d(score) / d(scale q.k) where the softcap makes it differ from 1.
template <class A>
void finish_scores(const Problem& p, const Row& row, int64_t k0, int64_t c0, int64_t c1, A* score, A* slope_out) {
  using V = Vec<A>;
  const A inf = static_cast<A>(__builtin_inf());
  const int64_t begin = max64(c0, min64(c1, row.lo - k0)), end = max64(begin, min64(c1, row.hi - k0));
  if (p.general) {
    if (p.softcap != 0) {
      const V inverse = V::set1(static_cast<A>(p.scale / p.softcap)), cap = V::set1(static_cast<A>(p.softcap));
      for (int64_t i = c0; i < c1; i += V::kLanes) {
        const V t = tanh(V::load(score + i) * inverse);
        (t * cap).store(score + i);
        if (slope_out) (V::set1(1) - t * t).store(slope_out + i);
      }
    } else {
      const V scale = V::set1(static_cast<A>(p.score_scale));
      for (int64_t i = c0; i < c1; i += V::kLanes) (V::load(score + i) * scale).store(score + i);
    }
    if (p.slopes) {
      const V step = V::iota(0), slope = V::set1(static_cast<A>(row.slope));
      for (int64_t i = c0; i < c1; i += V::kLanes) {
        const V away = V::set1(static_cast<A>(row.position - k0 - i)) - step;
        fnma(slope, abs(away), V::load(score + i)).store(score + i);
      }
    }
    if (row.mask && end > begin) {
      const int64_t stride = p.mask->stride[p.batch_dims + 2];
      const char* from = row.mask + (k0 + begin) * stride * item_size(p.mask->dtype);
      if (p.mask->dtype == DType::kBool) {
        for (int64_t i = 0; i < end - begin; ++i) score[begin + i] = from[i * stride] ? score[begin + i] : -inf;
      } else {
        dispatch_float(p.mask->dtype, [&](auto type) {
          using M = typename decltype(type)::type;
          add_mask<A, M>(score + begin, reinterpret_cast<const M*>(from), stride, end - begin);
        });
      }
    }
  }
  for (int64_t i = c0; i < begin; ++i) score[i] = -inf;
  for (int64_t i = end; i < c1; ++i) score[i] = -inf;
}

// keep[c0, c1) = 1 where the probability is kept, else 0. Philox-4x32-10, first word.
template <class A>
void draw_keep(const Problem& p, const Row& row, int64_t b, int64_t k0, int64_t c0, int64_t c1, A* keep) {
  const uint32_t query = static_cast<uint32_t>(row.query), head = static_cast<uint32_t>(b * p.hq + row.head);
  for (int64_t i = c0; i < c1; ++i) {
    uint32_t x0 = static_cast<uint32_t>(k0 + i), x1 = query, x2 = head, x3 = 0;
    uint32_t key0 = p.seed_low, key1 = p.seed_high;
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const uint64_t first = static_cast<uint64_t>(0xD2511F53u) * x0, second = static_cast<uint64_t>(0xCD9E8D57u) * x2;
      x0 = static_cast<uint32_t>(second >> 32) ^ x1 ^ key0;
      x1 = static_cast<uint32_t>(second);
      x2 = static_cast<uint32_t>(first >> 32) ^ x3 ^ key1;
      x3 = static_cast<uint32_t>(first);
      key0 += 0x9E3779B9u;
      key1 += 0xBB67AE85u;
    }
    keep[i] = (x0 >> 8) >= p.drop_below ? A{1} : A{0};
  }
}

}  // namespace isotile::ISOTILE_ISA::attention_detail
