// No instruction set beyond the compiler's baseline, on any architecture. Contract: vec.h.
#pragma once
#include "simd/vec128_types.h"

namespace isotile {
namespace ISOTILE_ISA {
namespace hardware {

ISOTILE_INLINE F4 fma(F4 a, F4 b, F4 c) { return a * b + c; }
ISOTILE_INLINE D2 fma(D2 a, D2 b, D2 c) { return a * b + c; }
ISOTILE_INLINE F4 sqrt(F4 a) {
  return F4{__builtin_sqrtf(a[0]), __builtin_sqrtf(a[1]), __builtin_sqrtf(a[2]), __builtin_sqrtf(a[3])};
}
ISOTILE_INLINE D2 sqrt(D2 a) { return D2{__builtin_sqrt(a[0]), __builtin_sqrt(a[1])}; }
// Adding and taking away 2^23 rounds a smaller magnitude to an integer; larger ones (and NaN) are as they should be.
ISOTILE_INLINE F4 round(F4 a) {
  const F4 magic = {8388608.0f, 8388608.0f, 8388608.0f, 8388608.0f};
  const I4 sign = (I4)a & INT32_MIN;
  const F4 magnitude = (F4)((I4)a & INT32_MAX);
  const I4 small = magnitude < magic;
  const I4 rounded = (I4)((magnitude + magic) - magic) | sign;
  return (F4)((rounded & small) | ((I4)a & ~small));
}
ISOTILE_INLINE D2 round(D2 a) {
  const D2 magic = {4503599627370496.0, 4503599627370496.0};
  const L2 sign = (L2)a & INT64_MIN;
  const D2 magnitude = (D2)((L2)a & INT64_MAX);
  const L2 small = magnitude < magic;
  const L2 rounded = (L2)((magnitude + magic) - magic) | sign;
  return (D2)((rounded & small) | ((L2)a & ~small));
}
ISOTILE_INLINE F4 load_half(const Float16* p) {
  return F4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
ISOTILE_INLINE void store_half(F4 a, Float16* p) {
  for (int i = 0; i < 4; ++i) from_float(a[i], p + i);
}

}  // namespace hardware
}  // namespace ISOTILE_ISA
}  // namespace isotile

#include "simd/vec128.h"
