// Weights of bytes with one scale for each row, and so many rows of x (still few) that they leave the first cache: blocks
// of kSideOfBytes rows of the weight by so many elements of k that what these meet of x, and all sums, stay there.
// Integers where there is vpdpbusd, bfloat16 where there is vdpbf16ps.
#pragma once
#include "base/cpu.h"
#include "ops/_quantized_few_rows.h"

#if defined(__AVX512VNNI__)
namespace isotile {
namespace ISOTILE_ISA {

constexpr int64_t kSideOfBytes = 16;
constexpr int64_t kRowsAhead = 8;     // rows that are asked for ahead
constexpr int64_t kBytesOfX = 10240;  // that a block meets, about

// Weights plus 128, unsigned, times signed bytes. The 128 comes off where the sums start.
struct ByteProducts {
  using X = int8_t;
  static constexpr int64_t kStep = 64;  // elements of a vector
  static constexpr bool kMostRows = false;

  static ISOTILE_INLINE __m512i weights(const uint8_t* bytes, int64_t left) {
    const __mmask64 some = left >= 64 ? ~__mmask64{0} : (__mmask64{1} << left) - 1;
    return _mm512_xor_si512(_mm512_maskz_loadu_epi8(some, bytes), _mm512_set1_epi8(static_cast<char>(128)));
  }
  static ISOTILE_INLINE Vec<float> dot(Vec<float> sum, __m512i w, const X* x) {
    return as_float(Vec<int32_t>{_mm512_dpbusd_epi32(as_int(sum).v, w, _mm512_loadu_si512(x))});
  }
  static ISOTILE_INLINE Vec<float> start(int32_t total) {
    const auto less_zero = static_cast<int32_t>(0u - 128u * static_cast<uint32_t>(total));
    return as_float(Vec<int32_t>{_mm512_zextsi128_si512(_mm_cvtsi32_si128(less_zero))});
  }
  static ISOTILE_INLINE Vec<float> whole(const Vec<float>* sums) {
    const auto add = [](Vec<float> a, Vec<float> b) { return as_float(as_int(a) + as_int(b)); };
    return to_float(as_int(combine_16(sums, add)));
  }
};

#if ISOTILE_HAS_BF16_DOT
struct PairProducts {
  using X = uint16_t;
  static constexpr int64_t kStep = 32;
  static constexpr bool kMostRows = true;  // a row of the weight is converted for all rows of x at once

  static ISOTILE_INLINE __m512i weights(const uint8_t* bytes, int64_t left) { return pairs_of_bytes(bytes, 0, left); }
  static ISOTILE_INLINE Vec<float> dot(Vec<float> sum, __m512i w, const X* x) {
    return {_mm512_dpbf16_ps(sum.v, (__m512bh)w, (__m512bh)_mm512_loadu_si512(x))};
  }
  static ISOTILE_INLINE Vec<float> start(int32_t) { return Vec<float>::zero(); }
  static ISOTILE_INLINE Vec<float> whole(const Vec<float>* sums) {
    return combine_16(sums, [](Vec<float> a, Vec<float> b) { return a + b; });
  }
};
#endif

// Bytes pay where a block is of whole rows, or x would leave the cache: parts of rows reach memory's speed less often.
template <class Products>
inline bool serves_byte_blocks(const QuantizedWeight& w, int64_t m) {
  if (w.four_bits() || w.groups > 1) return false;
  const int64_t bytes = m * w.k * static_cast<int64_t>(sizeof(typename Products::X));
  return (m > 4 && (Products::kMostRows || bytes <= kBytesOfX)) || bytes > l1_cache_bytes() / 3 * 2;
}

// sums [kRows][kSideOfBytes][16], in the first of those places: += `length` elements of a row of the weight times kRows
// rows of x.
template <class Products, int kRows>
ISOTILE_INLINE void add_bytes(const uint8_t* bytes, int64_t length, const typename Products::X* x, int64_t ldx,
                              float* sums, const uint8_t* ahead) {
  constexpr int64_t kStep = Products::kStep, kNext = kSideOfBytes * 16;
  Vec<float> acc[kRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) acc[r] = Vec<float>::load(sums + kNext * r);
  const auto step = [&](int64_t u, int64_t left) __attribute__((always_inline)) {
    const __m512i w = Products::weights(bytes + u, left);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) acc[r] = Products::dot(acc[r], w, x + kPiece * r + u);
  };
  for (; length >= kPiece; length -= kPiece, bytes += kPiece, ahead += kPiece, x += ldx) {
    __builtin_prefetch(ahead, 0, 3);
    __builtin_prefetch(ahead + 64, 0, 3);
#pragma GCC unroll 4
    for (int64_t u = 0; u < kPiece; u += kStep) step(u, kStep);
  }
  for (int64_t u = 0; u < length; u += kStep) step(u, length - u);
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) acc[r].store(sums + kNext * r);
}

// Rows [j0, j0 + rows) of the weight. x: a piece of each row [k / 128][m][128]; sums [m][kSideOfBytes][16], which have
// been started.
template <class Products, class ByRows>
inline void add_block(const QuantizedWeight& w, int64_t j0, int64_t rows, const typename Products::X* x, int64_t m,
                      float* sums, const ByRows& by_rows) {
  const int64_t padded = ceil_div(w.k, kPiece) * kPiece;
  const int64_t chunk = even_chunk(padded, kBytesOfX / m / static_cast<int64_t>(sizeof(typename Products::X)));
  for (int64_t k0 = 0; k0 < w.k; k0 += chunk) {
    const int64_t length = least(chunk, w.k - k0);
    for (int64_t j = 0; j < rows; ++j) {
      // At the block's end its next elements, or the next block.
      const int64_t over = j + kRowsAhead - rows;
      const uint8_t* ahead = over < 0           ? w.row(j0 + j + kRowsAhead) + k0
                             : k0 + chunk < w.k ? w.row(j0 + over) + k0 + chunk
                                                : w.row(j0 + rows + over);
      by_rows(m, [&](auto count, int64_t r) {
        add_bytes<Products, decltype(count)::value>(w.row(j0 + j) + k0, length, x + k0 * m + r * kPiece, m * kPiece,
                                                    sums + (r * kSideOfBytes + j) * 16, ahead);
      });
    }
  }
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
#endif
