// What every set has alike: compound assignment and operations made of others. Included by vec.h only.
#pragma once

namespace isotile {
namespace ISOTILE_ISA {

template <class T>
ISOTILE_INLINE Vec<T>& operator+=(Vec<T>& a, Vec<T> b) {
  return a = a + b;
}
template <class T>
ISOTILE_INLINE Vec<T>& operator-=(Vec<T>& a, Vec<T> b) {
  return a = a - b;
}
template <class T>
ISOTILE_INLINE Vec<T>& operator*=(Vec<T>& a, Vec<T> b) {
  return a = a * b;
}
template <class T>
ISOTILE_INLINE Vec<T>& operator/=(Vec<T>& a, Vec<T> b) {
  return a = a / b;
}
template <class T>
ISOTILE_INLINE Mask<T> is_nan(Vec<T> a) {
  return a != a;
}
template <class T>
ISOTILE_INLINE Vec<T> max_nan(Vec<T> a, Vec<T> b) {
  return select(a != a, a, max(a, b));
}
template <class T>
ISOTILE_INLINE Vec<T> min_nan(Vec<T> a, Vec<T> b) {
  return select(a != a, a, min(a, b));
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
