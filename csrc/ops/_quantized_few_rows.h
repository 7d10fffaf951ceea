// Quantised products of few rows, where reading the weight is the work: each row of the weight goes from memory through
// registers into the products, once for every row of x. Floats on every set, dynamic integers from AVX2 on.
//
// Lanes lie along k. A piece is 128 elements of k: 64 bytes of nibbles, whose low halves are the first 64 elements and
// whose high halves are the other 64, or 128 bytes.
#pragma once
#include <type_traits>

#include "base/scratch.h"
#include "ops/_gemm_epilogue.h"
#include "ops/_gemm_pack.h"
#include "ops/_quantized_format.h"

namespace isotile {
namespace ISOTILE_ISA {

constexpr int64_t kPiece = kBlock4;

// The length of chunks of k, whole pieces and at most so many elements, that differ as little as they can.
inline int64_t even_chunk(int64_t padded, int64_t most_elements) {
  const int64_t pieces = padded / kPiece, chunks = ceil_div(padded, most_elements);
  return ceil_div(pieces, chunks) * kPiece;
}

// The weight is one stream of memory, row behind row; the hardware's own prefetch stops at each page of 4 KB.
template <int64_t kBytes = 4096>
ISOTILE_INLINE void fetch_ahead(const void* p) {
  __builtin_prefetch(static_cast<const char*>(p) + kBytes, 0, 3);
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
    for (int64_t g = 0; g < n; g += Vec<float>::kLanes)
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

// Elements that leave registers together.
constexpr int64_t kAtOnce = Vec<float>::kLanes == 16 ? kPiece : 32;
constexpr int kVectorsAtOnce = kAtOnce / Vec<float>::kLanes;

#if defined(__AVX512F__)
// Sixteen e4m3 numbers. As float16 they are 256 times smaller, subnormals included: unlike float32's, these are never
// flushed to zero.
ISOTILE_INLINE __m512 floats_of_e4m3(__m128i bytes) {
  const __m256i wide = _mm256_cvtepi8_epi16(bytes), most = _mm256_set1_epi16(127);
  __m256i halves = _mm256_and_si256(_mm256_slli_epi16(wide, 7), _mm256_set1_epi16(static_cast<short>(0xbfff)));
  halves = _mm256_mask_mov_epi16(halves, _mm256_cmpeq_epi16_mask(_mm256_and_si256(wide, most), most),
                                 _mm256_set1_epi16(0x7e00));
  return _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(256.0f));
}

// Elements kAtOnce * piece ... of a row, dequantised; behind the row's end anything finite. e4m3 numbers come
// without their scale.
ISOTILE_INLINE void numbers_of_row(const QuantizedWeight& w, const uint8_t* row, const RowFactors& f, int64_t piece,
                                   Vec<float> (&out)[kVectorsAtOnce]) {
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
      out[v].v = _mm512_permutexvar_ps(quads[v], table);  // looks at the low four bits only
    }
#pragma GCC unroll 4
    for (int v = 4; v < 8; ++v) {
      use(f.group(piece, v));
      out[v].v = _mm512_permutexvar_ps(_mm512_srli_epi32(quads[v - 4], 4), table);
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
    out[v].v = w.scheme == Scheme::kFp8 ? q : _mm512_mul_ps(q, _mm512_set1_ps(f.scales[f.group(piece, v)]));
  }
}
#else
// kAtOnce e4m3 numbers, without a scale.
ISOTILE_INLINE void e4m3_numbers(const uint8_t* bytes, Vec<float> (&out)[kVectorsAtOnce]) {
  using V = Vec<float>;
#if defined(ISOTILE_ISA_scalar)
  float numbers[kAtOnce];
  for (int64_t i = 0; i < kAtOnce; ++i) numbers[i] = kTables.e4m3[bytes[i]];
  for (int u = 0; u < kVectorsAtOnce; ++u) out[u] = V::load(numbers + u * V::kLanes);
#else
  // As float16, 256 times smaller, they are exact; unlike float32's, its subnormals are never flushed to zero.
  Float16 halves[kAtOnce];
  for (int64_t i = 0; i < kAtOnce; ++i) {
    const int magnitude = bytes[i] & 127;
    halves[i].bits = static_cast<uint16_t>((bytes[i] & 128) << 8 | magnitude << 7 | (magnitude == 127 ? 0x7e00 : 0));
  }
#pragma GCC unroll 8
  for (int u = 0; u < kVectorsAtOnce; ++u) out[u] = V::load(halves + u * V::kLanes) * V::set1(256.0f);
#endif
}

// kAtOnce e2m1 numbers, without a scale, from the low or high halves of bytes.
ISOTILE_INLINE void e2m1_numbers(const uint8_t* bytes, bool high, Vec<float> (&out)[kVectorsAtOnce]) {
  using V = Vec<float>;
#if defined(__AVX2__)
  const __m256i twice = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12));
  __m256i codes = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes));
  if (high) codes = _mm256_srli_epi16(codes, 4);
  int8_t numbers[kAtOnce];
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(numbers),
                      _mm256_shuffle_epi8(twice, _mm256_and_si256(codes, _mm256_set1_epi8(15))));
#pragma GCC unroll 8
  for (int u = 0; u < kVectorsAtOnce; ++u)
    out[u] = to_float(Vec<int32_t>::load(numbers + u * V::kLanes)) * V::set1(0.5f);
#else
  float numbers[kAtOnce];
  for (int64_t i = 0; i < kAtOnce; ++i) numbers[i] = kTables.e2m1[high ? bytes[i] >> 4 : bytes[i] & 15];
  for (int u = 0; u < kVectorsAtOnce; ++u) out[u] = V::load(numbers + u * V::kLanes);
#endif
}

enum class Numbers { kInteger, kE4m3, kLessZero, kPlusOffset, kE2m1 };

// Calls f(kind) with the weight's, a constant.
template <class F>
ISOTILE_INLINE void with_numbers(const QuantizedWeight& w, const F& f) {
  using std::integral_constant;
  if (!w.integer() && w.four_bits()) return f(integral_constant<Numbers, Numbers::kE2m1>{});
  if (!w.integer()) return f(integral_constant<Numbers, Numbers::kE4m3>{});
  if (!w.four_bits()) return f(integral_constant<Numbers, Numbers::kInteger>{});
  if (w.has_offsets()) return f(integral_constant<Numbers, Numbers::kPlusOffset>{});
  f(integral_constant<Numbers, Numbers::kLessZero>{});
}

template <Numbers kNumbers>
ISOTILE_INLINE void numbers_of_part(const QuantizedWeight& w, const uint8_t* row, const RowFactors& f, int64_t piece,
                                    int part, Vec<float> (&out)[kVectorsAtOnce]) {
  using V = Vec<float>;
  using I = Vec<int32_t>;
  constexpr bool kBytes = kNumbers == Numbers::kInteger || kNumbers == Numbers::kE4m3;
  const uint8_t* bytes = row + (kBytes ? piece * kPiece + part * kAtOnce : piece * (kPiece / 2) + part % 2 * kAtOnce);
  uint8_t copy[kAtOnce];
  const int64_t left = w.k - piece * kPiece - part * kAtOnce;
  if (kBytes && left < kAtOnce) {
    for (int64_t i = 0; i < kAtOnce; ++i) copy[i] = i < left ? bytes[i] : 0;
    bytes = copy;
  } else if (kBytes || part < 2) {
    fetch_ahead(bytes);
  }
  // Only e2m1's groups may be shorter than a part: 16 elements.
  const int64_t g = f.group(piece, 2 * part), second = kNumbers == Numbers::kE2m1 ? f.group(piece, 2 * part + 1) : g;
  const V scales[2] = {V::set1(f.scales[g]), V::set1(f.scales[second])};
  if (kNumbers == Numbers::kE4m3) e4m3_numbers(bytes, out);
  if (kNumbers == Numbers::kE2m1) e2m1_numbers(bytes, part >= 2, out);
#pragma GCC unroll 8
  for (int u = 0; u < kVectorsAtOnce; ++u) {
    const uint8_t* at = bytes + u * V::kLanes;
    const V scale = scales[2 * u / kVectorsAtOnce];
    const I byte = I::load(at), code = part < 2 ? byte & I::set1(15) : shift_right<4>(byte);
    if (kNumbers == Numbers::kInteger) out[u] = to_float(I::load(reinterpret_cast<const int8_t*>(at))) * scale;
    if (kNumbers == Numbers::kE2m1) out[u] = out[u] * scale * V::set1(w.global);
    if (kNumbers == Numbers::kPlusOffset) out[u] = to_float(code) * scale + V::set1(f.offsets[g]);
    if (kNumbers == Numbers::kLessZero) out[u] = to_float(code - I::set1(f.zeros[g])) * scale;
  }
}
ISOTILE_INLINE void numbers_of_row(const QuantizedWeight& w, const uint8_t* row, const RowFactors& f, int64_t index,
                                   Vec<float> (&out)[kVectorsAtOnce]) {
  constexpr int kParts = kPiece / kAtOnce;
  with_numbers(w, [&](auto kind) {
    numbers_of_part<decltype(kind)::value>(w, row, f, index / kParts, static_cast<int>(index % kParts), out);
  });
}
#endif

// sums[r] = weight's row . x's row r, for kRows rows of x [rows][pieces * 128].
template <int kRows>
inline void dot_floats(const QuantizedWeight& w, const uint8_t* row, const RowFactors& f, const float* x, int64_t ldx,
                       float* sums) {
  using V = Vec<float>;
  constexpr int kParts = kRows == 1 ? 4 : kRows == 2 ? 2 : 1;
  V acc[kRows][kParts];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < kParts; ++p) acc[r][p] = V::zero();
  const auto add = [&](const V (&weights)[kVectorsAtOnce], const float* at) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectorsAtOnce; ++v)
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r)
        acc[r][v % kParts] = fma(weights[v], V::load(at + r * ldx + v * V::kLanes), acc[r][v % kParts]);
  };
  const int64_t pieces = ceil_div(w.k, kPiece);
#if defined(__AVX512F__)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    V weights[kVectorsAtOnce];
    numbers_of_row(w, row, f, piece, weights);
    add(weights, x + piece * kPiece);
  }
#else
  with_numbers(w, [&](auto kind) __attribute__((always_inline)) {
    for (int64_t piece = 0; piece < pieces; ++piece) {
#pragma GCC unroll 4
      for (int part = 0; part < kPiece / kAtOnce; ++part) {
        V weights[kVectorsAtOnce];
        numbers_of_part<decltype(kind)::value>(w, row, f, piece, part, weights);
        add(weights, x + piece * kPiece + part * kAtOnce);
      }
    }
  });
#endif
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    V sum = acc[r][0];
#pragma GCC unroll 4
    for (int p = 1; p < kParts; ++p) sum = sum + acc[r][p];
    sums[r] = reduce_add(sum);
  }
}

#if ISOTILE_HAS_BF16_DOT
// --- weights as bfloat16 pairs ---------------------------------------------------------------------------------------

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
  if (w.dynamic() || (w.groups > 1 && w.group < 32)) return false;
  return w.four_bits() ? !w.has_offsets() && w.largest_zero() < 16 : true;
}

// Elements 32 v ... of a piece of whole numbers, of which `left` elements exist. All are exact.
ISOTILE_INLINE __m512i pairs_of_bytes(const uint8_t* bytes, int v, int64_t left) {
  const auto* at = reinterpret_cast<const __m256i*>(bytes + 32 * v);
  const auto some = static_cast<__mmask32>(left <= 32 * v ? 0 : (uint32_t{1} << (left - 32 * v)) - 1);
  const __m256i b = left >= 32 * (v + 1) ? _mm256_loadu_si256(at) : _mm256_maskz_loadu_epi8(some, at);
  const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_castsi256_si128(b)));
  const __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm256_extracti128_si256(b, 1)));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}

// sums[r] = weight's row . x's row r, for kRows bfloat16 rows of x [rows][pieces * 128]. kPer: groups of a piece, 0: one
// for the whole row. A group's products are summed before its scale.
template <int kRows, int kPer, bool kFourBits>
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
    const uint8_t* bytes = row + piece * (kFourBits ? kPiece / 2 : kPiece);
    const int64_t left = w.k - piece * kPiece;
    fetch_ahead(bytes);
    __m512i codes[4];
    if (kFourBits) {
      const __m512i low = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
      const __m512i high = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32)));
      codes[0] = low;
      codes[1] = high;
      codes[2] = _mm512_srli_epi16(low, 4);
      codes[3] = _mm512_srli_epi16(high, 4);
    } else {
      fetch_ahead(bytes + 64);
    }
    __m512 sum[kRows];
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      const int64_t g = piece * kPer + v / kPerGroup;
      if (kFourBits && v % kPerGroup == 0 && own_tables) table = table_of(g);
      const __m512i weights = kFourBits ? _mm512_permutexvar_epi16(codes[v], table) : pairs_of_bytes(bytes, v, left);
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

#if defined(__AVX2__)
// --- integers --------------------------------------------------------------------------------------------------------

// Rows of quantised activations and their sums, by which a zero point counts: of whole rows, and of parts where the
// weight has more groups than one.
struct IntegerRows {
  const int8_t* q;  // a piece of each row [rows][128], the next pieces `ldq` behind
  const int32_t* totals;
  const int32_t* sums;  // likewise, sums_of(w, 128) for a piece of a row
  int64_t ldq, ldsums;
  bool fetches[2];  // which halves of the weight's pieces of bytes to ask for ahead meanwhile; vpdpbusd only

  // What the zero point of a whole row takes off, modulo 2^32.
  ISOTILE_INLINE int32_t less_zero(int r, int32_t zero) const {
    return static_cast<int32_t>(0u - static_cast<uint32_t>(zero) * static_cast<uint32_t>(totals[r]));
  }
};
#endif

#if defined(__AVX512VNNI__)
constexpr int kRowsOfIntegers = 4;  // twice that are faster from a cache, but slower from memory

// The sums of each four q.
inline int64_t sums_of(const QuantizedWeight&, int64_t length) { return length / 4; }
inline void sum_parts(const QuantizedWeight&, const int8_t* q, int64_t length, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  for (int64_t l = 0; l < length; l += 64)
    _mm512_storeu_si512(sums + l / 4, _mm512_dpbusd_epi32(_mm512_setzero_si512(), ones, _mm512_loadu_si512(q + l)));
}

// Modulo 2^32.
ISOTILE_INLINE int32_t sum_lanes(__m512i v) {
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(v), _mm512_extracti64x4_epi64(v, 1));
  __m128i r = _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
  r = _mm_add_epi32(r, _mm_shuffle_epi32(r, 0b01001110));
  return _mm_cvtsi128_si32(_mm_add_epi32(r, _mm_shuffle_epi32(r, 0b10110001)));
}

// vpdpbusd takes unsigned weights: codes of 0..15, or w + 128, whose zero point is 128. It comes off where a sum starts,
// so that each sum that meets a scale is exact: of the whole row, or of a lane's four products.
template <int kRows, bool kFourBits, bool kOffsets, bool kGroups>
inline void dot_integers(const QuantizedWeight& w, const uint8_t* row, const RowFactors& f, const IntegerRows& x,
                         float* sums) {
  constexpr bool kZeros = !kOffsets;
  const int32_t zero_of_row = !kZeros ? 0 : kFourBits ? f.zeros[0] : 128;
  __m512 acc[kRows];
  __m512i whole[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    acc[r] = _mm512_setzero_ps();
    whole[r] = _mm512_zextsi128_si512(_mm_cvtsi32_si128(x.less_zero(r, zero_of_row)));
  }
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(128)), low = _mm512_set1_epi8(15);
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
      if (x.fetches[0]) fetch_ahead<8192>(bytes);
      if (x.fetches[1]) fetch_ahead<8192>(bytes + 64);
      const auto mask = [](int64_t n) { return n >= 64 ? ~__mmask64{0} : n <= 0 ? 0 : (__mmask64{1} << n) - 1; };
      part[0] = left >= 64 ? _mm512_loadu_si512(bytes) : _mm512_maskz_loadu_epi8(mask(left), bytes);
      part[1] = left >= 128 ? _mm512_loadu_si512(bytes + 64) : _mm512_maskz_loadu_epi8(mask(left - 64), bytes + 64);
      part[0] = _mm512_xor_si512(part[0], sign);
      part[1] = _mm512_xor_si512(part[1], sign);
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
    if (kFourBits && kZeros && kGroups) {
      const __m512i z = _mm512_castsi128_si512(
          _mm_loadu_si128(reinterpret_cast<const __m128i*>(f.zeros.data() + piece * per)));
      zero[0] = _mm512_sub_epi16(_mm512_setzero_si512(), _mm512_permutexvar_epi32(group_low, z));
      zero[1] = _mm512_sub_epi16(_mm512_setzero_si512(), _mm512_permutexvar_epi32(group_high, z));
    }
    if (!kFourBits) zero[0] = zero[1] = _mm512_sub_epi16(_mm512_setzero_si512(), _mm512_set1_epi32(128));
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i q = _mm512_loadu_si512(x.q + piece * x.ldq + kPiece * r + 64 * h);
        if (!kGroups) {
          whole[r] = _mm512_dpbusd_epi32(whole[r], part[h], q);
          continue;
        }
        const __m512i quads = _mm512_loadu_si512(x.sums + piece * x.ldsums + 32 * r + 16 * h);
        const __m512i start = kZeros ? _mm512_madd_epi16(quads, zero[h]) : _mm512_setzero_si512();  // fit in 16 bits
        acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, part[h], q)), scale[h], acc[r]);
        if (kOffsets) acc[r] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(quads), offset[h], acc[r]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if (kGroups) {
      sums[r] = _mm512_reduce_add_ps(acc[r]);
      continue;
    }
    sums[r] = static_cast<float>(sum_lanes(whole[r])) * f.scales[0];
    if (kOffsets) sums[r] += static_cast<float>(x.totals[r]) * f.offsets[0];
  }
}
#elif defined(__AVX2__)
constexpr int kRowsOfIntegers = 4;

// Sixteen sums of two products, unsigned times signed; sums of pairs of 16 bits.
ISOTILE_INLINE __m256i multiply_bytes(__m256i a, __m256i b) { return _mm256_maddubs_epi16(a, b); }
ISOTILE_INLINE __m256i sum_pairs(__m256i v) { return _mm256_madd_epi16(v, _mm256_set1_epi16(1)); }
ISOTILE_INLINE float sum_lanes(__m256 v) {
  __m128 r = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  r = _mm_add_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}

// Lane i of a group's vector: the sum of q over what dot_integers multiplies in that lane.
inline int64_t sums_of(const QuantizedWeight& w, int64_t length) { return length / w.group * 8; }
inline void sum_parts(const QuantizedWeight& w, const int8_t* q, int64_t length, int32_t* sums) {
  for (int64_t l = 0; l < length; l += w.group, sums += 8) {
    __m256i sum = _mm256_setzero_si256();
    for (int64_t i = 0; i < w.group; i += 32) {
      const __m256i some = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(q + l + i));
      sum = _mm256_add_epi32(sum, sum_pairs(multiply_bytes(_mm256_set1_epi8(1), some)));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums), sum);
  }
}

// A lane sums four products of each vector exactly; 16 bits hold two products of bytes, and eight of four-bit numbers.
// Eight-bit: |w| times q with w's sign. Four-bit: the zero point times the sum of q is taken off. kPer: groups of a piece,
// 0: one for the whole row.
template <int kRows, bool kFourBits, bool kOffsets, int kPer>
inline void dot_integers(const QuantizedWeight& w, const uint8_t* row, const RowFactors& f, const IntegerRows& x,
                         float* sums) {
  constexpr int kGroups = kPer == 0 ? 1 : kPer, kParts = 4 / kGroups;  // of a piece, of a group
  const auto load = [](const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); };
  const __m256i low = _mm256_set1_epi8(15);
  __m256 acc[kRows];
  __m256i whole[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    acc[r] = _mm256_setzero_ps();
    whole[r] = _mm256_setzero_si256();
  }
  const int64_t pieces = ceil_div(w.k, kPiece);
  for (int64_t piece = 0; piece < pieces; ++piece) {
    __m256i part[4];
    uint8_t copy[kPiece];
    if (kFourBits) {
      const uint8_t* bytes = row + piece * (kPiece / 2);
      fetch_ahead(bytes);
#pragma GCC unroll 2
      for (int h = 0; h < 2; ++h) {
        const __m256i some = load(bytes + 32 * h);
        part[h] = _mm256_and_si256(some, low);
        part[2 + h] = _mm256_and_si256(_mm256_srli_epi16(some, 4), low);
      }
    } else {
      const uint8_t* bytes = row + piece * kPiece;
      const int64_t left = w.k - piece * kPiece;
      if (left < kPiece) {
        for (int64_t i = 0; i < kPiece; ++i) copy[i] = i < left ? bytes[i] : 0;
        bytes = copy;
      } else {
        fetch_ahead(bytes);
        fetch_ahead(bytes + 64);
      }
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) part[v] = load(bytes + 32 * v);
    }
#pragma GCC unroll 4
    for (int g = 0; g < kGroups; ++g) {
      const int64_t group = piece * kPer + g;
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int8_t* q = x.q + piece * x.ldq + kPiece * r + 32 * kParts * g;
        const int32_t* of_group = x.sums + piece * x.ldsums + 8 * (kGroups * r + g);
        __m256i exact = _mm256_setzero_si256(), sum = exact;
#pragma GCC unroll 4
        for (int u = 0; u < kParts; ++u) {
          const __m256i v = part[kParts * g + u], at = load(q + 32 * u);
          if (kFourBits) sum = _mm256_add_epi16(sum, multiply_bytes(v, at));
          else exact = _mm256_add_epi32(exact, sum_pairs(multiply_bytes(_mm256_abs_epi8(v), _mm256_sign_epi8(at, v))));
        }
        if (kFourBits) exact = sum_pairs(sum);
        if (kFourBits && !kOffsets && kPer != 0)  // both fit in 16 bits
          exact = _mm256_sub_epi32(exact, _mm256_madd_epi16(load(of_group), _mm256_set1_epi32(f.zeros[group])));
        if (kPer == 0) {
          whole[r] = _mm256_add_epi32(whole[r], exact);
          continue;
        }
        acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(exact), _mm256_set1_ps(f.scales[group]), acc[r]);
        if (kOffsets)
          acc[r] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(load(of_group)), _mm256_set1_ps(f.offsets[group]), acc[r]);
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    if (kPer != 0) {
      sums[r] = sum_lanes(acc[r]);
      continue;
    }
    if (kFourBits && !kOffsets)
      whole[r] = _mm256_add_epi32(whole[r], _mm256_zextsi128_si256(_mm_cvtsi32_si128(x.less_zero(r, f.zeros[0]))));
    int32_t lanes[8], total = 0;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(lanes), whole[r]);
    for (const int32_t lane : lanes) total += lane;
    sums[r] = static_cast<float>(total) * f.scales[0];
    if (kOffsets) sums[r] += static_cast<float>(x.totals[r]) * f.offsets[0];
  }
}
#endif

}  // namespace ISOTILE_ISA
}  // namespace isotile
