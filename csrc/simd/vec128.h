// 16-byte vectors in the compiler's own vector extension: the body of `scalar` (any architecture) and `neon`. The
// including header defines the few operations with an instruction worth naming, in namespace hardware.
#pragma once

namespace isotile {
namespace ISOTILE_ISA {

template <>
struct Mask<float> {
  I4 m;
  static ISOTILE_INLINE Mask first(int64_t n) {
    const int32_t count = n >= 4 ? 4 : static_cast<int32_t>(n);
    return {I4{0, 1, 2, 3} < I4{count, count, count, count}};
  }
  ISOTILE_INLINE bool any() const { return (m[0] | m[1] | m[2] | m[3]) != 0; }
  ISOTILE_INLINE bool all() const { return (m[0] & m[1] & m[2] & m[3]) != 0; }
};
template <>
struct Mask<int32_t> : Mask<float> {};
template <>
struct Mask<double> {
  L2 m;
  static ISOTILE_INLINE Mask first(int64_t n) { return {L2{0, 1} < L2{n, n}}; }
  ISOTILE_INLINE bool any() const { return (m[0] | m[1]) != 0; }
  ISOTILE_INLINE bool all() const { return (m[0] & m[1]) != 0; }
};

ISOTILE_INLINE Mask<float> operator&(Mask<float> a, Mask<float> b) { return {a.m & b.m}; }
ISOTILE_INLINE Mask<float> operator|(Mask<float> a, Mask<float> b) { return {a.m | b.m}; }
ISOTILE_INLINE Mask<float> operator!(Mask<float> a) { return {~a.m}; }
ISOTILE_INLINE Mask<double> operator&(Mask<double> a, Mask<double> b) { return {a.m & b.m}; }
ISOTILE_INLINE Mask<double> operator|(Mask<double> a, Mask<double> b) { return {a.m | b.m}; }
ISOTILE_INLINE Mask<double> operator!(Mask<double> a) { return {~a.m}; }

template <>
struct Vec<float> {
  using Scalar = float;
  using Mask = ISOTILE_ISA::Mask<float>;
  static constexpr int kLanes = 4;
  F4 v;

  static ISOTILE_INLINE Vec zero() { return {F4{0, 0, 0, 0}}; }
  static ISOTILE_INLINE Vec set1(float x) { return {F4{x, x, x, x}}; }
  static ISOTILE_INLINE Vec iota(float start) { return {F4{start, start + 1, start + 2, start + 3}}; }
  static ISOTILE_INLINE Vec load(const float* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  static ISOTILE_INLINE Vec load(const BFloat16* p) {
    H4 h;
    __builtin_memcpy(&h, p, sizeof(h));
    return {(F4)(__builtin_convertvector(h, U4) << 16)};
  }
  static ISOTILE_INLINE Vec load(const Float16* p) { return {hardware::load_half(p)}; }
  static ISOTILE_INLINE Vec load(const double* p) { return load_strided(p, 1, kLanes); }
  template <class T>
  static ISOTILE_INLINE Vec load(const T* p, int64_t n) {
    return n >= kLanes ? load(p) : load_strided(p, 1, n);
  }
  template <class T>
  static ISOTILE_INLINE Vec load_strided(const T* p, int64_t stride, int64_t n = kLanes) {
    float lanes[kLanes];
    gather_lanes(lanes, p, stride, n, kLanes);
    return load(lanes);
  }
  ISOTILE_INLINE void store(float* p) const { __builtin_memcpy(p, &v, sizeof(v)); }
  ISOTILE_INLINE void store(BFloat16* p) const {
    const U4 b = (U4)v;
    const U4 rounded = b + 0x7fffu + ((b >> 16) & 1u);
    const U4 nan = (U4)(v != v);
    const H4 h = __builtin_convertvector(((rounded & ~nan) | ((b | 0x00400000u) & nan)) >> 16, H4);
    __builtin_memcpy(p, &h, sizeof(h));
  }
  ISOTILE_INLINE void store(Float16* p) const { hardware::store_half(v, p); }
  ISOTILE_INLINE void store(double* p) const { store_strided(p, 1, kLanes); }
  template <class T>
  ISOTILE_INLINE void store(T* p, int64_t n) const {
    if (n >= kLanes) {
      store(p);
    } else {
      store_strided(p, 1, n);
    }
  }
  template <class T>
  ISOTILE_INLINE void store_strided(T* p, int64_t stride, int64_t n = kLanes) const {
    float lanes[kLanes];
    store(lanes);
    scatter_lanes(lanes, p, stride, n, kLanes);
  }
  template <class T>
  ISOTILE_INLINE void stream(T* p) const {
    store(p);
  }
};

template <>
struct Vec<double> {
  using Scalar = double;
  using Mask = ISOTILE_ISA::Mask<double>;
  static constexpr int kLanes = 2;
  D2 v;

  static ISOTILE_INLINE Vec zero() { return {D2{0, 0}}; }
  static ISOTILE_INLINE Vec set1(double x) { return {D2{x, x}}; }
  static ISOTILE_INLINE Vec iota(double start) { return {D2{start, start + 1}}; }
  static ISOTILE_INLINE Vec load(const double* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, sizeof(r.v));
    return r;
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
    double lanes[kLanes];
    gather_lanes(lanes, p, stride, n, kLanes);
    return load(lanes);
  }
  ISOTILE_INLINE void store(double* p) const { __builtin_memcpy(p, &v, sizeof(v)); }
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
    double lanes[kLanes];
    store(lanes);
    scatter_lanes(lanes, p, stride, n, kLanes);
  }
  template <class T>
  ISOTILE_INLINE void stream(T* p) const {
    store(p);
  }
};

template <>
struct Vec<int32_t> {
  using Scalar = int32_t;
  using Mask = ISOTILE_ISA::Mask<float>;
  static constexpr int kLanes = 4;
  I4 v;

  static ISOTILE_INLINE Vec zero() { return {I4{0, 0, 0, 0}}; }
  static ISOTILE_INLINE Vec set1(int32_t x) { return {I4{x, x, x, x}}; }
  static ISOTILE_INLINE Vec iota(int32_t start) { return {(I4)(U4{0, 1, 2, 3} + static_cast<uint32_t>(start))}; }
  static ISOTILE_INLINE Vec load(const int32_t* p) {
    Vec r;
    __builtin_memcpy(&r.v, p, sizeof(r.v));
    return r;
  }
  static ISOTILE_INLINE Vec load(const uint8_t* p) { return {I4{p[0], p[1], p[2], p[3]}}; }
  static ISOTILE_INLINE Vec load(const int8_t* p) { return {I4{p[0], p[1], p[2], p[3]}}; }
  static ISOTILE_INLINE Vec load(const int32_t* p, int64_t n) {
    int32_t lanes[kLanes];
    for (int i = 0; i < kLanes; ++i) lanes[i] = i < n ? p[i] : 0;
    return load(lanes);
  }
  ISOTILE_INLINE void store(int32_t* p) const { __builtin_memcpy(p, &v, sizeof(v)); }
  ISOTILE_INLINE void store(int32_t* p, int64_t n) const {
    for (int i = 0; i < kLanes && i < n; ++i) p[i] = v[i];
  }
};

ISOTILE_INLINE Vec<float> operator+(Vec<float> a, Vec<float> b) { return {a.v + b.v}; }
ISOTILE_INLINE Vec<float> operator-(Vec<float> a, Vec<float> b) { return {a.v - b.v}; }
ISOTILE_INLINE Vec<float> operator*(Vec<float> a, Vec<float> b) { return {a.v * b.v}; }
ISOTILE_INLINE Vec<float> operator/(Vec<float> a, Vec<float> b) { return {a.v / b.v}; }
ISOTILE_INLINE Vec<float> operator-(Vec<float> a) { return {-a.v}; }
ISOTILE_INLINE Vec<float> fma(Vec<float> a, Vec<float> b, Vec<float> c) { return {hardware::fma(a.v, b.v, c.v)}; }
ISOTILE_INLINE Vec<float> fnma(Vec<float> a, Vec<float> b, Vec<float> c) { return {hardware::fma(-a.v, b.v, c.v)}; }
ISOTILE_INLINE Mask<float> operator<(Vec<float> a, Vec<float> b) { return {(I4)(a.v < b.v)}; }
ISOTILE_INLINE Mask<float> operator<=(Vec<float> a, Vec<float> b) { return {(I4)(a.v <= b.v)}; }
ISOTILE_INLINE Mask<float> operator>(Vec<float> a, Vec<float> b) { return {(I4)(a.v > b.v)}; }
ISOTILE_INLINE Mask<float> operator>=(Vec<float> a, Vec<float> b) { return {(I4)(a.v >= b.v)}; }
ISOTILE_INLINE Mask<float> operator==(Vec<float> a, Vec<float> b) { return {(I4)(a.v == b.v)}; }
ISOTILE_INLINE Mask<float> operator!=(Vec<float> a, Vec<float> b) { return {(I4)(a.v != b.v)}; }
ISOTILE_INLINE Vec<float> select(Mask<float> m, Vec<float> a, Vec<float> b) {
  return {(F4)(((I4)a.v & m.m) | ((I4)b.v & ~m.m))};
}
ISOTILE_INLINE Vec<float> max(Vec<float> a, Vec<float> b) { return select(a > b, a, b); }
ISOTILE_INLINE Vec<float> min(Vec<float> a, Vec<float> b) { return select(a < b, a, b); }
ISOTILE_INLINE Vec<float> abs(Vec<float> a) { return {(F4)((I4)a.v & 0x7fffffff)}; }
ISOTILE_INLINE Vec<float> sqrt(Vec<float> a) { return {hardware::sqrt(a.v)}; }
ISOTILE_INLINE Vec<float> round(Vec<float> a) { return {hardware::round(a.v)}; }
ISOTILE_INLINE Vec<float> copysign(Vec<float> magnitude, Vec<float> sign) {
  return {(F4)(((I4)magnitude.v & INT32_MAX) | ((I4)sign.v & INT32_MIN))};
}
ISOTILE_INLINE float reduce_add(Vec<float> a) { return (a.v[0] + a.v[2]) + (a.v[1] + a.v[3]); }
ISOTILE_INLINE float reduce_max(Vec<float> a) {
  const float x = a.v[0] > a.v[2] ? a.v[0] : a.v[2];
  const float y = a.v[1] > a.v[3] ? a.v[1] : a.v[3];
  return x > y ? x : y;
}
ISOTILE_INLINE float reduce_min(Vec<float> a) {
  const float x = a.v[0] < a.v[2] ? a.v[0] : a.v[2];
  const float y = a.v[1] < a.v[3] ? a.v[1] : a.v[3];
  return x < y ? x : y;
}

ISOTILE_INLINE Vec<double> operator+(Vec<double> a, Vec<double> b) { return {a.v + b.v}; }
ISOTILE_INLINE Vec<double> operator-(Vec<double> a, Vec<double> b) { return {a.v - b.v}; }
ISOTILE_INLINE Vec<double> operator*(Vec<double> a, Vec<double> b) { return {a.v * b.v}; }
ISOTILE_INLINE Vec<double> operator/(Vec<double> a, Vec<double> b) { return {a.v / b.v}; }
ISOTILE_INLINE Vec<double> operator-(Vec<double> a) { return {-a.v}; }
ISOTILE_INLINE Vec<double> fma(Vec<double> a, Vec<double> b, Vec<double> c) { return {hardware::fma(a.v, b.v, c.v)}; }
ISOTILE_INLINE Vec<double> fnma(Vec<double> a, Vec<double> b, Vec<double> c) {
  return {hardware::fma(-a.v, b.v, c.v)};
}
ISOTILE_INLINE Mask<double> operator<(Vec<double> a, Vec<double> b) { return {(L2)(a.v < b.v)}; }
ISOTILE_INLINE Mask<double> operator<=(Vec<double> a, Vec<double> b) { return {(L2)(a.v <= b.v)}; }
ISOTILE_INLINE Mask<double> operator>(Vec<double> a, Vec<double> b) { return {(L2)(a.v > b.v)}; }
ISOTILE_INLINE Mask<double> operator>=(Vec<double> a, Vec<double> b) { return {(L2)(a.v >= b.v)}; }
ISOTILE_INLINE Mask<double> operator==(Vec<double> a, Vec<double> b) { return {(L2)(a.v == b.v)}; }
ISOTILE_INLINE Mask<double> operator!=(Vec<double> a, Vec<double> b) { return {(L2)(a.v != b.v)}; }
ISOTILE_INLINE Vec<double> select(Mask<double> m, Vec<double> a, Vec<double> b) {
  return {(D2)(((L2)a.v & m.m) | ((L2)b.v & ~m.m))};
}
ISOTILE_INLINE Vec<double> max(Vec<double> a, Vec<double> b) { return select(a > b, a, b); }
ISOTILE_INLINE Vec<double> min(Vec<double> a, Vec<double> b) { return select(a < b, a, b); }
ISOTILE_INLINE Vec<double> abs(Vec<double> a) { return {(D2)((L2)a.v & INT64_MAX)}; }
ISOTILE_INLINE Vec<double> sqrt(Vec<double> a) { return {hardware::sqrt(a.v)}; }
ISOTILE_INLINE Vec<double> round(Vec<double> a) { return {hardware::round(a.v)}; }
ISOTILE_INLINE Vec<double> copysign(Vec<double> magnitude, Vec<double> sign) {
  return {(D2)(((L2)magnitude.v & INT64_MAX) | ((L2)sign.v & INT64_MIN))};
}
ISOTILE_INLINE double reduce_add(Vec<double> a) { return a.v[0] + a.v[1]; }
ISOTILE_INLINE double reduce_max(Vec<double> a) { return a.v[0] > a.v[1] ? a.v[0] : a.v[1]; }
ISOTILE_INLINE double reduce_min(Vec<double> a) { return a.v[0] < a.v[1] ? a.v[0] : a.v[1]; }

// Through unsigned lanes: signed overflow is undefined in the extension too.
ISOTILE_INLINE Vec<int32_t> operator+(Vec<int32_t> a, Vec<int32_t> b) { return {(I4)((U4)a.v + (U4)b.v)}; }
ISOTILE_INLINE Vec<int32_t> operator-(Vec<int32_t> a, Vec<int32_t> b) { return {(I4)((U4)a.v - (U4)b.v)}; }
ISOTILE_INLINE Vec<int32_t> operator*(Vec<int32_t> a, Vec<int32_t> b) { return {(I4)((U4)a.v * (U4)b.v)}; }
ISOTILE_INLINE Vec<int32_t> operator&(Vec<int32_t> a, Vec<int32_t> b) { return {a.v & b.v}; }
ISOTILE_INLINE Vec<int32_t> operator|(Vec<int32_t> a, Vec<int32_t> b) { return {a.v | b.v}; }
ISOTILE_INLINE Vec<int32_t> operator^(Vec<int32_t> a, Vec<int32_t> b) { return {a.v ^ b.v}; }
template <int k>
ISOTILE_INLINE Vec<int32_t> shift_left(Vec<int32_t> a) {
  return {(I4)((U4)a.v << k)};
}
template <int k>
ISOTILE_INLINE Vec<int32_t> shift_right(Vec<int32_t> a) {
  return {(I4)((U4)a.v >> k)};
}
template <int k>
ISOTILE_INLINE Vec<int32_t> shift_right_sign(Vec<int32_t> a) {
  return {a.v >> k};
}
ISOTILE_INLINE Vec<int32_t> mul_high_unsigned(Vec<int32_t> a, Vec<int32_t> b) {
  Vec<int32_t> r;
  for (int i = 0; i < 4; ++i) {
    const uint64_t product = static_cast<uint64_t>(static_cast<uint32_t>(a.v[i])) * static_cast<uint32_t>(b.v[i]);
    r.v[i] = static_cast<int32_t>(product >> 32);
  }
  return r;
}
ISOTILE_INLINE Mask<float> operator<(Vec<int32_t> a, Vec<int32_t> b) { return {(I4)(a.v < b.v)}; }
ISOTILE_INLINE Mask<float> operator<=(Vec<int32_t> a, Vec<int32_t> b) { return {(I4)(a.v <= b.v)}; }
ISOTILE_INLINE Mask<float> operator>(Vec<int32_t> a, Vec<int32_t> b) { return {(I4)(a.v > b.v)}; }
ISOTILE_INLINE Mask<float> operator>=(Vec<int32_t> a, Vec<int32_t> b) { return {(I4)(a.v >= b.v)}; }
ISOTILE_INLINE Mask<float> operator==(Vec<int32_t> a, Vec<int32_t> b) { return {(I4)(a.v == b.v)}; }
ISOTILE_INLINE Mask<float> operator!=(Vec<int32_t> a, Vec<int32_t> b) { return {(I4)(a.v != b.v)}; }
ISOTILE_INLINE Vec<int32_t> select(Mask<float> m, Vec<int32_t> a, Vec<int32_t> b) {
  return {(a.v & m.m) | (b.v & ~m.m)};
}
ISOTILE_INLINE Vec<float> to_float(Vec<int32_t> a) { return {__builtin_convertvector(a.v, F4)}; }
// Out of range and NaN: INT32_MIN, as x86 does.
ISOTILE_INLINE Vec<int32_t> to_int(Vec<float> a) {
  const Vec<float> rounded = round(a);
  const Mask<float> fits = (rounded >= Vec<float>::set1(-2147483648.0f)) & (rounded < Vec<float>::set1(2147483648.0f));
  const Vec<int32_t> value{__builtin_convertvector(select(fits, rounded, Vec<float>::zero()).v, I4)};
  return select(fits, value, Vec<int32_t>::set1(INT32_MIN));
}
ISOTILE_INLINE Vec<int32_t> as_int(Vec<float> a) { return {(I4)a.v}; }
ISOTILE_INLINE Vec<float> as_float(Vec<int32_t> a) { return {(F4)a.v}; }

// a * 2^n for an integral |n| <= 252, rounded once if |a| is in [1/2, 2]: the first factor keeps it normal.
ISOTILE_INLINE Vec<float> scale_by_power_of_two(Vec<float> a, Vec<float> n) {
  const Vec<int32_t> whole = to_int(n);
  const Vec<int32_t> half = shift_right_sign<1>(whole);
  const Vec<int32_t> bias = Vec<int32_t>::set1(127);
  const Vec<float> first = as_float(shift_left<23>(half + bias));
  const Vec<float> second = as_float(shift_left<23>(whole - half + bias));
  return a * first * second;
}
ISOTILE_INLINE void stream_fence() {}

}  // namespace ISOTILE_ISA
}  // namespace isotile
