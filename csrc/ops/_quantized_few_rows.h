// Quantised products of few rows, where reading the weight is the work: each row of the weight goes from memory through
// registers into the products, once for every row of x. AVX-512; the dynamic integers also need VNNI.
//
// Lanes lie along k. A piece is 128 elements of k: 64 bytes of nibbles, whose low halves are the first 64 elements and
// whose high halves are the other 64, or 128 bytes.
#pragma once
#include "base/scratch.h"
#include "ops/_gemm_epilogue.h"
#include "ops/_gemm_pack.h"
#include "ops/_quantized_format.h"

#if defined(__AVX512F__)
namespace isotile {
namespace ISOTILE_ISA {

constexpr int64_t kPiece = kBlock4;

// The weight is one stream of memory, row behind row; the hardware's own prefetch stops at each page of 4 KB.
constexpr int64_t kAheadBytes = 2048;
ISOTILE_INLINE void fetch_ahead(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + kAheadBytes, 0, 3);
}

// Scales and zeros of a row of the weight as float32, filled up so that every piece finds four of them.
struct RowFactors {
  Scratch<float> scales, offsets;
  Scratch<int32_t> zeros;
  int64_t per_piece;  // groups of a piece; 0: one for the whole row
  int shift;          // a group is 16 << shift elements of a piece

  explicit RowFactors(const QuantizedWeight& w)
      : scales(w.groups + 8), offsets(w.has_offsets() ? w.groups + 8 : 0), zeros(w.groups + 8),
        per_piece(w.groups > 1 ? kPiece / w.group : 0),
        shift(per_piece == 8 ? 0 : per_piece == 4 ? 1 : per_piece == 2 ? 2 : 3) {
    for (int64_t g = 0; g < w.groups + 8; ++g) {
      scales[g] = 0.0f;
      zeros[g] = 8;
      if (w.has_offsets()) offsets[g] = 0.0f;
    }
  }

  // Group of elements 16 v ... of a piece.
  ISOTILE_INLINE int64_t group(int64_t piece, int v) const { return piece * per_piece + (per_piece ? v >> shift : 0); }

  static void load_row(const void* data, DType dtype, int64_t at, int64_t n, float* out) {
    for (int64_t g = 0; g < n; g += 16)
      load_any<false, float>(data, dtype, at + g, 1, n - g).store(out + g, n - g);
  }
  void load(const QuantizedWeight& w, int64_t i) {
    if (w.scales_dtype != DType::kUInt8) load_row(w.scales, w.scales_dtype, i * w.groups, w.groups, scales.data());
    else
      for (int64_t g = 0; g < w.groups; ++g) scales[g] = w.scale(i, g);
    if (w.has_offsets()) load_row(w.zeros, w.zeros_dtype, i * w.groups, w.groups, offsets.data());
    else if (w.zeros != nullptr)
      for (int64_t g = 0; g < w.groups; ++g) zeros[g] = w.zero(i, g);
  }
};

// --- weights as float32 ----------------------------------------------------------------------------------------------

// Sixteen e4m3 numbers.
ISOTILE_INLINE __m512 floats_of_e4m3(__m128i bytes) {
  const __m512i b = _mm512_cvtepu8_epi32(bytes);
  const __m512i magnitude = _mm512_and_si512(b, _mm512_set1_epi32(127));
  // exponent and mantissa in place, the exponent's bias from 7 to 127 by a product, which also makes subnormals right
  __m512 v = _mm512_mul_ps(_mm512_castsi512_ps(_mm512_slli_epi32(magnitude, 20)), _mm512_set1_ps(0x1p120f));
  v = _mm512_mask_mov_ps(v, _mm512_cmpeq_epi32_mask(magnitude, _mm512_set1_epi32(127)),
                         _mm512_set1_ps(__builtin_nanf("")));
  const __m512i sign = _mm512_slli_epi32(_mm512_and_si512(b, _mm512_set1_epi32(128)), 24);
  return _mm512_castsi512_ps(_mm512_or_si512(_mm512_castps_si512(v), sign));
}

// Piece `piece` of row i as dequantised float32 vectors: out[v] holds elements 16 v ... of the piece.
template <class Factors>
ISOTILE_INLINE void piece_of_row(const QuantizedWeight& w, const uint8_t* row, const Factors& f, int64_t piece,
                                 __m512 (&out)[8]) {
  if (w.four_bits()) {
    const uint8_t* bytes = row + piece * (kPiece / 2);
    fetch_ahead(bytes);
    __m512 table = _mm512_setzero_ps();
    int64_t current = -1;
    const auto use = [&](int64_t g) {  // the sixteen weights that a nibble may mean in group g
      if (g == current) return;
      current = g;
      const __m512 scale = _mm512_set1_ps(f.scales[g]);
      if (!w.integer()) {
        table = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(kTables.e2m1), scale), _mm512_set1_ps(w.global));
        return;
      }
      const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
      if (w.has_offsets()) {
        table = _mm512_add_ps(_mm512_mul_ps(codes, scale), _mm512_set1_ps(f.offsets[g]));
        return;
      }
      table = _mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(static_cast<float>(f.zeros[g]))), scale);
    };
    __m512i quads[4];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      quads[v] = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * v)));
      use(f.group(piece, v));
      out[v] = _mm512_permutexvar_ps(quads[v], table);  // looks at the low four bits only
    }
#pragma GCC unroll 4
    for (int v = 4; v < 8; ++v) {
      use(f.group(piece, v));
      out[v] = _mm512_permutexvar_ps(_mm512_srli_epi32(quads[v - 4], 4), table);
    }
    return;
  }
  const int64_t left = w.k - piece * kPiece;
  const uint8_t* bytes = row + piece * kPiece;
  fetch_ahead(bytes);
  fetch_ahead(bytes + 64);
#pragma GCC unroll 8
  for (int v = 0; v < 8; ++v) {
    const __m128i b = left >= kPiece ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes + 16 * v))
                                     : _mm_maskz_loadu_epi8(16 * v < left ? first16(left - 16 * v) : 0, bytes + 16 * v);
    const __m512 q = w.integer() ? _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)) : floats_of_e4m3(b);
    out[v] = w.scheme == Scheme::kFp8 ? q : _mm512_mul_ps(q, _mm512_set1_ps(f.scales[f.group(piece, v)]));
  }
}

// sums[r] = weight's row . x's row r, for kRows rows of x [rows][pieces * 128].
template <int kRows, class Factors>
inline void dot_floats(const QuantizedWeight& w, const uint8_t* row, const Factors& f, const float* x, int64_t ldx,
                       float* sums) {
  constexpr int kParts = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  __m512 acc[kRows][kParts];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) acc[r][p] = _mm512_setzero_ps();
  const int64_t pieces = ceil_div(w.k, kPiece);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    __m512 weights[8];
    piece_of_row(w, row, f, piece, weights);
    const float* at = x + piece * kPiece;
#pragma GCC unroll 8
    for (int v = 0; v < 8; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        acc[r][v % kParts] = _mm512_fmadd_ps(weights[v], _mm512_loadu_ps(at + r * ldx + 16 * v), acc[r][v % kParts]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    __m512 sum = acc[r][0];
#pragma GCC unroll 4
    for (int p = 1; p < kParts; ++p) sum = _mm512_add_ps(sum, acc[r][p]);
    sums[r] = _mm512_reduce_add_ps(sum);
  }
}

#if ISOTILE_HAS_BF16_DOT
// --- four-bit weights as bfloat16 pairs ------------------------------------------------------------------------------

// The sixteen numbers of a code, twice (a word's low five bits choose): less each zero point, and e2m1's. All are exact.
struct PairTables {
  alignas(64) uint16_t less_zero[16][32];
  alignas(64) uint16_t e2m1[32];
};
constexpr uint16_t bfloat16_bits(float v) { return static_cast<uint16_t>(__builtin_bit_cast(uint32_t, v) >> 16); }
constexpr PairTables make_pair_tables() {
  PairTables t{};
  for (int code = 0; code < 32; ++code) {
    t.e2m1[code] = bfloat16_bits(kTables.e2m1[code % 16]);
    for (int zero = 0; zero < 16; ++zero) t.less_zero[zero][code] = bfloat16_bits(static_cast<float>(code % 16 - zero));
  }
  return t;
}
static constexpr PairTables kPairTables = make_pair_tables();

// Zero points beyond 15 have no table.
inline bool serves_pairs(const QuantizedWeight& w) {
  if (!w.four_bits() || w.has_offsets() || w.dynamic() || (w.groups > 1 && w.group < 32)) return false;
  if (w.zeros == nullptr) return true;
  const uint8_t* zeros = static_cast<const uint8_t*>(w.zeros);
  uint8_t most = 0;
  for (int64_t i = 0; i < w.n * w.groups; ++i) most = zeros[i] > most ? zeros[i] : most;
  return most < 16;
}

// sums[r] = weight's row . x's row r, for kRows bfloat16 rows of x [rows][pieces * 128]. kPer: groups of a piece, 0: one
// for the whole row. A group's products are summed before its scale.
template <int kRows, int kPer>
inline void dot_pairs(const QuantizedWeight& w, const uint8_t* row, const RowFactors& f, const uint16_t* x, int64_t ldx,
                      float* sums) {
  constexpr int kPerGroup = kPer == 0 ? 4 : 4 / kPer;  // vectors of a piece in one group
  constexpr int kParts = kRows <= 2 ? 4 : 2;
  __m512 acc[kRows][kParts];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int u = 0; u < kParts; ++u) acc[r][u] = _mm512_setzero_ps();
  const auto table_of = [&](int64_t g) {
    return _mm512_load_si512(w.integer() ? kPairTables.less_zero[f.zeros[g]] : kPairTables.e2m1);
  };
  const bool own_tables = w.zeros != nullptr && kPer != 0;
  __m512i table = table_of(0);
  const int64_t pieces = ceil_div(w.k, kPiece);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    const uint8_t* bytes = row + piece * (kPiece / 2);
    fetch_ahead(bytes);
    const __m512i low = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    const __m512i high = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32)));
    const __m512i codes[4] = {low, high, _mm512_srli_epi16(low, 4), _mm512_srli_epi16(high, 4)};
    __m512 sum[kRows];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const int64_t g = piece * kPer + v / kPerGroup;
      if (v % kPerGroup == 0 && own_tables) table = table_of(g);
      const __m512i weights = _mm512_permutexvar_epi16(codes[v], table);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const __m512i at = _mm512_loadu_si512(x + r * ldx + piece * kPiece + 32 * v);
        if (kPer == 0) {
          acc[r][v % kParts] = _mm512_dpbf16_ps(acc[r][v % kParts], (__m512bh)weights, (__m512bh)at);
          continue;
        }
        if (v % kPerGroup == 0) sum[r] = _mm512_setzero_ps();
        sum[r] = _mm512_dpbf16_ps(sum[r], (__m512bh)weights, (__m512bh)at);
        if (v % kPerGroup == kPerGroup - 1)
          acc[r][v % kParts] = _mm512_fmadd_ps(sum[r], _mm512_set1_ps(f.scales[g]), acc[r][v % kParts]);
      }
    }
  }
  const float last = (kPer == 0 ? f.scales[0] : 1.0f) * w.global;
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    __m512 total = acc[r][0];
#pragma GCC unroll 4
    for (int u = 1; u < kParts; ++u) total = _mm512_add_ps(total, acc[r][u]);
    sums[r] = _mm512_reduce_add_ps(total) * last;
  }
}
#endif

#if defined(__AVX512VNNI__)
// --- integers --------------------------------------------------------------------------------------------------------

// Rows of quantised activations: q (for int8 weights q + 128, unsigned), and the sums of each four q.
struct IntegerRows {
  const uint8_t* q;         // [rows][pieces * 128]
  const int32_t* quads;     // [rows][pieces * 32], for int4
  int64_t ldq;
};

// Four-bit: u of 0..15 times q, the zero point folded into the start: -zero * (q0 + q1 + q2 + q3) in each lane.
// Eight-bit: w times q + 128, and 128 * (w0 + ... + w3) taken off each lane. Either way each lane is the exact sum of
// four products, so scaling it loses nothing to cancellation.
template <int kRows, bool kFourBits, bool kOffsets, bool kGroups>
inline void dot_integers(const QuantizedWeight& w, const uint8_t* row, const RowFactors& f, const IntegerRows& x,
                         float* sums) {
  __m512 acc[kRows];
  __m512i whole[kRows], taken = _mm512_setzero_si512();
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    acc[r] = _mm512_setzero_ps();
    whole[r] = _mm512_setzero_si512();
  }
  const __m512i shift = _mm512_set1_epi8(static_cast<char>(128)), low = _mm512_set1_epi8(15);
  // Which of a piece's (up to four) groups each lane of its two halves belongs to.
  const int64_t per = kGroups ? f.per_piece : 1;
  const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i shifted = per == 4 ? _mm512_srli_epi32(lanes, 3) : _mm512_setzero_si512();
  const __m512i group_low = shifted, group_high = _mm512_add_epi32(shifted, _mm512_set1_epi32(per == 4 ? 2 : per == 2));
  const int64_t pieces = ceil_div(w.k, kPiece);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    __m512i part[2];
    if (kFourBits) {
      const __m512i bytes = _mm512_loadu_si512(row + piece * (kPiece / 2));
      fetch_ahead(row + piece * (kPiece / 2));
      part[0] = _mm512_and_si512(bytes, low);
      part[1] = _mm512_and_si512(_mm512_srli_epi16(bytes, 4), low);
    } else {
      const int64_t left = w.k - piece * kPiece;
      const uint8_t* bytes = row + piece * kPiece;
      fetch_ahead(bytes);
      fetch_ahead(bytes + 64);
      const auto mask = [](int64_t n) { return n >= 64 ? ~__mmask64{0} : n <= 0 ? 0 : (__mmask64{1} << n) - 1; };
      part[0] = left >= 64 ? _mm512_loadu_si512(bytes) : _mm512_maskz_loadu_epi8(mask(left), bytes);
      part[1] = left >= 128 ? _mm512_loadu_si512(bytes + 64) : _mm512_maskz_loadu_epi8(mask(left - 64), bytes + 64);
    }
    __m512 scale[2], offset[2];
    __m512i zero[2];
    if (kGroups) {
      const __m512 s = _mm512_castps128_ps512(_mm_loadu_ps(f.scales.data() + piece * per));
      scale[0] = _mm512_permutexvar_ps(group_low, s);
      scale[1] = _mm512_permutexvar_ps(group_high, s);
    }
    if (kFourBits && kOffsets && kGroups) {
      const __m512 o = _mm512_castps128_ps512(_mm_loadu_ps(f.offsets.data() + piece * per));
      offset[0] = _mm512_permutexvar_ps(group_low, o);
      offset[1] = _mm512_permutexvar_ps(group_high, o);
    }
    if (kFourBits && !kOffsets) {
      if (kGroups) {
        const __m512i z = _mm512_castsi128_si512(
            _mm_loadu_si128(reinterpret_cast<const __m128i*>(f.zeros.data() + piece * per)));
        zero[0] = _mm512_sub_epi16(_mm512_setzero_si512(), _mm512_permutexvar_epi32(group_low, z));
        zero[1] = _mm512_sub_epi16(_mm512_setzero_si512(), _mm512_permutexvar_epi32(group_high, z));
      } else {
        zero[0] = zero[1] = _mm512_sub_epi16(_mm512_setzero_si512(), _mm512_set1_epi32(f.zeros[0]));
      }
    }
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      if (!kFourBits) {
        const __m512i sum = _mm512_dpbusd_epi32(_mm512_setzero_si512(), shift, part[h]);
        taken = kGroups ? sum : _mm512_add_epi32(taken, sum);
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i q = _mm512_loadu_si512(x.q + r * x.ldq + piece * kPiece + 64 * h);
        __m512i start = kGroups ? _mm512_setzero_si512() : whole[r];
        __m512i quads = _mm512_setzero_si512();
        if (kFourBits) quads = _mm512_loadu_si512(x.quads + (r * x.ldq + piece * kPiece + 64 * h) / 4);
        if (kFourBits && !kOffsets) {
          const __m512i folded = _mm512_madd_epi16(quads, zero[h]);  // both fit in 16 bits
          start = kGroups ? folded : _mm512_add_epi32(start, folded);
        }
        const __m512i sum = kFourBits ? _mm512_dpbusd_epi32(start, part[h], q) : _mm512_dpbusd_epi32(start, q, part[h]);
        if (!kGroups) {
          whole[r] = sum;
          continue;
        }
        const __m512i exact = kFourBits ? sum : _mm512_sub_epi32(sum, taken);
        acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(exact), scale[h], acc[r]);
        if (kFourBits && kOffsets) acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(quads), offset[h], acc[r]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if (kGroups) {
      sums[r] = _mm512_reduce_add_ps(acc[r]);
      continue;
    }
    const __m512i exact = kFourBits ? whole[r] : _mm512_sub_epi32(whole[r], taken);
    sums[r] = static_cast<float>(_mm512_reduce_add_epi32(exact)) * f.scales[0];
    if (kOffsets) {
      int32_t total = 0;
      for (int64_t i = 0; i < pieces * kPiece / 4; ++i) total += x.quads[r * x.ldq / 4 + i];
      sums[r] += static_cast<float>(total) * f.offsets[0];
    }
  }
}
#endif

}  // namespace ISOTILE_ISA
}  // namespace isotile
#endif
