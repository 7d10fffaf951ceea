// The register tile of matrix products: acc [kRows][kVecs vectors] += a [kRows][step] x b [step][kVecs vectors].
//
// A step is one k, or a pair of them with vdpbf16ps. With 32 registers the tile is 6 x 4 vectors: 24 accumulators, 4
// vectors of b, one broadcast of a; each load of b serves 6 products and each broadcast 4, so the products set the
// pace.
#pragma once
#include <type_traits>

#include "base/dtype.h"
#include "base/tensor_view.h"
#include "simd/vec.h"

namespace isotile {
namespace ISOTILE_ISA {

// Vectors across the register tile: 6 x 4 accumulators want 32 registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRegisterVecs = 4;
#else
constexpr int kRegisterVecs = 2;
#endif

constexpr int64_t kTileRows = 6;

// A region of rows of memory to be fetched into a cache (3: L1, 2: L2), some lines of 64 bytes at each call. Empty:
// nothing happens.
struct Prefetch {
  const char* row = nullptr;
  int64_t row_lines = 0, row_stride = 0, rows_left = 0, per_call = 0, line = 0;

  template <int kCache = 2>
  ISOTILE_INLINE void next() {
    for (int64_t left = per_call; left > 0 && rows_left > 0;) {
      const int64_t count = left < row_lines - line ? left : row_lines - line;
      const char* at = row + 64 * line;
      for (const char* const end = at + 64 * count; at != end; at += 64) __builtin_prefetch(at, 0, kCache);
      left -= count;
      line += count;
      if (__builtin_expect(line < row_lines, 1)) return;
      line = 0;
      row += row_stride;
      --rows_left;
    }
  }
};

// float or double arithmetic; 16-bit operands are converted when they are packed.
template <class T>
struct FloatKind {
  using Acc = T;
  using Packed = T;
  using Operand = Vec<T>;
  static constexpr DType kAccType = sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32;
  static constexpr int kLanes = Vec<T>::kLanes;
  static constexpr int64_t kChunk = 768;
  static constexpr int64_t kPerStep = 1;
  static ISOTILE_INLINE int64_t steps(int64_t k) { return k; }
  static ISOTILE_INLINE Operand zero() { return Vec<T>::zero(); }
  static ISOTILE_INLINE Operand load(const Packed* p) { return Vec<T>::load(p); }
  static ISOTILE_INLINE Operand broadcast(const Packed* p) { return Vec<T>::set1(*p); }
  static ISOTILE_INLINE Vec<T> multiply_add(Operand a, Operand b, Vec<T> c) { return fma(a, b, c); }
  static ISOTILE_INLINE Packed pack(const double* p, int64_t, int64_t) { return static_cast<T>(*p); }
  static ISOTILE_INLINE Packed pack(const float* p, int64_t, int64_t) { return static_cast<T>(*p); }
  template <class Src>
  static ISOTILE_INLINE Packed pack(const Src* p, int64_t, int64_t) {
    return static_cast<T>(to_float(*p));
  }
  // The steps at p, p + 1, ...: `count` is a multiple of the lanes.
  template <class Src>
  static ISOTILE_INLINE void pack_run(Packed* dst, const Src* p, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) Vec<T>::load(p + i).store(dst + i);
  }
  // One step of the n columns at p, p + 1, ..., and zeros up to the lanes; kFull: n is not looked at.
  template <bool kFull, class Src>
  static ISOTILE_INLINE Operand lanes(const Src* p, int64_t, int64_t, int64_t n) {
    return kFull ? Vec<T>::load(p) : Vec<T>::load(p, n);
  }
  static ISOTILE_INLINE void store(Operand v, Packed* p) { v.store(p); }
#if defined(__AVX512F__)
  static ISOTILE_INLINE Operand from_float(__m512 v) { return {v}; }
  static ISOTILE_INLINE auto raw(Operand v) { return v.v; }
#endif
};

#if ISOTILE_HAS_BF16_DOT
// bfloat16 products two at a time (vdpbf16ps), float32 accumulators. The instruction takes subnormal operands as 0.
struct PairKind {
  using Acc = float;
  using Packed = uint32_t;  // elements k (low half) and k + 1
  using Operand = __m512i;
  static constexpr DType kAccType = DType::kFloat32;
  static constexpr int kLanes = 16;
  static constexpr int64_t kChunk = 1024;
  static constexpr int64_t kPerStep = 2;
  static ISOTILE_INLINE int64_t steps(int64_t k) { return (k + 1) / 2; }
  static ISOTILE_INLINE Operand zero() { return _mm512_setzero_si512(); }
  static ISOTILE_INLINE Operand load(const Packed* p) { return _mm512_loadu_si512(p); }
  static ISOTILE_INLINE Operand broadcast(const Packed* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static ISOTILE_INLINE Vec<float> multiply_add(Operand a, Operand b, Vec<float> c) {
    return {_mm512_dpbf16_ps(c.v, (__m512bh)a, (__m512bh)b)};
  }
  // left: how many of the step's elements exist.
  static ISOTILE_INLINE Packed pack(const BFloat16* p, int64_t stride, int64_t left) {
    return p[0].bits | (left > 1 ? static_cast<uint32_t>(p[stride].bits) << 16 : 0u);
  }
  static ISOTILE_INLINE void pack_run(Packed* dst, const BFloat16* p, int64_t count) {
    __builtin_memcpy(dst, p, count * sizeof(Packed));
  }
  template <bool kFull>
  static ISOTILE_INLINE Operand lanes(const BFloat16* p, int64_t stride, int64_t left, int64_t n) {
    const auto load = [n](const BFloat16* at) {
      const __m256i v = kFull ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at))
                              : _mm256_maskz_loadu_epi16(Mask<float>::first(n).m, at);
      return _mm512_cvtepu16_epi32(v);
    };
    if (left == 1) return load(p);
    return _mm512_or_si512(load(p), _mm512_slli_epi32(load(p + stride), 16));
  }
  static ISOTILE_INLINE void store(Operand v, Packed* p) { _mm512_storeu_si512(p, v); }
  static ISOTILE_INLINE Operand from_float(__m512 v) { return _mm512_castps_si512(v); }
  static ISOTILE_INLINE __m512 raw(Operand v) { return _mm512_castsi512_ps(v); }
};
#endif

// acc [kRows, kVecs vectors] += a [kRows][step] x b [step][kVecs vectors], step after step.
template <class Kind, int kRows, int kVecs>
struct Tile {
  using V = Vec<typename Kind::Acc>;
  V acc[kRows][kVecs];

  // The lines of c, which the sums go to when they are done.
  static ISOTILE_INLINE void fetch(const typename Kind::Acc* c, int64_t ldc) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) __builtin_prefetch(c + i * ldc + v * Kind::kLanes, 1, 3);
  }
  ISOTILE_INLINE void clear() {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] = V::zero();
  }
  ISOTILE_INLINE void load(const typename Kind::Acc* c, int64_t ldc) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] = V::load(c + i * ldc + v * Kind::kLanes);
  }
  // Step s of the rows of a; b: its vectors.
  ISOTILE_INLINE void step(const typename Kind::Packed* const (&a)[kRows], int64_t s,
                           const typename Kind::Operand (&b)[kVecs]) {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const typename Kind::Operand av = Kind::broadcast(a[i] + s);
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) acc[i][v] = Kind::multiply_add(av, b[v], acc[i][v]);
    }
  }
  ISOTILE_INLINE void store(typename Kind::Acc* c, int64_t ldc, bool add) const {
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 8
      for (int v = 0; v < kVecs; ++v) {
        typename Kind::Acc* at = c + i * ldc + v * Kind::kLanes;
        (add ? V::load(at) + acc[i][v] : acc[i][v]).store(at);
      }
    }
  }
};

// A vector of packed steps, or of elements that are steps but for their type.
template <class Kind, class Src>
ISOTILE_INLINE typename Kind::Operand load_step(const Src* p) {
  if constexpr (std::is_same_v<Src, typename Kind::Packed>) return Kind::load(p);
  else return Kind::template lanes<true>(p, 0, 0, 0);
}

// What becomes of c: the sum over the steps, c plus that sum, or c with the steps' products added one after another.
enum class Into { kSet, kAdd, kContinue };

// c [kRows, kVecs vectors], row stride ldc. a: where each row's steps start; b: the first step, the others `b_step`
// elements apart. prefetch fetches what comes next.
template <class Kind, int kRows, int kVecs, class Src>
__attribute__((noinline)) void gemm_tile(int64_t steps, const typename Kind::Packed* const* a, const Src* b,
                                         int64_t b_step, typename Kind::Acc* c, int64_t ldc, Into into,
                                         Prefetch* prefetch) {
  Tile<Kind, kRows, kVecs> tile;
  if (into == Into::kContinue) {
    tile.load(c, ldc);
  } else {
    tile.clear();
    tile.fetch(c, ldc);
  }
  const typename Kind::Packed* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = a[i];
  const auto step = [&](int64_t s) __attribute__((always_inline)) {
    typename Kind::Operand bv[kVecs];
#pragma GCC unroll 8
    for (int v = 0; v < kVecs; ++v) bv[v] = load_step<Kind>(b + v * Kind::kLanes);
    tile.step(row, s, bv);
    b += b_step;
  };
  int64_t s = 0;
  if (prefetch->rows_left > 0) {
    for (; s + 4 <= steps; s += 4) {
      prefetch->next();
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) step(s + u);
    }
  }
  for (; s + 4 <= steps; s += 4) {
#pragma GCC unroll 4
    for (int u = 0; u < 4; ++u) step(s + u);
  }
  for (; s < steps; ++s) step(s);
  tile.store(c, ldc, into == Into::kAdd);
}

// The same, and on the way b is packed for the tiles that follow.
template <class Kind, int kRows>
__attribute__((noinline)) void gemm_tile_packing(int64_t steps, const typename Kind::Packed* const* a,
                                                 const typename Kind::Packed* b, int64_t b_step,
                                                 typename Kind::Packed* packed, typename Kind::Acc* c, int64_t ldc,
                                                 Into into, Prefetch* prefetch) {
  constexpr int64_t kAhead = 8;  // steps to fetch ahead: enough from L2 to L1, and some way from further off
  Tile<Kind, kRows, kRegisterVecs> tile;
  tile.clear();
  tile.fetch(c, ldc);
  const typename Kind::Packed* row[kRows];
  for (int i = 0; i < kRows; ++i) row[i] = a[i];
  for (int64_t s = 0; s < steps; ++s, b += b_step, packed += kRegisterVecs * Kind::kLanes) {
    if (s % 4 == 0) prefetch->next();
    typename Kind::Operand bv[kRegisterVecs];
    const int64_t ahead = s + kAhead < steps ? kAhead * b_step : 0;
#pragma GCC unroll 8
    for (int v = 0; v < kRegisterVecs; ++v) {
      __builtin_prefetch(b + v * Kind::kLanes + ahead, 0, 3);
      bv[v] = Kind::load(b + v * Kind::kLanes);
      Kind::store(bv[v], packed + v * Kind::kLanes);
    }
    tile.step(row, s, bv);
  }
  tile.store(c, ldc, into == Into::kAdd);
}

template <class Kind, class Src = typename Kind::Packed>
using TileFunction = void (*)(int64_t, const typename Kind::Packed* const*, const Src*, int64_t, typename Kind::Acc*,
                              int64_t, Into, Prefetch*);

template <class Kind, int kVecs, class Src = typename Kind::Packed>
inline TileFunction<Kind, Src> tile_with_rows(int64_t rows) {
  switch (rows) {
    case 1: return gemm_tile<Kind, 1, kVecs, Src>;
    case 2: return gemm_tile<Kind, 2, kVecs, Src>;
    case 3: return gemm_tile<Kind, 3, kVecs, Src>;
    case 4: return gemm_tile<Kind, 4, kVecs, Src>;
    case 5: return gemm_tile<Kind, 5, kVecs, Src>;
    default: return gemm_tile<Kind, 6, kVecs, Src>;
  }
}

template <class Kind>
inline TileFunction<Kind> tile_function(int64_t rows, int64_t width) {
  switch (width / Kind::kLanes) {
    case 1: return tile_with_rows<Kind, 1>(rows);
    case 2: return tile_with_rows<Kind, 2>(rows);
    case 3: return tile_with_rows<Kind, kRegisterVecs < 3 ? kRegisterVecs : 3>(rows);
    default: return tile_with_rows<Kind, kRegisterVecs>(rows);
  }
}

template <class Kind>
using PackingTile = void (*)(int64_t, const typename Kind::Packed* const*, const typename Kind::Packed*, int64_t,
                             typename Kind::Packed*, typename Kind::Acc*, int64_t, Into, Prefetch*);

template <class Kind>
inline PackingTile<Kind> packing_tile(int64_t rows) {
  switch (rows) {
    case 1: return gemm_tile_packing<Kind, 1>;
    case 2: return gemm_tile_packing<Kind, 2>;
    case 3: return gemm_tile_packing<Kind, 3>;
    case 4: return gemm_tile_packing<Kind, 4>;
    case 5: return gemm_tile_packing<Kind, 5>;
    default: return gemm_tile_packing<Kind, 6>;
  }
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
