// AVX2 with FMA and F16C (x86-64-v3). Contract: vec.h.
#pragma once
#include <immintrin.h>

namespace isotile {
namespace ISOTILE_ISA {

template <>
struct Mask<float> {
  __m256 m;
  static ISOTILE_INLINE Mask first(int64_t n) {
    const int count = n >= 8 ? 8 : static_cast<int>(n);
    return {_mm256_castsi256_ps(
        _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)))};
  }
  ISOTILE_INLINE bool any() const { return _mm256_movemask_ps(m) != 0; }
  ISOTILE_INLINE bool all() const { return _mm256_movemask_ps(m) == 0xff; }
  ISOTILE_INLINE __m256i as_integer() const { return _mm256_castps_si256(m); }
};
template <>
struct Mask<int32_t> : Mask<float> {};
template <>
struct Mask<double> {
  __m256d m;
  static ISOTILE_INLINE Mask first(int64_t n) {
    return {_mm256_castsi256_pd(_mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)))};
  }
  ISOTILE_INLINE bool any() const { return _mm256_movemask_pd(m) != 0; }
  ISOTILE_INLINE bool all() const { return _mm256_movemask_pd(m) == 0xf; }
  ISOTILE_INLINE __m256i as_integer() const { return _mm256_castpd_si256(m); }
};

ISOTILE_INLINE Mask<float> operator&(Mask<float> a, Mask<float> b) { return {_mm256_and_ps(a.m, b.m)}; }
ISOTILE_INLINE Mask<float> operator|(Mask<float> a, Mask<float> b) { return {_mm256_or_ps(a.m, b.m)}; }
ISOTILE_INLINE Mask<float> operator!(Mask<float> a) {
  return {_mm256_xor_ps(a.m, _mm256_castsi256_ps(_mm256_set1_epi32(-1)))};
}
ISOTILE_INLINE Mask<double> operator&(Mask<double> a, Mask<double> b) { return {_mm256_and_pd(a.m, b.m)}; }
ISOTILE_INLINE Mask<double> operator|(Mask<double> a, Mask<double> b) { return {_mm256_or_pd(a.m, b.m)}; }
ISOTILE_INLINE Mask<double> operator!(Mask<double> a) {
  return {_mm256_xor_pd(a.m, _mm256_castsi256_pd(_mm256_set1_epi32(-1)))};
}

ISOTILE_INLINE __m128i bf16_from_float(__m256 v) {
  const __m256i b = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(b, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(b, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(b, _mm256_set1_epi32(0x00400000));
  const __m256 nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
  const __m256i r = _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(nan));
  const __m256i high = _mm256_srli_epi32(r, 16);
  const __m256i packed = _mm256_packus_epi32(high, high);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
}
ISOTILE_INLINE __m256 float_from_bf16(__m128i v) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
}
ISOTILE_INLINE __m128i half_from_float(__m256 v) {
  return _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
// The first n of eight 16-bit elements: no masked instruction exists.
ISOTILE_INLINE __m128i load_16bit(const void* p, int64_t n) {
  alignas(16) uint16_t lanes[8] = {};
  const uint16_t* from = static_cast<const uint16_t*>(p);
  for (int64_t i = 0; i < 8 && i < n; ++i) lanes[i] = from[i];
  return _mm_load_si128(reinterpret_cast<const __m128i*>(lanes));
}
ISOTILE_INLINE void store_16bit(void* p, int64_t n, __m128i v) {
  alignas(16) uint16_t lanes[8];
  _mm_store_si128(reinterpret_cast<__m128i*>(lanes), v);
  uint16_t* to = static_cast<uint16_t*>(p);
  for (int64_t i = 0; i < 8 && i < n; ++i) to[i] = lanes[i];
}

template <>
struct Vec<float> {
  using Scalar = float;
  using Mask = ISOTILE_ISA::Mask<float>;
  static constexpr int kLanes = 8;
  __m256 v;

  static ISOTILE_INLINE Vec zero() { return {_mm256_setzero_ps()}; }
  static ISOTILE_INLINE Vec set1(float x) { return {_mm256_set1_ps(x)}; }
  static ISOTILE_INLINE Vec iota(float start) {
    return {_mm256_add_ps(_mm256_set1_ps(start), _mm256_setr_ps(0, 1, 2, 3, 4, 5, 6, 7))};
  }
  static ISOTILE_INLINE Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
  static ISOTILE_INLINE Vec load(const float* p, int64_t n) {
    return {_mm256_maskload_ps(p, Mask::first(n).as_integer())};
  }
  static ISOTILE_INLINE Vec load(const BFloat16* p) {
    return {float_from_bf16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static ISOTILE_INLINE Vec load(const BFloat16* p, int64_t n) { return {float_from_bf16(load_16bit(p, n))}; }
  static ISOTILE_INLINE Vec load(const Float16* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
  }
  static ISOTILE_INLINE Vec load(const Float16* p, int64_t n) { return {_mm256_cvtph_ps(load_16bit(p, n))}; }
  static ISOTILE_INLINE Vec load(const double* p) {
    return {_mm256_set_m128(_mm256_cvtpd_ps(_mm256_loadu_pd(p + 4)), _mm256_cvtpd_ps(_mm256_loadu_pd(p)))};
  }
  static ISOTILE_INLINE Vec load(const double* p, int64_t n) { return load_strided(p, 1, n); }
  template <class T>
  static ISOTILE_INLINE Vec load_strided(const T* p, int64_t stride, int64_t n = kLanes) {
    alignas(32) float lanes[kLanes];
    gather_lanes(lanes, p, stride, n, kLanes);
    return load(lanes);
  }
  ISOTILE_INLINE void store(float* p) const { _mm256_storeu_ps(p, v); }
  ISOTILE_INLINE void store(float* p, int64_t n) const { _mm256_maskstore_ps(p, Mask::first(n).as_integer(), v); }
  ISOTILE_INLINE void store(BFloat16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bf16_from_float(v));
  }
  ISOTILE_INLINE void store(BFloat16* p, int64_t n) const { store_16bit(p, n, bf16_from_float(v)); }
  ISOTILE_INLINE void store(Float16* p) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), half_from_float(v));
  }
  ISOTILE_INLINE void store(Float16* p, int64_t n) const { store_16bit(p, n, half_from_float(v)); }
  ISOTILE_INLINE void store(double* p) const {
    _mm256_storeu_pd(p, _mm256_cvtps_pd(_mm256_castps256_ps128(v)));
    _mm256_storeu_pd(p + 4, _mm256_cvtps_pd(_mm256_extractf128_ps(v, 1)));
  }
  ISOTILE_INLINE void store(double* p, int64_t n) const { store_strided(p, 1, n); }
  template <class T>
  ISOTILE_INLINE void store_strided(T* p, int64_t stride, int64_t n = kLanes) const {
    alignas(32) float lanes[kLanes];
    store(lanes);
    scatter_lanes(lanes, p, stride, n, kLanes);
  }
  ISOTILE_INLINE void stream(float* p) const { _mm256_stream_ps(p, v); }
  ISOTILE_INLINE void stream(BFloat16* p) const {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), bf16_from_float(v));
  }
  ISOTILE_INLINE void stream(Float16* p) const {
    _mm_stream_si128(reinterpret_cast<__m128i*>(p), half_from_float(v));
  }
  ISOTILE_INLINE void stream(double* p) const { store(p); }
};

template <>
struct Vec<double> {
  using Scalar = double;
  using Mask = ISOTILE_ISA::Mask<double>;
  static constexpr int kLanes = 4;
  __m256d v;

  static ISOTILE_INLINE Vec zero() { return {_mm256_setzero_pd()}; }
  static ISOTILE_INLINE Vec set1(double x) { return {_mm256_set1_pd(x)}; }
  static ISOTILE_INLINE Vec iota(double start) {
    return {_mm256_add_pd(_mm256_set1_pd(start), _mm256_setr_pd(0, 1, 2, 3))};
  }
  static ISOTILE_INLINE Vec load(const double* p) { return {_mm256_loadu_pd(p)}; }
  static ISOTILE_INLINE Vec load(const double* p, int64_t n) {
    return {_mm256_maskload_pd(p, Mask::first(n).as_integer())};
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
    alignas(32) double lanes[kLanes];
    gather_lanes(lanes, p, stride, n, kLanes);
    return load(lanes);
  }
  ISOTILE_INLINE void store(double* p) const { _mm256_storeu_pd(p, v); }
  ISOTILE_INLINE void store(double* p, int64_t n) const { _mm256_maskstore_pd(p, Mask::first(n).as_integer(), v); }
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
    alignas(32) double lanes[kLanes];
    store(lanes);
    scatter_lanes(lanes, p, stride, n, kLanes);
  }
  ISOTILE_INLINE void stream(double* p) const { _mm256_stream_pd(p, v); }
  template <class T>
  ISOTILE_INLINE void stream(T* p) const {
    store(p);
  }
};

template <>
struct Vec<int32_t> {
  using Scalar = int32_t;
  using Mask = ISOTILE_ISA::Mask<float>;
  static constexpr int kLanes = 8;
  __m256i v;

  static ISOTILE_INLINE Vec zero() { return {_mm256_setzero_si256()}; }
  static ISOTILE_INLINE Vec set1(int32_t x) { return {_mm256_set1_epi32(x)}; }
  static ISOTILE_INLINE Vec iota(int32_t start) {
    return {_mm256_add_epi32(_mm256_set1_epi32(start), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7))};
  }
  static ISOTILE_INLINE Vec load(const int32_t* p) {
    return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))};
  }
  static ISOTILE_INLINE Vec load(const uint8_t* p) {
    return {_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
  }
  static ISOTILE_INLINE Vec load(const int8_t* p) {
    return {_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))};
  }
  static ISOTILE_INLINE Vec load(const int32_t* p, int64_t n) {
    return {_mm256_maskload_epi32(p, Mask::first(n).as_integer())};
  }
  ISOTILE_INLINE void store(int32_t* p) const { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v); }
  ISOTILE_INLINE void store(int32_t* p, int64_t n) const {
    _mm256_maskstore_epi32(p, Mask::first(n).as_integer(), v);
  }
};

ISOTILE_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return {_mm256_add_ps(a.v, b.v)}; }
ISOTILE_INLINE Vec<float> operator-(Vec<float> a, Vec<float> b) { return {_mm256_sub_ps(a.v, b.v)}; }
ISOTILE_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return {_mm256_mul_ps(a.v, b.v)}; }
ISOTILE_INLINE Vec<float> operator/(Vec<float> a, Vec<float> b) { return {_mm256_div_ps(a.v, b.v)}; }
ISOTILE_INLINE Vec<float> operator-(Vec<float> a) { return {_mm256_xor_ps(a.v, _mm256_set1_ps(-0.0f))}; }
ISOTILE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
ISOTILE_INLINE Vec<float> fnma(Vec<float> a, Vec<float> b, Vec<float> c) { return {_mm256_fnmadd_ps(a.v, b.v, c.v)}; }
ISOTILE_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return {_mm256_max_ps(a.v, b.v)}; }
ISOTILE_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return {_mm256_min_ps(a.v, b.v)}; }
ISOTILE_INLINE Vec<float> abs(Vec<float> a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
ISOTILE_INLINE Vec<float> sqrt(Vec<float> a) { return {_mm256_sqrt_ps(a.v)}; }
ISOTILE_INLINE Vec<float> round(Vec<float> a) {
  return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
ISOTILE_INLINE Vec<float> copysign(Vec<float> magnitude, Vec<float> sign) {
  return {_mm256_blendv_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), magnitude.v),
                           _mm256_or_ps(_mm256_set1_ps(-0.0f), magnitude.v), sign.v)};
}
ISOTILE_INLINE Mask<float> operator<(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ)}; }
ISOTILE_INLINE Mask<float> operator<=(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ)}; }
ISOTILE_INLINE Mask<float> operator>(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ)}; }
ISOTILE_INLINE Mask<float> operator>=(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_GE_OQ)}; }
ISOTILE_INLINE Mask<float> operator==(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ)}; }
ISOTILE_INLINE Mask<float> operator!=(Vec<float> a, Vec<float> b) { return {_mm256_cmp_ps(a.v, b.v, _CMP_NEQ_UQ)}; }
ISOTILE_INLINE Vec<float> select(Mask<float> m, Vec<float> a, Vec<float> b) {
  return {_mm256_blendv_ps(b.v, a.v, m.m)};
}

ISOTILE_INLINE Vec<double> operator+(Vec<double> a, Vec<double> b) { return {_mm256_add_pd(a.v, b.v)}; }
ISOTILE_INLINE Vec<double> operator-(Vec<double> a, Vec<double> b) { return {_mm256_sub_pd(a.v, b.v)}; }
ISOTILE_INLINE Vec<double> operator*(Vec<double> a, Vec<double> b) { return {_mm256_mul_pd(a.v, b.v)}; }
ISOTILE_INLINE Vec<double> operator/(Vec<double> a, Vec<double> b) { return {_mm256_div_pd(a.v, b.v)}; }
ISOTILE_INLINE Vec<double> operator-(Vec<double> a) { return {_mm256_xor_pd(a.v, _mm256_set1_pd(-0.0))}; }
ISOTILE_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm256_fmadd_pd(a.v, b.v, c.v)};
}
ISOTILE_INLINE Vec<double> fnma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {_mm256_fnmadd_pd(a.v, b.v, c.v)};
}
ISOTILE_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return {_mm256_max_pd(a.v, b.v)}; }
ISOTILE_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return {_mm256_min_pd(a.v, b.v)}; }
ISOTILE_INLINE Vec<double> abs(Vec<double> a) { return {_mm256_andnot_pd(_mm256_set1_pd(-0.0), a.v)}; }
ISOTILE_INLINE Vec<double> sqrt(Vec<double> a) { return {_mm256_sqrt_pd(a.v)}; }
ISOTILE_INLINE Vec<double> round(Vec<double> a) {
  return {_mm256_round_pd(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
ISOTILE_INLINE Vec<double> copysign(Vec<double> magnitude, Vec<double> sign) {
  return {_mm256_blendv_pd(_mm256_andnot_pd(_mm256_set1_pd(-0.0), magnitude.v),
                           _mm256_or_pd(_mm256_set1_pd(-0.0), magnitude.v), sign.v)};
}
ISOTILE_INLINE Mask<double> operator<(Vec<double> a, Vec<double> b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LT_OQ)}; }
ISOTILE_INLINE Mask<double> operator<=(Vec<double> a, Vec<double> b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_LE_OQ)}; }
ISOTILE_INLINE Mask<double> operator>(Vec<double> a, Vec<double> b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GT_OQ)}; }
ISOTILE_INLINE Mask<double> operator>=(Vec<double> a, Vec<double> b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_GE_OQ)}; }
ISOTILE_INLINE Mask<double> operator==(Vec<double> a, Vec<double> b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_EQ_OQ)}; }
ISOTILE_INLINE Mask<double> operator!=(Vec<double> a, Vec<double> b) { return {_mm256_cmp_pd(a.v, b.v, _CMP_NEQ_UQ)}; }
ISOTILE_INLINE Vec<double> select(Mask<double> m, Vec<double> a, Vec<double> b) {
  return {_mm256_blendv_pd(b.v, a.v, m.m)};
}

ISOTILE_INLINE float reduce_add(Vec<float> a) {
  __m128 r = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  r = _mm_add_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_add_ss(r, _mm_movehdup_ps(r)));
}
ISOTILE_INLINE float reduce_max(Vec<float> a) {
  __m128 r = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  r = _mm_max_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_max_ss(r, _mm_movehdup_ps(r)));
}
ISOTILE_INLINE float reduce_min(Vec<float> a) {
  __m128 r = _mm_min_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  r = _mm_min_ps(r, _mm_movehl_ps(r, r));
  return _mm_cvtss_f32(_mm_min_ss(r, _mm_movehdup_ps(r)));
}
ISOTILE_INLINE double reduce_add(Vec<double> a) {
  const __m128d r = _mm_add_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_add_sd(r, _mm_unpackhi_pd(r, r)));
}
ISOTILE_INLINE double reduce_max(Vec<double> a) {
  const __m128d r = _mm_max_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_max_sd(r, _mm_unpackhi_pd(r, r)));
}
ISOTILE_INLINE double reduce_min(Vec<double> a) {
  const __m128d r = _mm_min_pd(_mm256_castpd256_pd128(a.v), _mm256_extractf128_pd(a.v, 1));
  return _mm_cvtsd_f64(_mm_min_sd(r, _mm_unpackhi_pd(r, r)));
}

ISOTILE_INLINE Vec<int32_t> operator+(Vec<int32_t> a, Vec<int32_t> b) { return {_mm256_add_epi32(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> operator-(Vec<int32_t> a, Vec<int32_t> b) { return {_mm256_sub_epi32(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> operator*(Vec<int32_t> a, Vec<int32_t> b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> operator&(Vec<int32_t> a, Vec<int32_t> b) { return {_mm256_and_si256(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> operator|(Vec<int32_t> a, Vec<int32_t> b) { return {_mm256_or_si256(a.v, b.v)}; }
ISOTILE_INLINE Vec<int32_t> operator^(Vec<int32_t> a, Vec<int32_t> b) { return {_mm256_xor_si256(a.v, b.v)}; }
template <int k>
ISOTILE_INLINE Vec<int32_t> shift_left(Vec<int32_t> a) {
  return {_mm256_slli_epi32(a.v, k)};
}
template <int k>
ISOTILE_INLINE Vec<int32_t> shift_right(Vec<int32_t> a) {
  return {_mm256_srli_epi32(a.v, k)};
}
template <int k>
ISOTILE_INLINE Vec<int32_t> shift_right_sign(Vec<int32_t> a) {
  return {_mm256_srai_epi32(a.v, k)};
}
ISOTILE_INLINE Vec<int32_t> mul_high_unsigned(Vec<int32_t> a, Vec<int32_t> b) {
  const __m256i even = _mm256_srli_epi64(_mm256_mul_epu32(a.v, b.v), 32);
  const __m256i odd = _mm256_mul_epu32(_mm256_srli_epi64(a.v, 32), _mm256_srli_epi64(b.v, 32));
  return {_mm256_blend_epi32(even, odd, 0xaa)};
}
ISOTILE_INLINE Mask<float> operator>(Vec<int32_t> a, Vec<int32_t> b) {
  return {_mm256_castsi256_ps(_mm256_cmpgt_epi32(a.v, b.v))};
}
ISOTILE_INLINE Mask<float> operator==(Vec<int32_t> a, Vec<int32_t> b) {
  return {_mm256_castsi256_ps(_mm256_cmpeq_epi32(a.v, b.v))};
}
ISOTILE_INLINE Mask<float> operator<(Vec<int32_t> a, Vec<int32_t> b) { return b > a; }
ISOTILE_INLINE Mask<float> operator<=(Vec<int32_t> a, Vec<int32_t> b) { return !(a > b); }
ISOTILE_INLINE Mask<float> operator>=(Vec<int32_t> a, Vec<int32_t> b) { return !(b > a); }
ISOTILE_INLINE Mask<float> operator!=(Vec<int32_t> a, Vec<int32_t> b) { return !(a == b); }
ISOTILE_INLINE Vec<int32_t> select(Mask<float> m, Vec<int32_t> a, Vec<int32_t> b) {
  return {_mm256_blendv_epi8(b.v, a.v, m.as_integer())};
}
ISOTILE_INLINE Vec<float> to_float(Vec<int32_t> a) { return {_mm256_cvtepi32_ps(a.v)}; }
ISOTILE_INLINE Vec<int32_t> to_int(Vec<float> a) { return {_mm256_cvtps_epi32(a.v)}; }
ISOTILE_INLINE Vec<int32_t> as_int(Vec<float> a) { return {_mm256_castps_si256(a.v)}; }
ISOTILE_INLINE Vec<float> as_float(Vec<int32_t> a) { return {_mm256_castsi256_ps(a.v)}; }

// a * 2^n for an integral |n| <= 252, rounded once if |a| is in [1/2, 2]: the first factor keeps it normal.
ISOTILE_INLINE Vec<float> scale_by_power_of_two(Vec<float> a, Vec<float> n) {
  const Vec<int32_t> whole = to_int(n);
  const Vec<int32_t> half = shift_right_sign<1>(whole);
  const Vec<int32_t> bias = Vec<int32_t>::set1(127);
  const Vec<float> first = as_float(shift_left<23>(half + bias));
  const Vec<float> second = as_float(shift_left<23>(whole - half + bias));
  return a * first * second;
}
ISOTILE_INLINE void stream_fence() { _mm_sfence(); }

}  // namespace ISOTILE_ISA
}  // namespace isotile
