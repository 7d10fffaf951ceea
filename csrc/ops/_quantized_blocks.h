// Quantised integers, many rows: y.T = weight @ x.T in blocks of 32 rows of the weight by 32 rows of x.
//
// The weight's rows are unpacked once into signed bytes, k along the row, which is how a matrix tile (and a broadcast
// of four bytes) wants its first operand. x is quantised into tiles of [16 quads of k][16 rows][4], which is how it wants
// the second. A group of the weight is summed exactly in int32, then scaled into float32 sums.
#pragma once
#include "base/scratch.h"
#include "ops/_gemm_pack.h"
#include "ops/_quantized_few_rows.h"
#include "simd/tile.h"

#if defined(__AVX512VNNI__)
namespace isotile {
namespace ISOTILE_ISA {

constexpr int64_t kSide = 32;          // of a block
constexpr int64_t kStep = 64;          // elements of k in one tile
constexpr int64_t kRowsOfWeight = 128;  // unpacked together: k of them stay in L2

// x's tiles are signed for matrix tiles; vpdpbusd wants its first operand unsigned, so there they hold q + 128.
constexpr int kBias = ISOTILE_HAS_TILES ? 0 : 128;

// Rows [i0, i0 + rows) of the weight as signed bytes [kRowsOfWeight][ld], zero points taken off; and what the bias of
// x adds to each group's sum, [row][groups].
inline void unpack_rows(const QuantizedWeight& w, int64_t i0, int64_t rows, int8_t* out, int64_t ld, int32_t* biases,
                        RowFactors* f) {
  const int64_t pieces = ceil_div(w.k, kPiece);
  const __m512i low = _mm512_set1_epi8(15);
  for (int64_t i = 0; i < rows; ++i) {
    const uint8_t* row = w.row(i0 + i);
    int8_t* to = out + i * ld;
    if (!w.four_bits()) {
      __builtin_memcpy(to, row, static_cast<size_t>(w.k));
      __builtin_memset(to + w.k, 0, static_cast<size_t>(pieces * kPiece - w.k));
    } else {
      if (!w.has_offsets()) f->load(w, i0 + i);
      for (int64_t piece = 0; piece < pieces; ++piece) {
        const __m512i bytes = _mm512_loadu_si512(row + piece * (kPiece / 2));
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
        _mm512_storeu_si512(to + piece * kPiece, _mm512_sub_epi8(_mm512_and_si512(bytes, low), zero[0]));
        _mm512_storeu_si512(to + piece * kPiece + 64,
                            _mm512_sub_epi8(_mm512_and_si512(_mm512_srli_epi16(bytes, 4), low), zero[1]));
      }
      if (w.k % kPiece != 0) __builtin_memset(to + w.k, 0, static_cast<size_t>(pieces * kPiece - w.k));
    }
    if (kBias != 0) {
      for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t k0 = g * w.group, k1 = least(k0 + w.group, w.k);
        __m512i sum = _mm512_setzero_si512();
        for (int64_t k = k0; k < k1; k += 32)
          sum = _mm512_dpbusd_epi32(
              sum, _mm512_set1_epi8(static_cast<char>(kBias)),
              _mm512_zextsi256_si512(_mm256_maskz_loadu_epi8(
                  k1 - k >= 32 ? ~__mmask32{0} : (__mmask32{1} << (k1 - k)) - 1, to + k)));
        biases[i * w.groups + g] = _mm512_reduce_add_epi32(sum);
      }
    }
  }
  for (int64_t i = rows; i < ceil_div(rows, kSide) * kSide; ++i) {
    __builtin_memset(out + i * ld, 0, static_cast<size_t>(pieces * kPiece));
    for (int64_t g = 0; g < w.groups && kBias != 0; ++g) biases[i * w.groups + g] = 0;
  }
}

// c [32 rows of the weight][32 rows of x] = the sums over elements [k0, k0 + length) of k; length a multiple of 32.
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
inline void sum_block(const int8_t* w, int64_t ld, const uint8_t* x, int64_t column, int64_t k0, int64_t length,
                      int32_t* c) {
  constexpr int kRows = 8;
  for (int64_t i = 0; i < kSide; i += kRows) {
    __m512i acc[kRows][2];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) acc[r][0] = acc[r][1] = _mm512_setzero_si512();
    for (int64_t k = k0; k < k0 + length; k += 4) {
      const uint8_t* at = x + k * 16;
      const __m512i x0 = _mm512_loadu_si512(at), x1 = _mm512_loadu_si512(at + column);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        int32_t four;
        __builtin_memcpy(&four, w + (i + r) * ld + k, 4);
        const __m512i v = _mm512_set1_epi32(four);
        acc[r][0] = _mm512_dpbusd_epi32(acc[r][0], x0, v);
        acc[r][1] = _mm512_dpbusd_epi32(acc[r][1], x1, v);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      _mm512_storeu_si512(c + (i + r) * kSide, acc[r][0]);
      _mm512_storeu_si512(c + (i + r) * kSide + 16, acc[r][1]);
    }
  }
}
#endif

// Rows [i0, i0 + rows) of the weight, against all of x. x: tiles [ceil(m / 16)][pieces * 2][16][16][4]; row_sums: the
// sums of q over each group [groups][m rounded up], for offsets; row_scales [m rounded up].
inline void integer_blocks(const QuantizedWeight& w, const Epilogue& out, int64_t m, int64_t i0, int64_t rows,
                           const uint8_t* x, const int32_t* row_sums, const float* row_scales) {
  const int64_t pieces = ceil_div(w.k, kPiece), padded = pieces * kPiece, ld = padded + 64;
  const int64_t column = padded * 16, m_padded = ceil_div(m, kSide) * kSide;
  Scratch<int8_t> unpacked(kRowsOfWeight * ld);
  Scratch<int32_t> biases(kBias != 0 ? kRowsOfWeight * w.groups : 0);
  Scratch<float> scales(kRowsOfWeight * w.groups), offsets(w.has_offsets() ? kRowsOfWeight * w.groups : 0);
  Scratch<float> result(kSide * kRowsOfWeight);
  RowFactors f(w);
  unpack_rows(w, i0, rows, unpacked.data(), ld, biases.data(), &f);
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
    const uint8_t* columns = x + m0 / 16 * column;
    for (int64_t b = 0; b < blocks; ++b) {
      const int8_t* at = unpacked.data() + b * kSide * ld;
      for (int64_t g = 0; g < w.groups; ++g) {
        const int64_t k0 = g * w.group, length = w.groups == 1 ? padded : least(w.group, padded - k0);
#if ISOTILE_HAS_TILES
        scope.use(length < kStep ? kHalf : kWhole);
#endif
        sum_block(at, ld, columns, column, k0, length, c);
        for (int64_t i = 0; i < kSide; ++i) {
          const int64_t row = (b * kSide + i) * w.groups + g;
          const __m512 scale = _mm512_set1_ps(scales[row]);
#pragma GCC unroll 2
          for (int64_t h = 0; h < kSide; h += 16) {
            __m512i exact = _mm512_load_si512(c + i * kSide + h);
            if (kBias != 0) exact = _mm512_sub_epi32(exact, _mm512_set1_epi32(biases[row]));
            __m512 sum = _mm512_cvtepi32_ps(exact);
            sum = g == 0 ? _mm512_mul_ps(sum, scale)
                         : _mm512_fmadd_ps(sum, scale, _mm512_load_ps(sums + i * kSide + h));
            if (w.has_offsets())
              sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_loadu_si512(row_sums + g * m_padded + m0 + h)),
                                    _mm512_set1_ps(offsets[row]), sum);
            _mm512_store_ps(sums + i * kSide + h, sum);
          }
        }
      }
      for (int64_t i = 0; i < kSide; i += 16) {
        for (int64_t h = 0; h < kSide; h += 16) {
          __m512 v[16];
          const __m512 row_scale = _mm512_loadu_ps(row_scales + m0 + h);
#pragma GCC unroll 16
          for (int64_t r = 0; r < 16; ++r) v[r] = _mm512_mul_ps(_mm512_load_ps(sums + (i + r) * kSide + h), row_scale);
          transpose_16x16(v);
#pragma GCC unroll 16
          for (int64_t r = 0; r < 16; ++r)
            _mm512_storeu_ps(result.data() + (h + r) * kRowsOfWeight + b * kSide + i, v[r]);
        }
      }
    }
    finish(out, result.data(), kRowsOfWeight, m0, least(kSide, m - m0), i0, rows);
  }
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
#endif
