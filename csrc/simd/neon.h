// NEON of any 64-bit Arm. Contract: vec.h.
#pragma once
#include <arm_neon.h>

#include "simd/vec128_types.h"

namespace isotile {
namespace ISOTILE_ISA {
namespace hardware {

ISOTILE_INLINE F4 fma(F4 a, F4 b, F4 c) { return (F4)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b); }
ISOTILE_INLINE D2 fma(D2 a, D2 b, D2 c) { return (D2)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b); }
ISOTILE_INLINE F4 sqrt(F4 a) { return (F4)vsqrtq_f32((float32x4_t)a); }
ISOTILE_INLINE D2 sqrt(D2 a) { return (D2)vsqrtq_f64((float64x2_t)a); }
ISOTILE_INLINE F4 round(F4 a) { return (F4)vrndnq_f32((float32x4_t)a); }
ISOTILE_INLINE D2 round(D2 a) { return (D2)vrndnq_f64((float64x2_t)a); }
ISOTILE_INLINE F4 load_half(const Float16* p) {
  return (F4)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(reinterpret_cast<const uint16_t*>(p))));
}
ISOTILE_INLINE void store_half(F4 a, Float16* p) {
  vst1_u16(reinterpret_cast<uint16_t*>(p), vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)a)));
}

}  // namespace hardware
}  // namespace ISOTILE_ISA
}  // namespace isotile

#include "simd/vec128.h"
