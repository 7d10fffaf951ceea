// What happens to a tile of accumulators before it is stored: y = activation(acc + bias) + residual, and the
// preactivation acc + bias. All in the accumulator's precision; each output is rounded once, at its store.
#pragma once
#include "base/dtype.h"
#include "base/tensor_view.h"
#include "simd/math.h"
#include "simd/vec.h"

namespace isotile {
namespace ISOTILE_ISA {

// Linear index over several dimensions -> element offset. Dimensions that lie evenly behind each other are merged.
struct IndexMap {
  int ndim = 0;
  int64_t size[kMaxDims];
  int64_t stride[kMaxDims];

  // Appends an inner dimension.
  void append(int64_t dim_size, int64_t dim_stride) {
    if (dim_size == 1) return;
    if (ndim > 0 && stride[ndim - 1] == dim_stride * dim_size) {
      size[ndim - 1] *= dim_size;
      stride[ndim - 1] = dim_stride;
      return;
    }
    size[ndim] = dim_size;
    stride[ndim++] = dim_stride;
  }
  int64_t at(int64_t index) const {
    if (ndim == 1) return index * stride[0];
    int64_t offset = 0;
    for (int d = ndim - 1; d >= 0; --d) {
      const int64_t outer = index / size[d];
      offset += (index - outer * size[d]) * stride[d];
      index = outer;
    }
    return offset;
  }
  // Whether consecutive indices are one constant stride apart, and that stride.
  bool even() const { return ndim <= 1; }
  int64_t step() const { return ndim == 0 ? 0 : stride[0]; }
};

// Element (i, j) lies at rows.at(i) + j * col. Absent: data is null.
struct Matrix {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t offset = 0;
  IndexMap rows;
  int64_t col = 1;
  bool present() const { return data != nullptr; }

  static Matrix of(void* data, DType dtype, int64_t row_count, int64_t row_stride, int64_t col_stride) {
    Matrix m;
    m.data = data;
    m.dtype = dtype;
    m.rows.append(row_count, row_stride);
    m.col = col_stride;
    return m;
  }
  static Matrix rows_of(const TensorView& t) {  // all leading dims; an absent tensor is an absent matrix
    Matrix m;
    if (!t.present()) return m;
    m.data = t.data;
    m.dtype = t.dtype;
    for (int d = 0; d + 1 < t.ndim; ++d) m.rows.append(t.size[d], t.stride[d]);
    m.col = t.stride[t.ndim - 1];
    return m;
  }
};

// With kFull, n is the vector's width.
template <bool kFull, class T, class E>
inline Vec<T> load_typed(const E* p, int64_t stride, int64_t n) {
  if (stride == 1) return kFull ? Vec<T>::load(p) : Vec<T>::load(p, n);
  return Vec<T>::load_strided(p, stride, n);
}

template <bool kFull, class T, class E>
inline void store_typed(Vec<T> v, E* p, int64_t stride, int64_t n) {
  if (stride == 1) {
    if (kFull) v.store(p);
    else v.store(p, n);
  } else {
    v.store_strided(p, stride, n);
  }
}

template <bool kFull, class T>
inline Vec<T> load_any(const void* data, DType dtype, int64_t offset, int64_t stride, int64_t n) {
  switch (dtype) {
    case DType::kFloat32: return load_typed<kFull, T>(static_cast<const float*>(data) + offset, stride, n);
    case DType::kBFloat16: return load_typed<kFull, T>(static_cast<const BFloat16*>(data) + offset, stride, n);
    case DType::kFloat16: return load_typed<kFull, T>(static_cast<const Float16*>(data) + offset, stride, n);
    default: return load_typed<kFull, T>(static_cast<const double*>(data) + offset, stride, n);
  }
}

template <bool kFull, class T>
inline void store_any(Vec<T> v, void* data, DType dtype, int64_t offset, int64_t stride, int64_t n) {
  switch (dtype) {
    case DType::kFloat32: return store_typed<kFull, T>(v, static_cast<float*>(data) + offset, stride, n);
    case DType::kBFloat16: return store_typed<kFull, T>(v, static_cast<BFloat16*>(data) + offset, stride, n);
    case DType::kFloat16: return store_typed<kFull, T>(v, static_cast<Float16*>(data) + offset, stride, n);
    default: return store_typed<kFull, T>(v, static_cast<double*>(data) + offset, stride, n);
  }
}

// The order is docs/design.md's, section 3.
enum class Activation { kNone, kRelu, kGelu, kGeluTanh, kSilu, kSigmoid, kTanh };

template <class T>
inline Vec<T> activate(Activation activation, Vec<T> x) {
  using V = Vec<T>;
  switch (activation) {
    case Activation::kRelu: return max_nan(x, V::zero());
    case Activation::kGelu:
      return V::set1(T(0.5)) * x * (V::set1(T(1)) + erf(x * V::set1(T(0.70710678118654752440))));
    case Activation::kGeluTanh: {
      const V inner = V::set1(T(0.79788456080286535588)) * (x + V::set1(T(0.044715)) * x * x * x);
      return V::set1(T(0.5)) * x * (V::set1(T(1)) + tanh(inner));
    }
    case Activation::kSilu: return x * sigmoid(x);
    case Activation::kSigmoid: return sigmoid(x);
    case Activation::kTanh: return tanh(x);
    case Activation::kNone: break;
  }
  return x;
}

struct Epilogue {
  Matrix y, preactivation, residual;
  const void* bias = nullptr;
  DType bias_dtype = DType::kFloat32;
  int64_t bias_stride = 1;
  Activation activation = Activation::kNone;

  void set_bias(const TensorView& view) {
    if (!view.present()) return;
    bias = view.data;
    bias_dtype = view.dtype;
    bias_stride = view.stride[0];
  }
  bool bare() const {
    return !preactivation.present() && !residual.present() && bias == nullptr && activation == Activation::kNone;
  }
  // Whether a tile of accumulators of type `acc` is already the result.
  bool plain(DType acc) const { return y.dtype == acc && y.col == 1 && y.rows.even() && bare(); }
};

template <bool kFull, class T>
inline void finish_vector(const Epilogue& e, const T* c, int64_t y0, int64_t z0, int64_t r0, int64_t j, int64_t n) {
  Vec<T> v = Vec<T>::load(c);  // tiles are whole vectors wide
  if (e.bias != nullptr) v = v + load_any<kFull, T>(e.bias, e.bias_dtype, j * e.bias_stride, e.bias_stride, n);
  if (e.preactivation.present())
    store_any<kFull>(v, e.preactivation.data, e.preactivation.dtype, z0 + j * e.preactivation.col,
                     e.preactivation.col, n);
  if (e.activation != Activation::kNone) v = activate(e.activation, v);
  if (e.residual.present())
    v = v + load_any<kFull, T>(e.residual.data, e.residual.dtype, r0 + j * e.residual.col, e.residual.col, n);
  store_any<kFull>(v, e.y.data, e.y.dtype, y0 + j * e.y.col, e.y.col, n);
}

// Nothing to do but to round and store.
template <class T, class E>
inline void finish_plain(const Matrix& y, const T* c, int64_t ldc, int64_t row, int64_t rows, int64_t col,
                         int64_t cols) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  E* data = static_cast<E*>(y.data) + y.offset + col;
  for (int64_t i = 0; i < rows; ++i) {
    E* to = data + y.rows.at(row + i);
    const T* from = c + i * ldc;
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) Vec<T>::load(from + j).store(to + j);
    if (j < cols) Vec<T>::load(from + j).store(to + j, cols - j);
  }
}

// Rows [row, row + rows) and columns [col, col + cols) of the result from c [rows, ldc].
template <class T>
inline void finish(const Epilogue& e, const T* c, int64_t ldc, int64_t row, int64_t rows, int64_t col, int64_t cols) {
  constexpr int64_t kLanes = Vec<T>::kLanes;
  if (e.y.col == 1 && e.bare()) {
    switch (e.y.dtype) {
      case DType::kFloat32: return finish_plain<T, float>(e.y, c, ldc, row, rows, col, cols);
      case DType::kBFloat16: return finish_plain<T, BFloat16>(e.y, c, ldc, row, rows, col, cols);
      case DType::kFloat16: return finish_plain<T, Float16>(e.y, c, ldc, row, rows, col, cols);
      default: return finish_plain<T, double>(e.y, c, ldc, row, rows, col, cols);
    }
  }
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t y0 = e.y.offset + e.y.rows.at(row + i);
    const int64_t z0 = e.preactivation.present() ? e.preactivation.offset + e.preactivation.rows.at(row + i) : 0;
    const int64_t r0 = e.residual.present() ? e.residual.offset + e.residual.rows.at(row + i) : 0;
    int64_t j = 0;
    for (; j + kLanes <= cols; j += kLanes) finish_vector<true>(e, c + i * ldc + j, y0, z0, r0, col + j, kLanes);
    if (j < cols) finish_vector<false>(e, c + i * ldc + j, y0, z0, r0, col + j, cols - j);
  }
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
