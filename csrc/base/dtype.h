// The 16-bit float types, their exact scalar conversions, and dispatch from a dtype code to a C++ type.
#pragma once
#include <cstdint>
#include <cstring>

#include "base/error.h"
#include "base/inline.h"
#include "base/tensor_view.h"

namespace isotile {

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
ISOTILE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

ISOTILE_INLINE float to_float(float x) { return x; }
ISOTILE_INLINE float to_float(double x) { return static_cast<float>(x); }
ISOTILE_INLINE float to_float(BFloat16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
ISOTILE_INLINE float to_float(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) {  // infinity and NaN; NaN becomes quiet, as the hardware's conversion makes it
    const uint32_t quiet = magnitude > 0x7c00u ? 0x00400000u : 0u;
    return bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13) | quiet);
  }
  if (magnitude < 0x400u) {  // zero and subnormals: an integer times 2^-24, exact
    return bit_cast<float>(sign | bit_cast<uint32_t>(static_cast<float>(magnitude) * 5.9604644775390625e-8f));
  }
  return bit_cast<float>(sign | ((magnitude << 13) + 0x38000000u));
}

// Round to nearest, ties to even; NaN stays NaN (quiet), overflow goes to infinity.
ISOTILE_INLINE void from_float(float x, float* out) { *out = x; }
ISOTILE_INLINE void from_float(float x, double* out) { *out = x; }
ISOTILE_INLINE void from_float(float x, BFloat16* out) {
  const uint32_t b = bit_cast<uint32_t>(x);
  if ((b & 0x7fffffffu) > 0x7f800000u) {
    out->bits = static_cast<uint16_t>((b >> 16) | 0x40u);
  } else {
    out->bits = static_cast<uint16_t>((b + 0x7fffu + ((b >> 16) & 1u)) >> 16);
  }
}
ISOTILE_INLINE void from_float(float x, Float16* out) {
  const uint32_t b = bit_cast<uint32_t>(x);
  const uint32_t sign = (b >> 16) & 0x8000u;
  const uint32_t magnitude = b & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u | ((magnitude >> 13) & 0x3ffu);
  } else if (magnitude >= 0x477ff000u) {  // 65520 and up
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: one float addition rounds at 2^-24
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out->bits = static_cast<uint16_t>(sign | half);
}

ISOTILE_INLINE double to_double(double x) { return x; }
template <class T>
ISOTILE_INLINE double to_double(T x) {
  return static_cast<double>(to_float(x));
}

// double -> float rounded to odd: a second rounding to 16 bits is then as if there had been only one.
ISOTILE_INLINE float round_to_odd(double x) {
  const float nearest = static_cast<float>(x);
  const double back = static_cast<double>(nearest);
  if (back == x || x != x) return nearest;
  uint32_t b = bit_cast<uint32_t>(nearest);
  if ((back > x) == (back > 0) && back != 0) --b;  // towards zero
  return bit_cast<float>(b | 1u | (x < 0 ? 0x80000000u : 0u));
}
ISOTILE_INLINE void from_double(double x, double* out) { *out = x; }
ISOTILE_INLINE void from_double(double x, float* out) { *out = static_cast<float>(x); }
ISOTILE_INLINE void from_double(double x, BFloat16* out) { from_float(round_to_odd(x), out); }
ISOTILE_INLINE void from_double(double x, Float16* out) { from_float(round_to_odd(x), out); }

// The accumulator's type: float, or double for double.
template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

template <class T>
ISOTILE_INLINE Accumulator<T> to_accumulator(T x) {
  return static_cast<Accumulator<T>>(to_double(x));
}
ISOTILE_INLINE void from_accumulator(float x, float* out) { *out = x; }
template <class T>
ISOTILE_INLINE void from_accumulator(float x, T* out) {
  from_float(x, out);
}
template <class T>
ISOTILE_INLINE void from_accumulator(double x, T* out) {
  from_double(x, out);
}

template <class T>
struct Type {
  using type = T;
};

// f(Type<T>{}) for the float type of a dtype code.
template <class F>
ISOTILE_INLINE void dispatch_float(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kFloat32:
      f(Type<float>{});
      return;
    case DType::kBFloat16:
      f(Type<BFloat16>{});
      return;
    case DType::kFloat16:
      f(Type<Float16>{});
      return;
    case DType::kFloat64:
      f(Type<double>{});
      return;
    default:
      fail("isotile kernel: the tensor's dtype is not float32, bfloat16, float16 or float64");
  }
}

ISOTILE_INLINE int64_t item_size(DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
    case DType::kInt64:
      return 8;
    case DType::kFloat32:
    case DType::kInt32:
      return 4;
    case DType::kBFloat16:
    case DType::kFloat16:
      return 2;
    default:
      return 1;
  }
}

}  // namespace isotile
