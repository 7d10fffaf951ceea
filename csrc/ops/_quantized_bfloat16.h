// A quantised weight as bfloat16, some elements of some rows at a time: what a product of bfloat16 reads.
#pragma once
#include <type_traits>

#include "ops/_quantized_few_rows.h"

#if ISOTILE_HAS_BF16_DOT
namespace isotile {
namespace ISOTILE_ISA {

constexpr int64_t kMadeElements = 256;  // of a row at once, at most

// Sixteen scales of a byte each: e4m3 numbers, or powers of two by their exponents (255: NaN).
ISOTILE_INLINE __m512 scales_of_codes(__m128i codes, Scheme scheme) {
  if (scheme == Scheme::kNvfp4) return floats_of_e4m3(codes);
  const __m512i exponent = _mm512_cvtepu8_epi32(codes);
  __m512 v = _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
  v = _mm512_mask_mov_ps(v, _mm512_testn_epi32_mask(exponent, exponent), _mm512_set1_ps(0x1p-127f));
  return _mm512_mask_mov_ps(v, _mm512_cmpeq_epi32_mask(exponent, _mm512_set1_epi32(255)),
                            _mm512_set1_ps(__builtin_nanf("")));
}

// Scales, zeros and offsets as float32, row by row, of the groups of `count` elements from k0 on; beyond the row's end 0.
struct PartFactors {
  static constexpr int64_t kMost = kMadeElements / 16;
  const QuantizedWeight& w;
  int64_t first, n;
  bool whole;  // all groups of the pieces exist, and so can be read where they lie
  const float* scales = copies;
  float copies[kMost], offsets[kMost];

  PartFactors(const QuantizedWeight& weight, int64_t k0, int64_t count) : w(weight) {
    first = w.groups > 1 ? k0 / w.group : 0;
    n = w.groups > 1 ? ceil_div(count, w.group) : 1;
    whole = w.groups == 1 || n * w.group == ceil_div(count, kPiece) * kPiece;
    for (int64_t g = 0; g < kMost; ++g) copies[g] = 0.0f, offsets[g] = 8.0f;
  }
  ISOTILE_INLINE void row(int64_t i) {
    const int64_t at = i * w.groups + first;
    if (whole && w.scales_dtype == DType::kFloat32) {
      scales = static_cast<const float*>(w.scales) + at;
    } else if (w.scales_dtype != DType::kUInt8) {
      load_any<false, float>(w.scales, w.scales_dtype, at, 1, n).store(copies);
    } else {
      const auto* codes = static_cast<const uint8_t*>(w.scales) + at;
      _mm512_storeu_ps(copies, scales_of_codes(_mm_maskz_loadu_epi8(first16(n), codes), w.scheme));
    }
    if (w.has_offsets()) {
      load_any<false, float>(w.zeros, w.zeros_dtype, at, 1, n).store(offsets);
    } else if (w.zeros != nullptr) {
      const auto* zeros = static_cast<const uint8_t*>(w.zeros) + at;
      _mm512_storeu_ps(offsets, _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(first16(n), zeros))));
    }
  }
};

// Sixteen numbers of 16 bits: those that a nibble may mean in a group.
enum class Nibbles { kLessEight, kLessZero, kPlusOffset, kE2m1 };
template <Nibbles kNibbles>
ISOTILE_INLINE __m256i meanings(float scale, float offset, float global) {
  const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512 less_eight = _mm512_sub_ps(codes, _mm512_set1_ps(8.0f));
  const __m512 s = _mm512_set1_ps(scale), o = _mm512_set1_ps(offset);
  __m512 v;
  if (kNibbles == Nibbles::kLessEight) v = _mm512_mul_ps(less_eight, s);
  else if (kNibbles == Nibbles::kLessZero) v = _mm512_mul_ps(_mm512_sub_ps(codes, o), s);
  else if (kNibbles == Nibbles::kPlusOffset) v = _mm512_add_ps(_mm512_mul_ps(codes, s), o);
  else v = _mm512_mul_ps(_mm512_mul_ps(_mm512_loadu_ps(kTables.e2m1), s), _mm512_set1_ps(global));
  return (__m256i)_mm512_cvtneps_pbh(v);
}

// kPer: groups of a piece, 0: one for the whole row.
template <Nibbles kNibbles, int kPer>
ISOTILE_INLINE void bfloat16_of_nibbles(const uint8_t* bytes, const PartFactors& f, int64_t count, BFloat16* out) {
  constexpr int kBlocksOfGroup = kPer == 0 ? 4 : kPer == 8 ? 1 : 4 / kPer;  // a block is 32 elements
  constexpr int kGroupsOfBlock = kPer == 8 ? 2 : 1;
  const auto table_of = [&](int64_t g) __attribute__((always_inline)) {
    return meanings<kNibbles>(f.scales[g], f.offsets[g], f.w.global);
  };
  __m512i table = _mm512_setzero_si512();
  if (kPer == 0) table = _mm512_broadcast_i64x4(table_of(0));
  int64_t g = 0;
  for (int64_t k = 0; k < count; k += kPiece, bytes += kPiece / 2) {
    const __m512i low = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes)));
    const __m512i high = _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32)));
    __m512i codes[4] = {low, high, _mm512_srli_epi16(low, 4), _mm512_srli_epi16(high, 4)};
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      if (kPer != 0 && v % kBlocksOfGroup == 0) {
        const __m256i first = table_of(g), second = kGroupsOfBlock == 2 ? table_of(g + 1) : first;
        table = _mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
        g += kGroupsOfBlock;
      }
      if (kGroupsOfBlock == 2) {  // the fifth bit chooses between the halves; else both are the same
        codes[v] = _mm512_and_si512(codes[v], _mm512_set1_epi16(15));
        codes[v] = _mm512_or_si512(codes[v], _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1));
      }
      _mm512_storeu_si512(out + k + 32 * v, _mm512_permutexvar_epi16(codes[v], table));
    }
  }
}

// kGroups: each group has a scale, not each row.
enum class Bytes { kIntegers, kE4m3, kE4m3AsTheyAre };
template <Bytes kBytes, bool kGroups>
ISOTILE_INLINE void bfloat16_of_bytes(const uint8_t* bytes, const PartFactors& f, int64_t count, BFloat16* out) {
  for (int64_t k = 0; k < count; k += 32) {
    const int64_t left = count - k;
    __m512 halves[2];
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const auto* at = reinterpret_cast<const __m128i*>(bytes + k + 16 * h);
      const __m128i some = left >= 32 ? _mm_loadu_si128(at)
                                      : _mm_maskz_loadu_epi8(left > 16 * h ? first16(left - 16 * h) : 0, at);
      halves[h] = kBytes == Bytes::kIntegers ? _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(some)) : floats_of_e4m3(some);
      const float scale = f.scales[kGroups ? (k + 16 * h) / f.w.group : 0];
      if (kBytes != Bytes::kE4m3AsTheyAre) halves[h] = _mm512_mul_ps(halves[h], _mm512_set1_ps(scale));
    }
    _mm512_storeu_si512(out + k, (__m512i)_mm512_cvtne2ps_pbh(halves[1], halves[0]));
  }
}

// Elements [k0, k0 + count) of rows [j, j + rows) of the weight, each row `ld` elements after the last. k0 is a multiple
// of a piece, count at most kMadeElements; up to whole pieces zeros follow. e4m3_as_it_is: its scales come later. Fetches
// what probably comes next.
inline void bfloat16_rows(const QuantizedWeight& w, int64_t j, int64_t rows, int64_t k0, int64_t count, BFloat16* out,
                          int64_t ld, bool e4m3_as_it_is) {
  const int64_t per_byte = w.four_bits() ? 2 : 1, lines = ceil_div(count / per_byte, 64);
  const int64_t next = k0 + count < w.k ? count / per_byte : rows * w.row_bytes - k0 / per_byte;
  PartFactors f(w, k0, count);
  const auto by_rows = [&](const auto& one) __attribute__((always_inline)) {
    for (int64_t i = 0; i < rows; ++i) {
      const uint8_t* bytes = w.row(j + i) + k0 / per_byte;
      BFloat16* to = out + i * ld;
      for (int64_t line = 0; line < lines; ++line) __builtin_prefetch(bytes + next + 64 * line, 0, 2);
      f.row(j + i);
      one(bytes, to);
      if (count % kPiece != 0) __builtin_memset(to + count, 0, (kPiece - count % kPiece) * sizeof(BFloat16));
    }
  };
  const int64_t per = w.groups > 1 ? kPiece / w.group : 0;
  const auto nibbles = [&](auto kind) {
    constexpr Nibbles kKind = decltype(kind)::value;
    switch (per) {
      case 0: return by_rows([&](const uint8_t* b, BFloat16* to) { bfloat16_of_nibbles<kKind, 0>(b, f, count, to); });
      case 1: return by_rows([&](const uint8_t* b, BFloat16* to) { bfloat16_of_nibbles<kKind, 1>(b, f, count, to); });
      case 2: return by_rows([&](const uint8_t* b, BFloat16* to) { bfloat16_of_nibbles<kKind, 2>(b, f, count, to); });
      case 4: return by_rows([&](const uint8_t* b, BFloat16* to) { bfloat16_of_nibbles<kKind, 4>(b, f, count, to); });
      default: return by_rows([&](const uint8_t* b, BFloat16* to) { bfloat16_of_nibbles<kKind, 8>(b, f, count, to); });
    }
  };
  const auto bytes = [&](auto kind, auto groups) {
    constexpr Bytes kKind = decltype(kind)::value;
    constexpr bool kGroups = decltype(groups)::value;
    by_rows([&](const uint8_t* b, BFloat16* to) { bfloat16_of_bytes<kKind, kGroups>(b, f, count, to); });
  };
  using std::integral_constant;
  if (w.scheme == Scheme::kFp8) {
    if (e4m3_as_it_is) return bytes(integral_constant<Bytes, Bytes::kE4m3AsTheyAre>{}, std::false_type{});
    return bytes(integral_constant<Bytes, Bytes::kE4m3>{}, std::false_type{});
  }
  if (!w.four_bits()) {
    if (per == 0) return bytes(integral_constant<Bytes, Bytes::kIntegers>{}, std::false_type{});
    return bytes(integral_constant<Bytes, Bytes::kIntegers>{}, std::true_type{});
  }
  if (!w.integer()) return nibbles(integral_constant<Nibbles, Nibbles::kE2m1>{});
  if (w.zeros == nullptr) return nibbles(integral_constant<Nibbles, Nibbles::kLessEight>{});
  if (w.has_offsets()) return nibbles(integral_constant<Nibbles, Nibbles::kPlusOffset>{});
  nibbles(integral_constant<Nibbles, Nibbles::kLessZero>{});
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
#endif
