// Activations quantised row by row: the spec's quantize_rows, in the same float32 operations.
#pragma once
#include "ops/_quantized_format.h"

namespace isotile {
namespace ISOTILE_ISA {

// The nearest e4m3 number, ties to even, of |v| <= 448.
ISOTILE_INLINE Vec<float> round_to_e4m3(Vec<float> v) {
  using I = Vec<int32_t>;
  const I bits = as_int(v);
  const I even = shift_right<20>(bits) & I::set1(1);
  const I cut = (bits + I::set1(0x7ffff) + even) & I::set1(static_cast<int32_t>(0xfff00000u));
  const Vec<float> subnormal = round(v * Vec<float>::set1(512.0f)) * Vec<float>::set1(1.0f / 512.0f);
  return select(abs(v) < Vec<float>::set1(0.015625f), subnormal, as_float(cut));
}

struct RowScale {
  float inverse;  // q = round(x * inverse)
  float scale;    // NaN for a row that holds NaN or infinity
};

template <class T>
inline RowScale row_scale(const T* x, int64_t stride, int64_t k, float top) {
  using V = Vec<float>;
  V most = V::zero();
  int64_t i = 0;
  if (stride == 1) {
    V some[4] = {most, most, most, most};  // one alone would wait for itself
    for (; i + 4 * V::kLanes <= k; i += 4 * V::kLanes)
#pragma GCC unroll 4
      for (int u = 0; u < 4; ++u) some[u] = max_nan(some[u], abs(V::load(x + i + u * V::kLanes)));
    most = max_nan(max_nan(some[0], some[1]), max_nan(some[2], some[3]));
    for (; i < k; i += V::kLanes) most = max_nan(most, abs(V::load(x + i, k - i)));
  } else {
    for (; i < k; i += V::kLanes) most = max_nan(most, abs(V::load_strided(x + i * stride, stride, k - i)));
  }
  if (is_nan(most).any()) return {0.0f, __builtin_nanf("")};
  float amax = reduce_max(most);
  if (!(amax <= 0x1.fffffep127f)) return {0.0f, __builtin_nanf("")};
  if (amax < kLeastAmax) amax = kLeastAmax;
  return {top / amax, amax / top};
}

// q of one row through store(index, vector, lanes): whole numbers from -127 to 127, or e4m3 numbers.
template <bool kE4m3, class T, class Store>
ISOTILE_INLINE void quantize_row(const T* x, int64_t stride, int64_t k, RowScale row, const Store& store) {
  using V = Vec<float>;
  const V inverse = V::set1(row.inverse);
  const bool finite = row.scale == row.scale;
  for (int64_t i = 0; i < k; i += V::kLanes) {
    const int64_t n = k - i;
    V v = V::zero();
    if (finite) {
      if (stride != 1) v = V::load_strided(x + i * stride, stride, n);
      else if (n >= V::kLanes) v = V::load(x + i);
      else v = V::load(x + i, n);
      v = v * inverse;
    }
    store(i, kE4m3 ? round_to_e4m3(v) : round(v), n);
  }
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
