// The kinds of arithmetic a matrix product is done in, and the packing of its operands for them.
#pragma once
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

// A region [lines rows][bytes] to be fetched towards L2, 64 bytes at each call. Empty: nothing happens.
struct Prefetch {
  const char* at = nullptr;
  int64_t inner = 0, inner_left = 0, rows_left = 0, stride = 0;

  ISOTILE_INLINE void next() {
    if (rows_left == 0) return;
    __builtin_prefetch(at, 0, 2);
    at += 64;
    if (--inner_left == 0) {
      at += stride - inner * 64;
      inner_left = inner;
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
  static constexpr int64_t kChunk = 512;
  static constexpr int64_t kPerStep = 1;
  static ISOTILE_INLINE int64_t steps(int64_t k) { return k; }
  static ISOTILE_INLINE Operand load(const Packed* p) { return Vec<T>::load(p); }
  static ISOTILE_INLINE Operand broadcast(const Packed* p) { return Vec<T>::set1(*p); }
  static ISOTILE_INLINE Vec<T> multiply_add(Operand a, Operand b, Vec<T> c) { return fma(a, b, c); }
  static ISOTILE_INLINE Packed pack(const double* p, int64_t, int64_t) { return static_cast<T>(*p); }
  static ISOTILE_INLINE Packed pack(const float* p, int64_t, int64_t) { return static_cast<T>(*p); }
  template <class Src>
  static ISOTILE_INLINE Packed pack(const Src* p, int64_t, int64_t) {
    return static_cast<T>(to_float(*p));
  }
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
  static ISOTILE_INLINE Operand load(const Packed* p) { return _mm512_loadu_si512(p); }
  static ISOTILE_INLINE Operand broadcast(const Packed* p) { return _mm512_set1_epi32(static_cast<int>(*p)); }
  static ISOTILE_INLINE Vec<float> multiply_add(Operand a, Operand b, Vec<float> c) {
    return Vec<float>(_mm512_dpbf16_ps(c.v, (__m512bh)a, (__m512bh)b));
  }
  // left: how many of the step's elements exist.
  static ISOTILE_INLINE Packed pack(const BFloat16* p, int64_t stride, int64_t left) {
    return p[0].bits | (left > 1 ? static_cast<uint32_t>(p[stride].bits) << 16 : 0u);
  }
};
#endif

// rows of a (at[i], k stride `stride`) -> dst [step][rows].
template <class Kind, class Src>
inline void pack_rows(typename Kind::Packed* dst, const Src* const* at, int64_t rows, int64_t stride, int64_t kc) {
  constexpr int64_t kPer = Kind::kPerStep;
  const int64_t steps = Kind::steps(kc);
  for (int64_t i = 0; i < rows; ++i) {
    const Src* p = at[i];
    for (int64_t s = 0; s < steps; ++s)
      dst[s * rows + i] = Kind::pack(p + s * kPer * stride, stride, kc - s * kPer);
  }
}

// b [kc, cols] (strides sk, sn) -> dst [step][width]; columns beyond cols are 0.
template <class Kind, class Src>
inline void pack_columns(typename Kind::Packed* dst, const Src* src, int64_t sk, int64_t sn, int64_t kc, int64_t cols,
                         int64_t width) {
  constexpr int64_t kPer = Kind::kPerStep;
  const int64_t steps = Kind::steps(kc);
  for (int64_t s = 0; s < steps; ++s) {
    const Src* p = src + s * kPer * sk;
    const int64_t left = kc - s * kPer;
    for (int64_t j = 0; j < cols; ++j) dst[s * width + j] = Kind::pack(p + j * sn, sk, left);
    for (int64_t j = cols; j < width; ++j) dst[s * width + j] = typename Kind::Packed(0);
  }
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
