// The vector contract that kernels are written against, and the choice of header for the set being compiled.
//
// Vec<float>, Vec<double>, Vec<int32_t> in namespace isotile::ISOTILE_ISA. kLanes lanes; Vec<int32_t> has as many as
// Vec<float>. T is float, double, BFloat16 or Float16 (Vec<int32_t>: int32_t only); conversions round to nearest even
// and keep NaN. 0 <= n; n >= kLanes means all lanes.
//   static zero(), set1(x), iota(start)       start, start + 1, ...
//   static load(const T* p)                   no alignment asked
//   static load(const T* p, int64_t n)        first n lanes, the rest 0; nothing beyond is read
//   static load_strided(const T* p, int64_t stride, int64_t n = kLanes)
//   store(T* p), store(T* p, int64_t n), store_strided(T* p, int64_t stride, int64_t n = kLanes)
//   stream(T* p)                              past the caches; p aligned to kLanes * sizeof(T); call stream_fence() last
//   + - * / unary -, += -= *= /=
//   fma(a, b, c) = a * b + c                  one rounding, except in `scalar` (no such instruction: two roundings)
//   fnma(a, b, c) = c - a * b                 likewise
//   max(a, b) = a > b ? a : b, min(a, b) = a < b ? a : b       so b where either is NaN
//   max_nan, min_nan                          NaN where either is NaN
//   abs, sqrt, round (to nearest even), copysign(magnitude, sign), is_nan
//   < <= > >= == !=                           a Mask, with & | !, any(), all(), Mask::first(n)
//   select(mask, a, b)                        mask ? a : b
//   reduce_add, reduce_max, reduce_min        over all lanes, in an order fixed for the set; reduce_max/min skip NaN
//                                             no further than max/min do
// Vec<int32_t>: + - * (low 32 bits) & | ^, shift_left<k>, shift_right<k> (logical), shift_right_sign<k>, comparisons
// (signed), mul_high_unsigned(a, b), load(const uint8_t* or int8_t*) (a byte a lane), to_float(i), to_int(f) (rounds to
// nearest even), as_int(f), as_float(i) (bits).
// Masks of Vec<float> and Vec<int32_t> are one type.
#pragma once
#include <cstdint>

#include "base/dtype.h"
#include "base/inline.h"

#ifndef ISOTILE_ISA
#error "compile with -DISOTILE_ISA=<instruction set>"
#endif

#if defined(ISOTILE_ISA_avx512_bf16) || defined(ISOTILE_ISA_amx)
#define ISOTILE_HAS_BF16_DOT 1
#else
#define ISOTILE_HAS_BF16_DOT 0
#endif

// Matrix tiles: tile.h.
#if defined(ISOTILE_ISA_amx)
#define ISOTILE_HAS_TILES 1
#else
#define ISOTILE_HAS_TILES 0
#endif

namespace isotile {
namespace ISOTILE_ISA {

template <class T>
struct Vec;
template <class T>
struct Mask;

// Lane by lane: for conversions and strides that the set has no instruction for.
template <class A, class T>
ISOTILE_INLINE void gather_lanes(A* out, const T* p, int64_t stride, int64_t n, int64_t lanes) {
  for (int64_t i = 0; i < lanes; ++i) out[i] = i < n ? static_cast<A>(to_accumulator(p[i * stride])) : A(0);
}
template <class A, class T>
ISOTILE_INLINE void scatter_lanes(const A* in, T* p, int64_t stride, int64_t n, int64_t lanes) {
  for (int64_t i = 0; i < lanes && i < n; ++i) from_accumulator(in[i], p + i * stride);
}

}  // namespace ISOTILE_ISA
}  // namespace isotile

#if defined(ISOTILE_ISA_avx512) || defined(ISOTILE_ISA_avx512_bf16) || defined(ISOTILE_ISA_amx)
#include "simd/avx512.h"
#elif defined(ISOTILE_ISA_avx2)
#include "simd/avx2.h"
#elif defined(ISOTILE_ISA_neon)
#include "simd/neon.h"
#elif defined(ISOTILE_ISA_scalar)
#include "simd/scalar.h"
#else
#error "unknown instruction set"
#endif

#include "simd/operators.h"
