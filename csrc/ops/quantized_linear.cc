// y [m, n] = activation(x [m, k] @ weight [n, k].T + bias [n]) + residual [m, n], the weight quantised.
#include "base/parallel.h"
#include "base/scratch.h"
#include "ops/_gemm_epilogue.h"
#include "ops/_gemm_pack.h"
#include "ops/_quantized_format.h"
#include "ops/_quantized_rows.h"
#include "ops/_rows.h"

namespace isotile {
namespace ISOTILE_ISA {

namespace {

struct Problem {
  QuantizedWeight w;
  Matrix x;
  int64_t m;
  Epilogue out;
};

// --- any scheme, any dtype: a row of the weight at a time ------------------------------------------------------------

template <class Acc>
inline Acc dot(const Acc* a, const Acc* b, int64_t k) {
  using V = Vec<Acc>;
  V sums[4] = {V::zero(), V::zero(), V::zero(), V::zero()};
  int64_t i = 0;
  for (; i + 4 * V::kLanes <= k; i += 4 * V::kLanes)
    for (int u = 0; u < 4; ++u)
      sums[u] = fma(V::load(a + i + u * V::kLanes), V::load(b + i + u * V::kLanes), sums[u]);
  for (; i < k; i += V::kLanes) sums[0] = fma(V::load(a + i, k - i), V::load(b + i, k - i), sums[0]);
  return reduce_add((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

inline int32_t integer_dot(const int8_t* a, const int8_t* b, int64_t k) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += static_cast<int32_t>(a[i]) * static_cast<int32_t>(b[i]);
  return sum;
}
inline int32_t integer_sum(const int8_t* a, int64_t k) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += a[i];
  return sum;
}

constexpr int64_t kColumns = 64;  // results that are finished together

template <class Acc, class F>
inline void by_columns(const Problem& p, const F& column) {
  const int64_t m = p.m, grain = most(1, 65536 / most(1, m * p.w.k) / kColumns);
  parallel_for(0, ceil_div(p.w.n, kColumns), grain, [&](int64_t begin, int64_t end) {
    Scratch<Acc> c(m * kColumns);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t j0 = block * kColumns, cols = least(kColumns, p.w.n - j0);
      for (int64_t j = 0; j < cols; ++j) column(j0 + j, c.data() + j);
      finish(p.out, c.data(), kColumns, 0, m, j0, cols);
    }
  });
}

// Weights dequantised to the accumulator's type; x as it is, or its e4m3 numbers.
template <class Acc>
inline void any_float(const Problem& p) {
  const int64_t m = p.m, k = p.w.k;
  Scratch<Acc> rows(m * k);
  Scratch<float> scales(m);
  dispatch_float(p.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t i = 0; i < m; ++i) {
      const T* x = static_cast<const T*>(p.x.data) + p.x.rows.at(i);
      Acc* row = rows.data() + i * k;
      if (!p.w.dynamic()) {
        for (int64_t l = 0; l < k; ++l) row[l] = static_cast<Acc>(to_double(x[l * p.x.col]));
        continue;
      }
      const RowScale scale = row_scale(x, p.x.col, k, 448.0f);
      scales[i] = scale.scale;
      quantize_row<true>(x, p.x.col, k, scale, [&](int64_t l, Vec<float> v, int64_t n) { v.store(row + l, n); });
    }
  });
  by_columns<Acc>(p, [&](int64_t j, Acc* c) {
    Scratch<Acc> weight(k);
    dequantize_row(p.w, j, weight.data());
    for (int64_t i = 0; i < m; ++i) {
      const Acc z = dot(rows.data() + i * k, weight.data(), k);
      c[i * kColumns] = p.w.dynamic() ? z * static_cast<Acc>(scales[i]) : z;
    }
  });
}

// Integers times integers, exact within a group.
template <class Acc>
inline void any_integer(const Problem& p) {
  const int64_t m = p.m, k = p.w.k;
  Scratch<int8_t> rows(m * k);
  Scratch<float> scales(m);
  dispatch_float(p.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t i = 0; i < m; ++i) {
      const T* x = static_cast<const T*>(p.x.data) + p.x.rows.at(i);
      int8_t* row = rows.data() + i * k;
      const RowScale scale = row_scale(x, p.x.col, k, 127.0f);
      scales[i] = scale.scale;
      quantize_row<false>(x, p.x.col, k, scale, [&](int64_t l, Vec<float> v, int64_t n) {
        float lanes[Vec<float>::kLanes];
        v.store(lanes);
        for (int64_t u = 0; u < Vec<float>::kLanes && u < n; ++u) row[l + u] = static_cast<int8_t>(lanes[u]);
      });
    }
  });
  by_columns<Acc>(p, [&](int64_t j, Acc* c) {
    Scratch<int8_t> weight(k);
    integers_of_row(p.w, j, 0, k, weight.data());
    for (int64_t i = 0; i < m; ++i) {
      Acc t = 0;
      for (int64_t g = 0; g < p.w.groups; ++g) {
        const int64_t k0 = g * p.w.group, length = least(p.w.group, k - k0);
        const int8_t* q = rows.data() + i * k + k0;
        int32_t sum = integer_dot(q, weight.data() + k0, length);
        if (p.w.four_bits() && !p.w.has_offsets()) sum -= p.w.zero(j, g) * integer_sum(q, length);
        t = t + static_cast<Acc>(sum) * static_cast<Acc>(p.w.scale(j, g));
        if (p.w.has_offsets()) t = t + static_cast<Acc>(integer_sum(q, length)) * static_cast<Acc>(p.w.offset(j, g));
      }
      c[i * kColumns] = t * static_cast<Acc>(scales[i]);
    }
  });
}

}  // namespace

void quantized_linear(const TensorView* t, const double* s) {
  Problem p;
  p.w = weight_of(t, s);
  p.x = Matrix::rows_of(t[0]);
  p.m = row_count(t[0]);
  if (p.m == 0 || p.w.n == 0) return;
  const TensorView &bias = t[5], &residual = t[6], &y = t[7], &preactivation = t[8];
  p.out.y = Matrix::rows_of(y);
  p.out.preactivation = Matrix::rows_of(preactivation);
  p.out.residual = Matrix::rows_of(residual);
  if (bias.present()) {
    p.out.bias = bias.data;
    p.out.bias_dtype = bias.dtype;
    p.out.bias_stride = bias.stride[0];
  }
  p.out.activation = static_cast<Activation>(static_cast<int>(s[2]));
  const bool integers = p.w.integer() && p.w.dynamic(), wide = p.x.dtype == DType::kFloat64;
  if (integers) wide ? any_integer<double>(p) : any_integer<float>(p);
  else wide ? any_float<double>(p) : any_float<float>(p);
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
