// Elementary functions on vectors. Vec<float>: within 2 units in the last place, sigmoid 3 (tests/csrc/vec_test.cc
// measures every function against double), right at infinities, NaN, overflow and gradual underflow. The polynomials are minimax fits
// to the functions on the reduced ranges named beside them. Vec<double>: the C library, lane by lane.
#pragma once
#include "simd/vec.h"

namespace isotile {
namespace ISOTILE_ISA {

// c[0] + c[1] x + ..., Horner from the highest.
template <int kCount>
ISOTILE_INLINE Vec<float> polynomial(Vec<float> x, const float (&c)[kCount]) {
  Vec<float> r = Vec<float>::set1(c[kCount - 1]);
  for (int i = kCount - 2; i >= 0; --i) r = fma(r, x, Vec<float>::set1(c[i]));
  return r;
}

// e^(x - n ln 2), n the integer nearest to x / ln 2.
ISOTILE_INLINE Vec<float> exp_reduced(Vec<float> x, Vec<float> n) {
  using V = Vec<float>;
  constexpr float q[] = {0.4999999343f, 0.166665204f, 0.04166839079f, 0.008368745113f, 0.001381454003f};
  V r = fnma(n, V::set1(0.693359375f), x);
  r = fnma(n, V::set1(-2.12194440e-4f), r);
  return fma(r * r, polynomial(r, q), r) + V::set1(1.0f);
}
// e^x = 2^n e^r with n = round(x / ln 2), |r| <= ln 2 / 2; e^r = 1 + r + r^2 q(r).
ISOTILE_INLINE Vec<float> exp(Vec<float> x) {
  using V = Vec<float>;
  // Beyond these bounds the result is 0 or infinity, and n stays finite; NaN passes. What becomes 0 does not go through
  // the underflow: that takes some hundred cycles on many CPUs.
  const auto vanishes = x < V::set1(-104.0f);
  x = select(vanishes, V::zero(), min(V::set1(89.0f), x));
  const V n = round(x * V::set1(1.44269504f));
  return select(vanishes, V::zero(), scale_by_power_of_two(exp_reduced(x, n), n));
}
// The same for x <= 0, quicker where no lane comes near the underflow.
ISOTILE_INLINE Vec<float> exp_nonpositive(Vec<float> x) {
  using V = Vec<float>;
  if (__builtin_expect((x < V::set1(-87.0f)).any(), 0)) return exp(x);
  const V big = V::set1(12582912.0f + 127.0f);  // 1.5 * 2^23 + 127: a sum's last bits are 127 + the nearest integer
  const V shifted = fma(x, V::set1(1.44269504f), big);
  return exp_reduced(x, shifted - big) * as_float(shift_left<23>(as_int(shifted)));
}

// 2^x for x <= 127 within 4 units, and 0 in the place of results below 2^-125. Results in the range of gradual
// underflow, and those that underflow to 0, take some hundred cycles on many CPUs: hidden scores would cost thirty
// times what the others do.
ISOTILE_INLINE Vec<float> exp2_or_zero(Vec<float> x) {
  using V = Vec<float>;
  constexpr float q[] = {1.0f, 0.6931470037f, 0.2402224243f, 0.05550733581f, 0.009671512991f, 0.001326472731f};
  const V big = V::set1(12582912.0f + 127.0f);  // as above
  const V shifted = x + big;
  const V power = as_float(shift_left<23>(as_int(shifted)));
  const V y = polynomial(x - (shifted - big), q) * power;
  return select(x < V::set1(-125.0f), V::zero(), y);
}

// ln x = e ln 2 + ln(1 + f), 1 + f in [sqrt(1/2), sqrt 2); ln(1 + f) = f - f^2 / 2 + f^3 q(f).
ISOTILE_INLINE Vec<float> log(Vec<float> x) {
  using V = Vec<float>;
  using I = Vec<int32_t>;
  constexpr float q[] = {0.3333333168f, -0.2500082677f, 0.2000123588f, -0.1662314448f,
                         0.1420136859f, -0.1316200396f, 0.1276542827f, -0.07634388736f};
  const auto subnormal = x < V::set1(1.17549435e-38f);
  const V scaled = select(subnormal, x * V::set1(16777216.0f), x);
  // Subtracting sqrt(1/2)'s bits makes the exponent field count from it.
  const I offset = I::set1(0x3f3504f3);
  const I shifted = as_int(scaled) - offset;
  const V exponent = to_float(shift_right_sign<23>(shifted)) - select(subnormal, V::set1(24.0f), V::zero());
  const V f = as_float((shifted & I::set1(0x007fffff)) + offset) - V::set1(1.0f);
  const V f2 = f * f;
  V y = f2 * f * polynomial(f, q);
  y = fma(exponent, V::set1(-2.12194440e-4f), y);
  y = fnma(V::set1(0.5f), f2, y);
  V r = fma(exponent, V::set1(0.693359375f), f + y);
  const V infinity = V::set1(__builtin_inff());
  r = select(x == infinity, x, r);
  r = select(x == V::zero(), -infinity, r);
  return select((x < V::zero()) | is_nan(x), V::set1(__builtin_nanf("")), r);
}

// 1 / (1 + e^-x), from e^-|x| so that both tails keep their relative precision.
ISOTILE_INLINE Vec<float> sigmoid(Vec<float> x) {
  using V = Vec<float>;
  const V e = exp(-abs(x));
  const V d = V::set1(1.0f) + e;
  return select(x < V::zero(), e, V::set1(1.0f)) / d;
}

// |x| < 5/8: x + x^3 q(x^2); else 1 - 2 / (e^2|x| + 1).
ISOTILE_INLINE Vec<float> tanh(Vec<float> x) {
  using V = Vec<float>;
  constexpr float q[] = {-0.3333328194f, 0.133314422f, -0.05373971491f, 0.02063908676f, -0.005704986527f};
  const V t = abs(x);
  const V z = x * x;
  const V small = fma(z * t, polynomial(z, q), t);
  const V large = V::set1(1.0f) - V::set1(2.0f) / (exp(t + t) + V::set1(1.0f));
  return copysign(select(t < V::set1(0.625f), small, large), x);
}

// |x| < 0.85: x + x q(x^2); else 1 - e^(-|x| p(|x|)).
ISOTILE_INLINE Vec<float> erf(Vec<float> x) {
  using V = Vec<float>;
  constexpr float q[] = {0.1283791602f, -0.3761257184f, 0.112827174f, -0.02680254774f, 0.005051094777f, -0.0006315129076f};
  constexpr float p[] = {1.128608905f,   0.6353160375f,    0.1059581129f,   -0.02351669347f,
                         0.003524072818f, -0.0002931339282f, 8.214839195e-06f};
  const V t = abs(x);
  const V z = x * x;
  const V small = fma(t, polynomial(z, q), t);
  const V bounded = min(V::set1(4.0f), t);  // erf(4) rounds to 1; NaN passes
  const V large = V::set1(1.0f) - exp(-(bounded * polynomial(bounded, p)));
  return copysign(select(t < V::set1(0.85f), small, large), x);
}

template <class F>
ISOTILE_INLINE Vec<double> map_lanes(Vec<double> x, const F& f) {
  alignas(64) double lanes[Vec<double>::kLanes];
  x.store(lanes);
  for (int i = 0; i < Vec<double>::kLanes; ++i) lanes[i] = f(lanes[i]);
  return Vec<double>::load(lanes);
}
ISOTILE_INLINE Vec<double> exp(Vec<double> x) {
  return map_lanes(x, [](double v) { return __builtin_exp(v); });
}
ISOTILE_INLINE Vec<double> exp_nonpositive(Vec<double> x) { return exp(x); }
ISOTILE_INLINE Vec<double> exp2_or_zero(Vec<double> x) {
  return map_lanes(x, [](double v) { return __builtin_exp2(v); });
}
ISOTILE_INLINE Vec<double> log(Vec<double> x) {
  return map_lanes(x, [](double v) { return __builtin_log(v); });
}
ISOTILE_INLINE Vec<double> tanh(Vec<double> x) {
  return map_lanes(x, [](double v) { return __builtin_tanh(v); });
}
ISOTILE_INLINE Vec<double> erf(Vec<double> x) {
  return map_lanes(x, [](double v) { return __builtin_erf(v); });
}
ISOTILE_INLINE Vec<double> sigmoid(Vec<double> x) {
  return map_lanes(x, [](double v) {
    const double e = __builtin_exp(-__builtin_fabs(v));
    return (v < 0 ? e : 1.0) / (1.0 + e);
  });
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
