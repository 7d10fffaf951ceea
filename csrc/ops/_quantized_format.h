// Quantised weights as the kernels read them: docs/design.md section 3 has the layout.
#pragma once
#include "base/dtype.h"
#include "base/tensor_view.h"
#include "simd/vec.h"

namespace isotile {
namespace ISOTILE_ISA {

// The order is python/isotile/ops/_quantized.py's.
enum class Scheme { kInt8, kInt8Dynamic, kInt4, kInt4Dynamic, kFp8, kMxfp4, kNvfp4 };

constexpr int64_t kBlock4 = 128;          // elements of a row that share 64 bytes in a four-bit format
constexpr float kLeastAmax = 0x1p-100f;   // see quantize_rows in python/isotile/ops/_quantized.py

struct FormatTables {
  float e4m3[256];
  float e2m1[16];
};

constexpr float power_of_two(int exponent) {
  float v = 1.0f;
  for (; exponent > 0; --exponent) v *= 2.0f;
  for (; exponent < 0; ++exponent) v *= 0.5f;
  return v;
}
constexpr FormatTables make_tables() {
  FormatTables t{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = (code >> 3) & 15, mantissa = code & 7;
    const float magnitude = (code & 127) == 127 ? __builtin_nanf("")
                            : exponent == 0     ? mantissa * power_of_two(-9)
                                                : (8 + mantissa) * power_of_two(exponent - 10);
    t.e4m3[code] = code & 128 ? -magnitude : magnitude;
  }
  constexpr float kMagnitudes[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  for (int code = 0; code < 16; ++code) t.e2m1[code] = code & 8 ? -kMagnitudes[code & 7] : kMagnitudes[code & 7];
  return t;
}
static constexpr FormatTables kTables = make_tables();

struct QuantizedWeight {
  Scheme scheme;
  int64_t n, k, row_bytes, groups, group;  // group: elements that share a scale, at least 1
  const uint8_t* packed;
  const void* scales;
  DType scales_dtype;
  const void* zeros;  // null: none
  DType zeros_dtype;
  float global;

  bool four_bits() const {
    return scheme == Scheme::kInt4 || scheme == Scheme::kInt4Dynamic || scheme == Scheme::kMxfp4 ||
           scheme == Scheme::kNvfp4;
  }
  bool integer() const { return scheme != Scheme::kFp8 && scheme != Scheme::kMxfp4 && scheme != Scheme::kNvfp4; }
  bool dynamic() const {
    return scheme == Scheme::kInt8Dynamic || scheme == Scheme::kInt4Dynamic || scheme == Scheme::kFp8;
  }
  bool has_offsets() const { return zeros != nullptr && zeros_dtype != DType::kUInt8; }
  const uint8_t* row(int64_t i) const { return packed + i * row_bytes; }

  static float number(const void* data, DType dtype, int64_t i) {
    switch (dtype) {
      case DType::kFloat32: return static_cast<const float*>(data)[i];
      case DType::kBFloat16: return to_float(static_cast<const BFloat16*>(data)[i]);
      default: return to_float(static_cast<const Float16*>(data)[i]);
    }
  }
  // Scale of a group, without the global one.
  float scale(int64_t i, int64_t g) const {
    const int64_t at = i * groups + g;
    if (scales_dtype != DType::kUInt8) return number(scales, scales_dtype, at);
    const uint32_t code = static_cast<const uint8_t*>(scales)[at];
    if (scheme == Scheme::kNvfp4) return kTables.e4m3[code];
    if (code == 255) return __builtin_nanf("");
    return code == 0 ? 0x1p-127f : bit_cast<float>(code << 23);
  }
  int32_t zero(int64_t i, int64_t g) const {
    return zeros == nullptr ? 8 : static_cast<const uint8_t*>(zeros)[i * groups + g];
  }
  // No importer makes one beyond 16, but any byte is allowed.
  int32_t largest_zero() const {
    if (zeros == nullptr) return 8;
    uint8_t largest = 0;
    for (int64_t i = 0; i < n * groups; ++i) {
      const uint8_t z = static_cast<const uint8_t*>(zeros)[i];
      largest = z > largest ? z : largest;
    }
    return largest;
  }
  float offset(int64_t i, int64_t g) const { return number(zeros, zeros_dtype, i * groups + g); }
};

// parts: packed, scales, zeros and global_scale; s: scheme and group_size.
inline QuantizedWeight weight_of(const TensorView* parts, int64_t k, const double* s) {
  const TensorView &packed = parts[0], &scales = parts[1], &zeros = parts[2], &global = parts[3];
  QuantizedWeight w;
  w.scheme = static_cast<Scheme>(static_cast<int>(s[0]));
  w.n = packed.size[0];
  w.k = k;
  w.row_bytes = packed.size[1];
  w.groups = scales.size[1];
  w.group = s[1] < 0 ? (w.k > 0 ? w.k : 1) : static_cast<int64_t>(s[1]);
  w.packed = static_cast<const uint8_t*>(packed.data);
  w.scales = scales.data;
  w.scales_dtype = scales.dtype;
  w.zeros = zeros.present() ? zeros.data : nullptr;
  w.zeros_dtype = zeros.dtype;
  w.global = global.present() ? *static_cast<const float*>(global.data) : 1.0f;
  return w;
}

// out[i] = number(code i) of `count` elements from element k0 of a row; a run of 64 nibbles lies in one half of 64 bytes.
template <class T, class Number>
ISOTILE_INLINE void numbers_of_run(const QuantizedWeight& w, const uint8_t* row, int64_t k0, int64_t count, T* out,
                                   const Number& number) {
  if (!w.four_bits()) {
    for (int64_t i = 0; i < count; ++i) out[i] = number(row[k0 + i]);
    return;
  }
  const uint8_t* bytes = row + k0 / kBlock4 * (kBlock4 / 2) + k0 % (kBlock4 / 2);
  if (k0 % kBlock4 < kBlock4 / 2)
    for (int64_t i = 0; i < count; ++i) out[i] = number(static_cast<uint8_t>(bytes[i] & 15));
  else
    for (int64_t i = 0; i < count; ++i) out[i] = number(static_cast<uint8_t>(bytes[i] >> 4));
}

// The stored integers of elements [k0, k1) of a row, before the zero point: 0 to 15 for int4.
inline void integers_of_row(const QuantizedWeight& w, int64_t i, int64_t k0, int64_t k1, int8_t* out) {
  constexpr int64_t kRun = kBlock4 / 2;
  const uint8_t* row = w.row(i);
  if (!w.four_bits()) {
    __builtin_memcpy(out, row + k0, static_cast<size_t>(k1 - k0));
    return;
  }
  for (int64_t k = k0, end; k < k1; k = end) {
    end = (k / kRun + 1) * kRun < k1 ? (k / kRun + 1) * kRun : k1;
    numbers_of_run(w, row, k, end - k, out + (k - k0), [](uint8_t code) { return static_cast<int8_t>(code); });
  }
}

// Elements [k0, k1) of row i of the weight in T (float or double): the spec's `dequantized`.
template <class T>
inline void dequantize_part(const QuantizedWeight& w, int64_t i, int64_t k0, int64_t k1, T* out) {
  const uint8_t* row = w.row(i);
  const int64_t run = w.four_bits() ? kBlock4 / 2 : w.k;
  for (int64_t k = k0; k < k1;) {
    const int64_t g = k / w.group;
    int64_t end = (g + 1) * w.group < k1 ? (g + 1) * w.group : k1;
    if ((k / run + 1) * run < end) end = (k / run + 1) * run;
    const auto numbers = [&](const auto& number) { numbers_of_run(w, row, k, end - k, out + (k - k0), number); };
    const T scale = w.scale(i, g);
    if (w.has_offsets()) {
      const T offset = w.offset(i, g);
      numbers([=](uint8_t code) { return static_cast<T>(code) * scale + offset; });
    } else if (w.integer() && w.four_bits()) {
      const int32_t zero = w.zero(i, g);
      numbers([=](uint8_t code) { return static_cast<T>(static_cast<int32_t>(code) - zero) * scale; });
    } else if (w.integer()) {
      numbers([=](uint8_t code) { return static_cast<T>(static_cast<int8_t>(code)) * scale; });
    } else if (w.four_bits()) {
      const T global = w.global;
      numbers([=](uint8_t code) { return static_cast<T>(kTables.e2m1[code]) * scale * global; });
    } else {
      numbers([=](uint8_t code) { return static_cast<T>(kTables.e4m3[code]) * scale; });
    }
    k = end;
  }
}
template <class T>
inline void dequantize_row(const QuantizedWeight& w, int64_t i, T* out) {
  dequantize_part(w, i, 0, w.k, out);
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
