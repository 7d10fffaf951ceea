// Quantised integers, many rows, on matrix tiles or without vpdpbusd (with it alone: _quantized_panels.h):
// y.T = weight @ x.T in blocks of kSide rows of the weight by kSide rows of x.
//
// The weight's rows are unpacked once into Q, k along the row, which is how a matrix tile (and a broadcast of four bytes)
// wants its first operand. x is quantised into tiles of [k][lanes of 32 bits], each lane the next elements of k of one
// row, which is how it wants the second. A group of the weight is summed exactly in int32, then scaled into float32 sums.
//
// Q is a byte; without tiles, whose place two older instructions take, it is 16 bits for int8 weights: their products two
// by two do not fit into 16 bits.
#pragma once
#include "base/scratch.h"
#include "ops/_gemm_pack.h"
#include "ops/_quantized_few_rows.h"
#include "simd/tile.h"

#if defined(__AVX2__) && (ISOTILE_HAS_TILES || !defined(__AVX512VNNI__))
namespace isotile {
namespace ISOTILE_ISA {

constexpr int64_t kLanesOfX = Vec<float>::kLanes;
constexpr int64_t kSide = 2 * kLanesOfX;  // of a block
constexpr int64_t kStep = 64;             // elements of k in one tile
constexpr int64_t kRowsOfWeight = kLanesOfX * 8;  // unpacked together: k of them stay in L2

// Without matrix tiles four-bit weights stay unsigned: a zero point times the sum of q is taken off each group's sum.
inline bool zeros_later(const QuantizedWeight& w) { return !ISOTILE_HAS_TILES && w.four_bits() && !w.has_offsets(); }

ISOTILE_INLINE void transpose_square(Vec<float> (&v)[kLanesOfX]) {
#if defined(__AVX512F__)
  __m512 m[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) m[i] = v[i].v;
  transpose_16x16(m);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) v[i].v = m[i];
#else
  __m256 t[8], r[8];
#pragma GCC unroll 4
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(v[i].v, v[i + 1].v);
    t[i + 1] = _mm256_unpackhi_ps(v[i].v, v[i + 1].v);
  }
#pragma GCC unroll 2
  for (int i = 0; i < 8; i += 4) {  // r[i + c]: rows i ... i + 3, columns c and 4 + c
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      r[i + 2 * h] = _mm256_shuffle_ps(t[i + h], t[i + h + 2], 0x44);
      r[i + 2 * h + 1] = _mm256_shuffle_ps(t[i + h], t[i + h + 2], 0xee);
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    v[c].v = _mm256_permute2f128_ps(r[c], r[4 + c], 0x20);
    v[4 + c].v = _mm256_permute2f128_ps(r[c], r[4 + c], 0x31);
  }
#endif
}

// Rows [i0, i0 + rows) of the weight [kRowsOfWeight][ld]; and zeros_later's zero points [row][groups]. Up to whole blocks
// zeros follow.
template <class Q>
inline void unpack_rows(const QuantizedWeight& w, int64_t i0, int64_t rows, Q* out, int64_t ld, int32_t* zeros,
                        RowFactors* f) {
  const int64_t pieces = ceil_div(w.k, kPiece);
  for (int64_t i = 0; i < rows; ++i) {
    const uint8_t* row = w.row(i0 + i);
    Q* to = out + i * ld;
    if (!w.four_bits()) {
      if constexpr (sizeof(Q) == 1) __builtin_memcpy(to, row, static_cast<size_t>(w.k));
      else
        for (int64_t l = 0; l < w.k; ++l) to[l] = static_cast<int8_t>(row[l]);
    } else {
      if (!w.has_offsets()) f->load(w, i0 + i);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const uint8_t* bytes = row + piece * (kPiece / 2);
        Q* at = to + piece * kPiece;
#if ISOTILE_HAS_TILES
        const __m512i low = _mm512_set1_epi8(15), codes = _mm512_loadu_si512(bytes);
        __m512i zero[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        if (!w.has_offsets()) {
          const int64_t per = f->per_piece;
          for (int h = 0; h < 2; ++h) {
            const int32_t a = f->zeros[per == 0 ? 0 : piece * per + (per == 4 ? 2 * h : per == 2 ? h : 0)];
            const int32_t b = per == 4 ? f->zeros[piece * per + 2 * h + 1] : a;
            zero[h] = _mm512_inserti64x4(_mm512_set1_epi8(static_cast<char>(a)),
                                         _mm256_set1_epi8(static_cast<char>(b)), 1);
          }
        }
        _mm512_storeu_si512(at, _mm512_sub_epi8(_mm512_and_si512(codes, low), zero[0]));
        _mm512_storeu_si512(at + 64, _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(codes, 4), low), zero[1]));
#else
        for (int64_t l = 0; l < kPiece / 2; ++l) {
          at[l] = static_cast<Q>(bytes[l] & 15);
          at[kPiece / 2 + l] = static_cast<Q>(bytes[l] >> 4);
        }
#endif
      }
    }
    __builtin_memset(to + w.k, 0, static_cast<size_t>(pieces * kPiece - w.k) * sizeof(Q));
    for (int64_t g = 0; g < w.groups && zeros_later(w); ++g) zeros[i * w.groups + g] = f->zeros[g];
  }
  for (int64_t i = rows; i < ceil_div(rows, kSide) * kSide; ++i) {
    __builtin_memset(out + i * ld, 0, static_cast<size_t>(pieces * kPiece) * sizeof(Q));
    for (int64_t g = 0; g < w.groups && zeros_later(w); ++g) zeros[i * w.groups + g] = 0;
  }
}

// c [kSide rows of the weight][kSide rows of x] = the sums over elements [k0, k0 + length) of k; length a multiple of 32.
// x: two columns of tiles, `column` bytes apart. `scope` is the thread's configuration of matrix tiles.
#if ISOTILE_HAS_TILES
constexpr tiles::Config kWhole = tiles::Config::uniform();
constexpr tiles::Config half_config() {  // 32 elements of k
  tiles::Config c;
  for (int t = 0; t < 4; ++t) c.set(t, 16, 64);
  for (int t = 4; t < 6; ++t) c.set(t, 16, 32);
  for (int t = 6; t < 8; ++t) c.set(t, 8, 64);
  return c;
}
constexpr tiles::Config kHalf = half_config();

inline void sum_block(const int8_t* w, int64_t ld, const uint8_t* x, int64_t column, int64_t k0, int64_t length,
                      int32_t* c) {
  tiles::zero<0>();
  tiles::zero<1>();
  tiles::zero<2>();
  tiles::zero<3>();
  const int64_t step = length < kStep ? length : kStep;
  for (int64_t k = k0; k < k0 + length; k += step) {
    const uint8_t* at = x + k * 16;
    tiles::load<4>(w + k, ld);
    tiles::load<6>(at, 64);
    tiles::dot_s8s8<0, 4, 6>();
    tiles::load<7>(at + column, 64);
    tiles::dot_s8s8<1, 4, 7>();
    tiles::load<5>(w + 16 * ld + k, ld);
    tiles::dot_s8s8<2, 5, 6>();
    tiles::dot_s8s8<3, 5, 7>();
  }
  tiles::store<0>(c, kSide * 4);
  tiles::store<1>(c + 16, kSide * 4);
  tiles::store<2>(c + 16 * kSide, kSide * 4);
  tiles::store<3>(c + 16 * kSide + 16, kSide * 4);
}
#else
#if defined(__AVX512F__)
ISOTILE_INLINE Vec<int32_t> multiply_bytes(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_maddubs_epi16(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> multiply_words(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_madd_epi16(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> add_words(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_add_epi16(a.v, b.v)}; }
#else
ISOTILE_INLINE Vec<int32_t> multiply_bytes(Vec<int32_t> a, Vec<int32_t> b) { return {_mm256_maddubs_epi16(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> multiply_words(Vec<int32_t> a, Vec<int32_t> b) { return {_mm256_madd_epi16(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> add_words(Vec<int32_t> a, Vec<int32_t> b) { return {_mm256_add_epi16(a.v, b.v)}; }
#endif

// Bytes: two products of a four-bit number and q are below 3840, so 16 bits hold the sums of eight steps.
template <class Q>
inline void sum_block(const Q* w, int64_t ld, const uint8_t* x, int64_t column, int64_t k0, int64_t length, int32_t* c) {
  using I = Vec<int32_t>;
  constexpr bool kBytes = sizeof(Q) == 1;
  constexpr int kRows = kLanesOfX == 16 ? 8 : 4;
  constexpr int64_t kPer = 4 / sizeof(Q), kChunk = 256;  // of k: in a lane; x of this much stays in L1
  const I ones = I::set1(0x00010001);
  for (int64_t chunk = k0; chunk < k0 + length; chunk += kChunk) {
    const int64_t end = least(chunk + kChunk, k0 + length);
    for (int64_t i = 0; i < kSide; i += kRows) {
      for (int64_t k = chunk, part = k; part < end; part = k) {
        I acc[kRows][2];
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = I::zero();
        const int64_t stop = kBytes ? part + 8 * kPer : end;
#pragma GCC unroll 8
        for (; k < stop; k += kPer) {
          const auto* at = reinterpret_cast<const int32_t*>(x + k * kLanesOfX * sizeof(Q));
          const I x0 = I::load(at), x1 = I::load(at + column / 4);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            int32_t some;
            __builtin_memcpy(&some, w + (i + r) * ld + k, 4);
            const I v = I::set1(some);
            acc[r][0] = kBytes ? add_words(acc[r][0], multiply_bytes(v, x0)) : acc[r][0] + multiply_words(v, x0);
            acc[r][1] = kBytes ? add_words(acc[r][1], multiply_bytes(v, x1)) : acc[r][1] + multiply_words(v, x1);
          }
        }
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 2
          for (int h = 0; h < 2; ++h) {
            I sum = kBytes ? multiply_words(acc[r][h], ones) : acc[r][h];
            int32_t* to = c + (i + r) * kSide + h * kLanesOfX;
            if (part != k0) sum = sum + I::load(to);
            sum.store(to);
          }
        }
      }
    }
  }
}
#endif

// Rows [i0, i0 + rows) of the weight, against all of x. x: tiles [ceil(m / lanes)][padded k of Q][lanes]; row_sums: the
// sums of q over each group [groups][m rounded up], for offsets and zero points; row_scales [m rounded up].
template <class Q>
inline void integer_blocks(const QuantizedWeight& w, const Epilogue& out, int64_t m, int64_t i0, int64_t rows,
                           const uint8_t* x, const int32_t* row_sums, const float* row_scales) {
  using V = Vec<float>;
  using I = Vec<int32_t>;
  const int64_t pieces = ceil_div(w.k, kPiece), padded = pieces * kPiece, ld = padded + 64;
  const int64_t column = padded * kLanesOfX * sizeof(Q), m_padded = ceil_div(m, kSide) * kSide;
  const bool later = zeros_later(w);
  Scratch<Q> unpacked(kRowsOfWeight * ld);
  Scratch<int32_t> zeros(later ? kRowsOfWeight * w.groups : 0);
  Scratch<float> scales(kRowsOfWeight * w.groups), offsets(w.has_offsets() ? kRowsOfWeight * w.groups : 0);
  Scratch<float> result(kSide * kRowsOfWeight);
  RowFactors f(w);
  unpack_rows(w, i0, rows, unpacked.data(), ld, zeros.data(), &f);
  const int64_t blocks = ceil_div(rows, kSide);
  for (int64_t i = 0; i < blocks * kSide; ++i) {
    float* s = scales.data() + i * w.groups;
    if (i >= rows) {
      for (int64_t g = 0; g < w.groups; ++g) s[g] = 0.0f;
      if (w.has_offsets())
        for (int64_t g = 0; g < w.groups; ++g) offsets[i * w.groups + g] = 0.0f;
      continue;
    }
    RowFactors::load_row(w.scales, w.scales_dtype, (i0 + i) * w.groups, w.groups, s);
    if (w.has_offsets())
      RowFactors::load_row(w.zeros, w.zeros_dtype, (i0 + i) * w.groups, w.groups, offsets.data() + i * w.groups);
  }
#if ISOTILE_HAS_TILES
  tiles::Scope scope;
#endif
  alignas(64) int32_t c[kSide * kSide];
  alignas(64) float sums[kSide * kSide];
  for (int64_t m0 = 0; m0 < m_padded; m0 += kSide) {
    const uint8_t* columns = x + m0 / kLanesOfX * column;
    for (int64_t b = 0; b < blocks; ++b) {
      const Q* at = unpacked.data() + b * kSide * ld;
      for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t k0 = g * w.group, length = w.groups == 1 ? padded : least(w.group, padded - k0);
#if ISOTILE_HAS_TILES
        scope.use(length < kStep ? kHalf : kWhole);
#endif
        sum_block(at, ld, columns, column, k0, length, c);
        for (int64_t i = 0; i < kSide; ++i) {
          const int64_t row = (b * kSide + i) * w.groups + g;
          const V scale = V::set1(scales[row]);
#pragma GCC unroll 2
          for (int64_t h = 0; h < kSide; h += kLanesOfX) {
            const int32_t* of_x = row_sums + g * m_padded + m0 + h;
            I exact = I::load(c + i * kSide + h);
            if (later) exact = exact - I::set1(zeros[row]) * I::load(of_x);
            V sum = to_float(exact);
            sum = g == 0 ? sum * scale : fma(sum, scale, V::load(sums + i * kSide + h));
            if (w.has_offsets()) sum = fma(to_float(I::load(of_x)), V::set1(offsets[row]), sum);
            sum.store(sums + i * kSide + h);
          }
        }
      }
      for (int64_t i = 0; i < kSide; i += kLanesOfX) {
        for (int64_t h = 0; h < kSide; h += kLanesOfX) {
          V v[kLanesOfX];
          const V row_scale = V::load(row_scales + m0 + h);
#pragma GCC unroll 16
          for (int64_t r = 0; r < kLanesOfX; ++r) v[r] = V::load(sums + (i + r) * kSide + h) * row_scale;
          transpose_square(v);
#pragma GCC unroll 16
          for (int64_t r = 0; r < kLanesOfX; ++r) v[r].store(result.data() + (h + r) * kRowsOfWeight + b * kSide + i);
        }
      }
    }
    finish(out, result.data(), kRowsOfWeight, m0, least(kSide, m - m0), i0, rows);
  }
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
#endif
