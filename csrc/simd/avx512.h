// AVX-512 (x86-64-v4), with BF16 and VNNI where the set has them. Contract: vec.h.
#pragma once
#include <immintrin.h>

namespace isotile {
namespace ISOTILE_ISA {

template <>
struct Mask<float> {
  __mmask16 m;
  static ISOTILE_INLINE Mask first(int64_t n) {
    return {static_cast<__mmask16>(n >= 16 ? 0xffffu : (1u << n) - 1u)};
  }
  ISOTILE_INLINE bool any() const { return m != 0; }
  ISOTILE_INLINE bool all() const { return m == 0xffffu; }
};
template <>
struct Mask<int32_t> : Mask<float> {};
template <>
struct Mask<double> {
  __mmask8 m;
  static ISOTILE_INLINE Mask first(int64_t n) { return {static_cast<__mmask8>(n >= 8 ? 0xffu : (1u << n) - 1u)}; }
  ISOTILE_INLINE bool any() const { return m != 0; }
  ISOTILE_INLINE bool all() const { return m == 0xffu; }
};

ISOTILE_INLINE Mask<float> operator&(Mask<float> a, Mask<float> b) { return {static_cast<__mmask16>(a.m & b.m)}; }
ISOTILE_INLINE Mask<float> operator|(Mask<float> a, Mask<float> b) { return {static_cast<__mmask16>(a.m | b.m)}; }
ISOTILE_INLINE Mask<float> operator!(Mask<float> a) { return {static_cast<__mmask16>(~a.m)}; }
ISOTILE_INLINE Mask<double> operator&(Mask<double> a, Mask<double> b) { return {static_cast<__mmask8>(a.m & b.m)}; }
ISOTILE_INLINE Mask<double> operator|(Mask<double> a, Mask<double> b) { return {static_cast<__mmask8>(a.m | b.m)}; }
ISOTILE_INLINE Mask<double> operator!(Mask<double> a) { return {static_cast<__mmask8>(~a.m)}; }

ISOTILE_INLINE __mmask16 first16(int64_t n) { return Mask<float>::first(n).m; }
ISOTILE_INLINE __mmask8 first8(int64_t n) { return Mask<double>::first(n).m; }

ISOTILE_INLINE __m256i bf16_by_integers(__m512 v) {
  const __m512i b = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(b, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(b, _mm512_set1_epi32(0x7fff)), odd);
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), b, _mm512_set1_epi32(0x00400000));
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16));
}
ISOTILE_INLINE __m256i bf16_from_float(__m512 v) {
#if ISOTILE_HAS_BF16_DOT
  constexpr int kSubnormal = 0x20;  // the instruction would flush them
  if (__builtin_expect(_mm512_fpclass_ps_mask(v, kSubnormal) == 0, 1)) return (__m256i)_mm512_cvtneps_pbh(v);
#endif
  return bf16_by_integers(v);
}
ISOTILE_INLINE __m512 float_from_bf16(__m256i v) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
}
ISOTILE_INLINE __m256i half_from_float(__m512 v) {
  return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

// Words of 32 bits: m[i] lane j becomes m[j] lane i.
ISOTILE_INLINE void transpose_16x16(__m512 (&m)[16]) {
  __m512 t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(m[i], m[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(m[i], m[i + 1]);
  }
  __m512 r[16];
#pragma GCC unroll 4
  for (int i = 0; i < 16; i += 4) {  // r[i + c]: rows i .. i + 3, columns c, 4 + c, 8 + c, 12 + c
#pragma GCC unroll 2
    for (int h = 0; h < 2; ++h) {
      const __m512d low = _mm512_castps_pd(t[i + h]), high = _mm512_castps_pd(t[i + h + 2]);
      r[i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      r[i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512 even0 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88), odd0 = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const __m512 even1 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const __m512 odd1 = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    m[c] = _mm512_shuffle_f32x4(even0, even1, 0x88);
    m[8 + c] = _mm512_shuffle_f32x4(even0, even1, 0xdd);
    m[4 + c] = _mm512_shuffle_f32x4(odd0, odd1, 0x88);
    m[12 + c] = _mm512_shuffle_f32x4(odd0, odd1, 0xdd);
  }
}

template <>
struct Vec<float> {
  using Scalar = float;
  using Mask = ISOTILE_ISA::Mask<float>;
  static constexpr int kLanes = 16;
  __m512 v;

  static ISOTILE_INLINE Vec zero() { return {_mm512_setzero_ps()}; }
  static ISOTILE_INLINE Vec set1(float x) { return {_mm512_set1_ps(x)}; }
  static ISOTILE_INLINE Vec iota(float start) {
    return {_mm512_add_ps(_mm512_set1_ps(start),
                          _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))};
  }
  static ISOTILE_INLINE Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
  static ISOTILE_INLINE Vec load(const float* p, int64_t n) { return {_mm512_maskz_loadu_ps(first16(n), p)}; }
  static ISOTILE_INLINE Vec load(const BFloat16* p) {
    return {float_from_bf16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static ISOTILE_INLINE Vec load(const BFloat16* p, int64_t n) {
    return {float_from_bf16(_mm256_maskz_loadu_epi16(first16(n), p))};
  }
  static ISOTILE_INLINE Vec load(const Float16* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
  }
  static ISOTILE_INLINE Vec load(const Float16* p, int64_t n) {
    return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first16(n), p))};
  }
  static ISOTILE_INLINE Vec load(const double* p) {
    const __m256 low = _mm512_cvtpd_ps(_mm512_loadu_pd(p));
    const __m256 high = _mm512_cvtpd_ps(_mm512_loadu_pd(p + 8));
    return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
  }
  static ISOTILE_INLINE Vec load(const double* p, int64_t n) {
    const __m256 low = _mm512_cvtpd_ps(_mm512_maskz_loadu_pd(first8(n), p));
    const __m256 high = _mm512_cvtpd_ps(_mm512_maskz_loadu_pd(first8(n > 8 ? n - 8 : 0), p + 8));
    return {_mm512_insertf32x8(_mm512_castps256_ps512(low), high, 1)};
  }
  template <class T>
  static ISOTILE_INLINE Vec load_strided(const T* p, int64_t stride, int64_t n = kLanes) {
    alignas(64) float lanes[kLanes];
    gather_lanes(lanes, p, stride, n, kLanes);
    return load(lanes);
  }
  ISOTILE_INLINE void store(float* p) const { _mm512_storeu_ps(p, v); }
  ISOTILE_INLINE void store(float* p, int64_t n) const { _mm512_mask_storeu_ps(p, first16(n), v); }
  ISOTILE_INLINE void store(BFloat16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), bf16_from_float(v));
  }
  ISOTILE_INLINE void store(BFloat16* p, int64_t n) const {
    _mm256_mask_storeu_epi16(p, first16(n), bf16_from_float(v));
  }
  ISOTILE_INLINE void store(Float16* p) const {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), half_from_float(v));
  }
  ISOTILE_INLINE void store(Float16* p, int64_t n) const {
    _mm256_mask_storeu_epi16(p, first16(n), half_from_float(v));
  }
  ISOTILE_INLINE void store(double* p) const { store(p, kLanes); }
  ISOTILE_INLINE void store(double* p, int64_t n) const {
    _mm512_mask_storeu_pd(p, first8(n), _mm512_cvtps_pd(_mm512_castps512_ps256(v)));
    _mm512_mask_storeu_pd(p + 8, first8(n > 8 ? n - 8 : 0), _mm512_cvtps_pd(_mm512_extractf32x8_ps(v, 1)));
  }
  template <class T>
  ISOTILE_INLINE void store_strided(T* p, int64_t stride, int64_t n = kLanes) const {
    alignas(64) float lanes[kLanes];
    store(lanes);
    scatter_lanes(lanes, p, stride, n, kLanes);
  }
  ISOTILE_INLINE void stream(float* p) const { _mm512_stream_ps(p, v); }
  ISOTILE_INLINE void stream(BFloat16* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), bf16_from_float(v));
  }
  ISOTILE_INLINE void stream(Float16* p) const {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), half_from_float(v));
  }
  ISOTILE_INLINE void stream(double* p) const { store(p); }
};

template <>
struct Vec<double> {
  using Scalar = double;
  using Mask = ISOTILE_ISA::Mask<double>;
  static constexpr int kLanes = 8;
  __m512d v;

  static ISOTILE_INLINE Vec zero() { return {_mm512_setzero_pd()}; }
  static ISOTILE_INLINE Vec set1(double x) { return {_mm512_set1_pd(x)}; }
  static ISOTILE_INLINE Vec iota(double start) {
    return {_mm512_add_pd(_mm512_set1_pd(start), _mm512_setr_pd(0, 1, 2, 3, 4, 5, 6, 7))};
  }
  static ISOTILE_INLINE Vec load(const double* p) { return {_mm512_loadu_pd(p)}; }
  static ISOTILE_INLINE Vec load(const double* p, int64_t n) { return {_mm512_maskz_loadu_pd(first8(n), p)}; }
  static ISOTILE_INLINE Vec load(const float* p) { return {_mm512_cvtps_pd(_mm256_loadu_ps(p))}; }
  static ISOTILE_INLINE Vec load(const float* p, int64_t n) {
    return {_mm512_cvtps_pd(_mm256_maskz_loadu_ps(first8(n), p))};
  }
  template <class T>
  static ISOTILE_INLINE Vec load(const T* p) {
    return load_strided(p, 1, kLanes);
  }
  template <class T>
  static ISOTILE_INLINE Vec load(const T* p, int64_t n) {
    return load_strided(p, 1, n);
  }
  template <class T>
  static ISOTILE_INLINE Vec load_strided(const T* p, int64_t stride, int64_t n = kLanes) {
    alignas(64) double lanes[kLanes];
    gather_lanes(lanes, p, stride, n, kLanes);
    return load(lanes);
  }
  ISOTILE_INLINE void store(double* p) const { _mm512_storeu_pd(p, v); }
  ISOTILE_INLINE void store(double* p, int64_t n) const { _mm512_mask_storeu_pd(p, first8(n), v); }
  ISOTILE_INLINE void store(float* p) const { _mm256_storeu_ps(p, _mm512_cvtpd_ps(v)); }
  ISOTILE_INLINE void store(float* p, int64_t n) const { _mm256_mask_storeu_ps(p, first8(n), _mm512_cvtpd_ps(v)); }
  template <class T>
  ISOTILE_INLINE void store(T* p) const {
    store_strided(p, 1, kLanes);
  }
  template <class T>
  ISOTILE_INLINE void store(T* p, int64_t n) const {
    store_strided(p, 1, n);
  }
  template <class T>
  ISOTILE_INLINE void store_strided(T* p, int64_t stride, int64_t n = kLanes) const {
    alignas(64) double lanes[kLanes];
    store(lanes);
    scatter_lanes(lanes, p, stride, n, kLanes);
  }
  ISOTILE_INLINE void stream(double* p) const { _mm512_stream_pd(p, v); }
  template <class T>
  ISOTILE_INLINE void stream(T* p) const {
    store(p);
  }
};

template <>
struct Vec<int32_t> {
  using Scalar = int32_t;
  using Mask = ISOTILE_ISA::Mask<float>;
  static constexpr int kLanes = 16;
  __m512i v;

  static ISOTILE_INLINE Vec zero() { return {_mm512_setzero_si512()}; }
  static ISOTILE_INLINE Vec set1(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static ISOTILE_INLINE Vec iota(int32_t start) {
    return {_mm512_add_epi32(_mm512_set1_epi32(start),
                             _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15))};
  }
  static ISOTILE_INLINE Vec load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
  static ISOTILE_INLINE Vec load(const uint8_t* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static ISOTILE_INLINE Vec load(const int8_t* p) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static ISOTILE_INLINE Vec load(const int32_t* p, int64_t n) { return {_mm512_maskz_loadu_epi32(first16(n), p)}; }
  ISOTILE_INLINE void store(int32_t* p) const { _mm512_storeu_si512(p, v); }
  ISOTILE_INLINE void store(int32_t* p, int64_t n) const { _mm512_mask_storeu_epi32(p, first16(n), v); }
};

ISOTILE_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm512_add_ps(a.v, b.v)}; }
ISOTILE_INLINE Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm512_sub_ps(a.v, b.v)}; }
ISOTILE_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm512_mul_ps(a.v, b.v)}; }
ISOTILE_INLINE Vec<float> operator/(Vec<float> a, Vec<float> b) { return {_mm512_div_ps(a.v, b.v)}; }
ISOTILE_INLINE Vec<float> operator-(Vec<float> a) { return {_mm512_xor_ps(a.v, _mm512_set1_ps(-0.0f))}; }
ISOTILE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
ISOTILE_INLINE Vec<float> fnma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm512_fnmadd_ps(a.v, b.v, c.v)}; }
ISOTILE_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm512_max_ps(a.v, b.v)}; }
ISOTILE_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return {_mm512_min_ps(a.v, b.v)}; }
ISOTILE_INLINE Vec<float> abs(Vec<float> a) { return {_mm512_abs_ps(a.v)}; }
ISOTILE_INLINE Vec<float> sqrt(Vec<float> a) { return {_mm512_sqrt_ps(a.v)}; }
ISOTILE_INLINE Vec<float> round(Vec<float> a) {
  return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
ISOTILE_INLINE Vec<float> copysign(Vec<float> magnitude, Vec<float> sign) {
  // 0xca: the first operand chooses between the second and the third, bit by bit
  return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(INT32_MIN), _mm512_castps_si512(sign.v),
                                                        _mm512_castps_si512(magnitude.v), 0xca))};
}
ISOTILE_INLINE Mask<float> operator<(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ)}; }
ISOTILE_INLINE Mask<float> operator<=(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ)}; }
ISOTILE_INLINE Mask<float> operator>(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
ISOTILE_INLINE Mask<float> operator>=(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GE_OQ)}; }
ISOTILE_INLINE Mask<float> operator==(Vec<float> a, Vec<float> b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ)}; }
ISOTILE_INLINE Mask<float> operator!=(Vec<float> a, Vec<float> b) {
  return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_NEQ_UQ)};
}
ISOTILE_INLINE Vec<float> select(Mask<float> m, Vec<float> a, Vec<float> b) {
  return {_mm512_mask_blend_ps(m.m, b.v, a.v)};
}
ISOTILE_INLINE float reduce_add(Vec<float> a) { return _mm512_reduce_add_ps(a.v); }
ISOTILE_INLINE float reduce_max(Vec<float> a) { return _mm512_reduce_max_ps(a.v); }
ISOTILE_INLINE float reduce_min(Vec<float> a) { return _mm512_reduce_min_ps(a.v); }

ISOTILE_INLINE Vec<double> operator+(Vec<double> a, Vec<double> b) { return {_mm512_add_pd(a.v, b.v)}; }
ISOTILE_INLINE Vec<double> operator-(Vec<double> a, Vec<double> b) { return {_mm512_sub_pd(a.v, b.v)}; }
ISOTILE_INLINE Vec<double> operator*(Vec<double> a, Vec<double> b) { return {_mm512_mul_pd(a.v, b.v)}; }
ISOTILE_INLINE Vec<double> operator/(Vec<double> a, Vec<double> b) { return {_mm512_div_pd(a.v, b.v)}; }
ISOTILE_INLINE Vec<double> operator-(Vec<double> a) { return {_mm512_xor_pd(a.v, _mm512_set1_pd(-0.0))}; }
ISOTILE_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm512_fmadd_pd(a.v, b.v, c.v)};
}
ISOTILE_INLINE Vec<double> fnma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm512_fnmadd_pd(a.v, b.v, c.v)};
}
ISOTILE_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm512_max_pd(a.v, b.v)}; }
ISOTILE_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return {_mm512_min_pd(a.v, b.v)}; }
ISOTILE_INLINE Vec<double> abs(Vec<double> a) { return {_mm512_abs_pd(a.v)}; }
ISOTILE_INLINE Vec<double> sqrt(Vec<double> a) { return {_mm512_sqrt_pd(a.v)}; }
ISOTILE_INLINE Vec<double> round(Vec<double> a) {
  return {_mm512_roundscale_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
ISOTILE_INLINE Vec<double> copysign(Vec<double> magnitude, Vec<double> sign) {
  return {_mm512_castsi512_pd(_mm512_ternarylogic_epi64(_mm512_set1_epi64(INT64_MIN), _mm512_castpd_si512(sign.v),
                                                        _mm512_castpd_si512(magnitude.v), 0xca))};
}
ISOTILE_INLINE Mask<double> operator<(Vec<double> a, Vec<double> b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LT_OQ)};
}
ISOTILE_INLINE Mask<double> operator<=(Vec<double> a, Vec<double> b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_LE_OQ)};
}
ISOTILE_INLINE Mask<double> operator>(Vec<double> a, Vec<double> b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GT_OQ)};
}
ISOTILE_INLINE Mask<double> operator>=(Vec<double> a, Vec<double> b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_GE_OQ)};
}
ISOTILE_INLINE Mask<double> operator==(Vec<double> a, Vec<double> b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_EQ_OQ)};
}
ISOTILE_INLINE Mask<double> operator!=(Vec<double> a, Vec<double> b) {
  return {_mm512_cmp_pd_mask(a.v, b.v, _CMP_NEQ_UQ)};
}
ISOTILE_INLINE Vec<double> select(Mask<double> m, Vec<double> a, Vec<double> b) {
  return {_mm512_mask_blend_pd(m.m, b.v, a.v)};
}
ISOTILE_INLINE double reduce_add(Vec<double> a) { return _mm512_reduce_add_pd(a.v); }
ISOTILE_INLINE double reduce_max(Vec<double> a) { return _mm512_reduce_max_pd(a.v); }
ISOTILE_INLINE double reduce_min(Vec<double> a) { return _mm512_reduce_min_pd(a.v); }

ISOTILE_INLINE Vec<int32_t> operator+(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_add_epi32(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> operator-(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_sub_epi32(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> operator*(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> operator&(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_and_si512(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> operator|(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_or_si512(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> operator^(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_xor_si512(a.v, b.v)}; }
template <int k>
ISOTILE_INLINE Vec<int32_t> shift_left(Vec<int32_t> a) {
  return {_mm512_slli_epi32(a.v, k)};
}
template <int k>
ISOTILE_INLINE Vec<int32_t> shift_right(Vec<int32_t> a) {
  return {_mm512_srli_epi32(a.v, k)};
}
template <int k>
ISOTILE_INLINE Vec<int32_t> shift_right_sign(Vec<int32_t> a) {
  return {_mm512_srai_epi32(a.v, k)};
}
ISOTILE_INLINE Vec<int32_t> mul_high_unsigned(Vec<int32_t> a, Vec<int32_t> b) {
  const __m512i even = _mm512_srli_epi64(_mm512_mul_epu32(a.v, b.v), 32);
  const __m512i odd = _mm512_mul_epu32(_mm512_srli_epi64(a.v, 32), _mm512_srli_epi64(b.v, 32));
  return {_mm512_mask_blend_epi32(0xaaaa, even, odd)};
}
ISOTILE_INLINE Mask<float> operator<(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_cmplt_epi32_mask(a.v, b.v)}; }
ISOTILE_INLINE Mask<float> operator<=(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_cmple_epi32_mask(a.v, b.v)}; }
ISOTILE_INLINE Mask<float> operator>(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_cmpgt_epi32_mask(a.v, b.v)}; }
ISOTILE_INLINE Mask<float> operator>=(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_cmpge_epi32_mask(a.v, b.v)}; }
ISOTILE_INLINE Mask<float> operator==(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_cmpeq_epi32_mask(a.v, b.v)}; }
ISOTILE_INLINE Mask<float> operator!=(Vec<int32_t> a, Vec<int32_t> b) { return {_mm512_cmpneq_epi32_mask(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> select(Mask<float> m, Vec<int32_t> a, Vec<int32_t> b) {
  return {_mm512_mask_blend_epi32(m.m, b.v, a.v)};
}
ISOTILE_INLINE Vec<float> to_float(Vec<int32_t> a) { return {_mm512_cvtepi32_ps(a.v)}; }
ISOTILE_INLINE Vec<int32_t> to_int(Vec<float> a) { return {_mm512_cvtps_epi32(a.v)}; }
ISOTILE_INLINE Vec<int32_t> as_int(Vec<float> a) { return {_mm512_castps_si512(a.v)}; }
ISOTILE_INLINE Vec<float> as_float(Vec<int32_t> a) { return {_mm512_castsi512_ps(a.v)}; }

// a * 2^n for an integral n of any size, rounded once.
ISOTILE_INLINE Vec<float> scale_by_power_of_two(Vec<float> a, Vec<float> n) { return {_mm512_scalef_ps(a.v, n.v)}; }
ISOTILE_INLINE void stream_fence() { _mm_sfence(); }

// Lane i: v[i]'s lanes combined, each in the same order.
template <class Combine>
ISOTILE_INLINE Vec<float> combine_16(const Vec<float>* v, const Combine& combine) {
  constexpr __mmask16 kAll = 0xffff;
  const auto both = [&combine](__m512 a, __m512 b) { return combine(Vec<float>{a}, Vec<float>{b}).v; };
  __m512 t[8], u[4], w[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[i] = both(_mm512_maskz_unpacklo_ps(kAll, v[2 * i].v, v[2 * i + 1].v),
                _mm512_maskz_unpackhi_ps(kAll, v[2 * i].v, v[2 * i + 1].v));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 4; ++i) {
    const __m512d x = _mm512_castps_pd(t[2 * i]), y = _mm512_castps_pd(t[2 * i + 1]);
    u[i] = both(_mm512_castpd_ps(_mm512_maskz_unpacklo_pd(0xff, x, y)),
                _mm512_castpd_ps(_mm512_maskz_unpackhi_pd(0xff, x, y)));
  }
#pragma GCC unroll 8
  for (int i = 0; i < 2; ++i) {
    w[i] = both(_mm512_maskz_shuffle_f32x4(kAll, u[2 * i], u[2 * i + 1], 0x88),
                _mm512_maskz_shuffle_f32x4(kAll, u[2 * i], u[2 * i + 1], 0xdd));
  }
  return Vec<float>{both(_mm512_maskz_shuffle_f32x4(kAll, w[0], w[1], 0x88),
                         _mm512_maskz_shuffle_f32x4(kAll, w[0], w[1], 0xdd))};
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
