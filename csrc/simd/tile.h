// The matrix tile contract: eight registers of up to 16 rows x 64 bytes, and products of whole tiles (Intel AMX).
//
// Where ISOTILE_HAS_TILES is 0 there is nothing here, and a kernel does the same sums through vec.h. That is on
// purpose: a register tile of vectors wants another shape (6 x 4 vectors), other packing and no configuration, so
// tiles imitated with vectors would be slower than the plain kernel, and no shorter.
//
//   constexpr tiles::Config config = tiles::Config::uniform();          all eight tiles of 16 x 64 bytes, or
//   tiles::Config c; c.set(0, 16, 64); ...                              rows and bytes of a row for each
//   tiles::Scope scope(config);      configures this thread's tiles; releases them at the end of the scope
//   scope.use(other)                 another configuration, if it is another object; all tiles become 0
//
// A kernel opens one Scope in each task (a body of parallel_for), not in each tile: configuring costs about as much as
// twenty products. Releasing matters: tiles that are in use are 8 KB more to save at every context switch. Scopes do
// not nest: the inner one's end would release the outer one's tiles. Nothing that a kernel calls in between uses tiles.
//
//   zero<t>()
//   load<t>(p, stride), load_once<t>(p, stride)    rows p, p + stride, ... (bytes); load_once: not used again soon
//   store<t>(p, stride)
//   dot_bf16<c, a, b>()       c [rows][n] float32 += a [rows][32] x b [16][n][2], bfloat16
//   dot_u8s8<c, a, b>(), dot_s8s8, dot_s8u8, dot_u8u8      c [rows][n] int32 += a [rows][64] x b [16][n][4]
//
// Tile numbers are constants. b holds k-pairs (quads for 8 bits): row r of b has, for each column, elements 2r and
// 2r + 1 (4r ... 4r + 3) of k. pack_pairs and pack_quads make it from rows of k, transpose_words from columns.
// Integers: exact modulo 2^32. bfloat16, for each element of c:
//   even = odd = 0;  for r = 0..15: even = fma(a[2r], b[2r], even), odd = fma(a[2r+1], b[2r+1], odd)
//   c += even + odd                                  in float32, subnormals in and out taken as 0, rounded to nearest
// so the bits depend on how k is cut into tiles and on nothing else, and zeros that fill a tile up change nothing.
#pragma once
#include "simd/vec.h"

#if ISOTILE_HAS_TILES
#include <immintrin.h>

namespace isotile {
namespace ISOTILE_ISA {
namespace tiles {

constexpr int kRows = 16, kBytes = 64, kCount = 8;

// The operand of ldtilecfg, palette 1.
struct alignas(64) Config {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  constexpr void set(int tile, int tile_rows, int bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }
  static constexpr Config uniform(int tile_rows = kRows, int bytes = kBytes) {
    Config c;
    for (int t = 0; t < kCount; ++t) c.set(t, tile_rows, bytes);
    return c;
  }
};

// The instructions stand in assembly because the compilers' own functions take no template constants, and because
// GCC's do not tell that they read and write memory.
class Scope {
 public:
  Scope() = default;  // not configured before use()
  ISOTILE_INLINE explicit Scope(const Config& config) { use(config); }
  ISOTILE_INLINE ~Scope() {
    if (current_ != nullptr) __asm__ volatile("tilerelease" ::: "memory");
  }
  Scope(const Scope&) = delete;
  Scope& operator=(const Scope&) = delete;
  ISOTILE_INLINE void use(const Config& config) {
    if (current_ == &config) return;
    __asm__ volatile("ldtilecfg %0" ::"m"(config) : "memory");
    current_ = &config;
  }

 private:
  const Config* current_ = nullptr;
};

template <int t>
ISOTILE_INLINE void zero() {
  __asm__ volatile("tilezero %%tmm%c0" ::"i"(t));
}
template <int t>
ISOTILE_INLINE void load(const void* p, int64_t stride) {
  __asm__ volatile("tileloadd (%1,%2,1), %%tmm%c0" ::"i"(t), "r"(p), "r"(stride) : "memory");
}
template <int t>
ISOTILE_INLINE void load_once(const void* p, int64_t stride) {
  __asm__ volatile("tileloaddt1 (%1,%2,1), %%tmm%c0" ::"i"(t), "r"(p), "r"(stride) : "memory");
}
template <int t>
ISOTILE_INLINE void store(void* p, int64_t stride) {
  __asm__ volatile("tilestored %%tmm%c0, (%1,%2,1)" ::"i"(t), "r"(p), "r"(stride) : "memory");
}
template <int c, int a, int b>
ISOTILE_INLINE void dot_bf16() {
  __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
template <int c, int a, int b>
ISOTILE_INLINE void dot_u8s8() {
  __asm__ volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
template <int c, int a, int b>
ISOTILE_INLINE void dot_s8s8() {
  __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
template <int c, int a, int b>
ISOTILE_INLINE void dot_s8u8() {
  __asm__ volatile("tdpbsud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}
template <int c, int a, int b>
ISOTILE_INLINE void dot_u8u8() {
  __asm__ volatile("tdpbuud %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(c), "i"(a), "i"(b));
}

// Packing. Each writes a whole tile (16 rows of 64 bytes, `out_stride` bytes apart), 0 where there is no element, and
// reads nothing beyond the elements named.

// Rows of k: b [k <= 32][n <= 16], `stride` elements from one k to the next -> [16][16][2].
ISOTILE_INLINE void pack_pairs(const BFloat16* b, int64_t stride, int64_t k, int64_t n, void* out,
                               int64_t out_stride = kBytes) {
  const __mmask16 columns = Mask<float>::first(n).m;
  char* to = static_cast<char*>(out);
  for (int64_t r = 0; r < kRows; ++r, to += out_stride) {
    const int64_t k0 = 2 * r, k1 = k0 + 1;
    const __m256i even = _mm256_maskz_loadu_epi16(k0 < k ? columns : 0, b + k0 * stride);
    const __m256i odd = _mm256_maskz_loadu_epi16(k1 < k ? columns : 0, b + k1 * stride);
    _mm512_storeu_si512(to, _mm512_or_si512(_mm512_cvtepu16_epi32(even),
                                            _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16)));
  }
}

// Rows of k: b [k <= 64][n <= 16] of bytes -> [16][16][4].
ISOTILE_INLINE void pack_quads(const void* b, int64_t stride, int64_t k, int64_t n, void* out,
                               int64_t out_stride = kBytes) {
  const __mmask16 columns = Mask<float>::first(n).m;
  const char* from = static_cast<const char*>(b);
  char* to = static_cast<char*>(out);
  for (int64_t r = 0; r < kRows; ++r, to += out_stride) {
    __m128i q[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i)
      q[i] = _mm_maskz_loadu_epi8(4 * r + i < k ? columns : 0, from + (4 * r + i) * stride);
    const __m128i low01 = _mm_unpacklo_epi8(q[0], q[1]), high01 = _mm_unpackhi_epi8(q[0], q[1]);
    const __m128i low23 = _mm_unpacklo_epi8(q[2], q[3]), high23 = _mm_unpackhi_epi8(q[2], q[3]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm_unpacklo_epi16(low01, low23));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 16), _mm_unpackhi_epi16(low01, low23));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 32), _mm_unpacklo_epi16(high01, high23));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 48), _mm_unpackhi_epi16(high01, high23));
  }
}

// Columns of k: n <= 16 columns, `stride` bytes apart, of k_bytes <= 64 bytes each -> their words of 4 bytes as rows.
// For bfloat16 pairs and quads of bytes alike.
ISOTILE_INLINE void transpose_words(const void* b, int64_t stride, int64_t k_bytes, int64_t n, void* out,
                                    int64_t out_stride = kBytes) {
  const char* from = static_cast<const char*>(b);
  const __mmask64 bytes = k_bytes >= 64 ? ~__mmask64{0} : (__mmask64{1} << k_bytes) - 1;
  __m512 words[16];
#pragma GCC unroll 16
  for (int c = 0; c < 16; ++c)
    words[c] = _mm512_castsi512_ps(_mm512_maskz_loadu_epi8(c < n ? bytes : 0, from + c * stride));
  transpose_16x16(words);
  char* to = static_cast<char*>(out);
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) _mm512_storeu_ps(to + r * out_stride, words[r]);
}

}  // namespace tiles
}  // namespace ISOTILE_ISA
}  // namespace isotile
#endif
