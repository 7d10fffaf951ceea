// y [m, n] = activation(x [m, k] @ weight [n, k].T + bias [n]) + residual [m, n], the weight quantised.
//
// Few rows: the weight is read once, row by row, and used in registers (_quantized_few_rows.h), bytes block by block
// where x is too large for that (_quantized_byte_blocks.h). Many rows: integers go through panels or blocks
// (_quantized_panels.h, _quantized_blocks.h), exact in int32; floats are dequantised and multiplied as `matmul` does, as
// bfloat16 a block in L1 at a time (_quantized_bfloat16.h), else a slice that stays in the caches. any_float and
// any_integer serve every other call, and batch invariance: they sum each result in an order of its own, whatever the
// number of rows.
#include "base/parallel.h"
#include "base/scratch.h"
#include "ops/_gemm.h"
#include "ops/_gemm_pack.h"
#include "ops/_quantized_bfloat16.h"
#include "ops/_quantized_blocks.h"
#include "ops/_quantized_byte_blocks.h"
#include "ops/_quantized_few_rows.h"
#include "ops/_quantized_format.h"
#include "ops/_quantized_panels.h"
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

// 16-bit operands, because most instruction sets add pairs of their products at once; the compiler finds that.
ISOTILE_INLINE int32_t dot_of_pairs(const int16_t* a, const int16_t* b, int64_t k) {
  int32_t sum = 0;
  for (int64_t i = 0; i < k; ++i) sum += static_cast<int32_t>(a[i]) * static_cast<int32_t>(b[i]);
  return sum;
}
inline int32_t integer_dot(const int16_t* a, const int16_t* b, int64_t k) {
  switch (k) {  // short loops want to be unrolled
    case 32: return dot_of_pairs(a, b, 32);
    case 64: return dot_of_pairs(a, b, 64);
    case 128: return dot_of_pairs(a, b, 128);
    default: return dot_of_pairs(a, b, k);
  }
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
  const int64_t m = p.m, k = p.w.k, groups = p.w.groups;
  Scratch<int16_t> rows(m * k);
  Scratch<int32_t> row_sums(p.w.has_offsets() ? m * groups : 0);  // of each group
  Scratch<float> scales(m);
  const auto group_at = [&](int64_t g) { return least(p.w.group, k - g * p.w.group); };
  dispatch_float(p.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t i = 0; i < m; ++i) {
      const T* x = static_cast<const T*>(p.x.data) + p.x.rows.at(i);
      int16_t* row = rows.data() + i * k;
      const RowScale scale = row_scale(x, p.x.col, k, 127.0f);
      scales[i] = scale.scale;
      quantize_row<false>(x, p.x.col, k, scale, [&](int64_t l, Vec<float> v, int64_t n) {
        float lanes[Vec<float>::kLanes];
        v.store(lanes);
        for (int64_t u = 0; u < Vec<float>::kLanes && u < n; ++u) row[l + u] = static_cast<int16_t>(lanes[u]);
      });
      for (int64_t g = 0; g < groups && p.w.has_offsets(); ++g) {
        int32_t sum = 0;
        for (int64_t l = 0; l < group_at(g); ++l) sum += row[g * p.w.group + l];
        row_sums[i * groups + g] = sum;
      }
    }
  });
  by_columns<Acc>(p, [&](int64_t j, Acc* c) {
    Scratch<int8_t> stored(k);
    Scratch<int16_t> weight(k);
    Scratch<Acc> factors(groups), offsets(groups);
    integers_of_row(p.w, j, 0, k, stored.data());
    for (int64_t g = 0; g < groups; ++g) {
      const int16_t zero = p.w.four_bits() && !p.w.has_offsets() ? static_cast<int16_t>(p.w.zero(j, g)) : 0;
      for (int64_t l = g * p.w.group; l < g * p.w.group + group_at(g); ++l)
        weight[l] = static_cast<int16_t>(stored[l] - zero);
      factors[g] = static_cast<Acc>(p.w.scale(j, g));
      offsets[g] = p.w.has_offsets() ? static_cast<Acc>(p.w.offset(j, g)) : Acc(0);
    }
    for (int64_t i = 0; i < m; ++i) {
      const int16_t* row = rows.data() + i * k;
      Acc t = 0;
      for (int64_t g = 0; g < groups; ++g) {
        const int64_t k0 = g * p.w.group;
        t = t + static_cast<Acc>(integer_dot(row + k0, weight.data() + k0, group_at(g))) * factors[g];
        if (p.w.has_offsets()) t = t + static_cast<Acc>(row_sums[i * groups + g]) * offsets[g];
      }
      c[i * kColumns] = t * static_cast<Acc>(scales[i]);
    }
  });
}

// --- few rows --------------------------------------------------------------------------------------------------------

// Rows of x that meet each row of the weight in registers, at most; more are worth unpacking the weight for. Matrix tiles
// take many rows at the price of few, unless (integers) groups of 32 fill only half of them. Measured at 4096 x 4096 on a
// Xeon with AMX, one thread, and (without tiles) on a Zen 5 EPYC, two threads; 2026-11.
inline int64_t most_few(const Problem& p) { return p.w.k < 1024 ? 8 : 16; }  // short rows are mostly reductions
inline int64_t few_floats_at_most(const Problem& p) {
  [[maybe_unused]] const bool bfloat16 = p.x.dtype == DType::kBFloat16;
#if ISOTILE_HAS_TILES
  if (bfloat16) return 2;
#elif ISOTILE_HAS_BF16_DOT
  if (bfloat16 && serves_pairs(p.w)) return p.w.four_bits() ? 8 : 16;
  if (bfloat16 || p.w.scheme == Scheme::kFp8) return 4;
#endif
  return most_few(p);
}
inline int64_t few_integers_at_most(const Problem& p) {
  const bool small_groups = p.w.groups > 1 && p.w.group < 64;
  if (ISOTILE_HAS_TILES) return small_groups ? 6 : 4;
#if defined(__AVX512VNNI__)
  return p.w.four_bits() ? (small_groups ? 5 : 4) : p.w.groups == 1 ? 10 : 8;
#else
  if (Vec<float>::kLanes < 16) return 8;
  return p.w.four_bits() && !small_groups ? least(12, most_few(p)) : most_few(p);
#endif
}

template <int n>
struct Count {
  static constexpr int value = n;
};

// Calls f(rows, first row) for 8 (or kMost), 4, 2 and 1 rows at a time until `m` are done; rows is a constant.
template <int kMost = 8, class F>
ISOTILE_INLINE void by_rows(int64_t m, const F& f) {
  int64_t r = 0;
  if (kMost == 8)
    for (; m - r >= 8; r += 8) f(Count<kMost>{}, r);
  for (; m - r >= 4; r += 4) f(Count<4>{}, r);
  if (m - r >= 2) f(Count<2>{}, r), r += 2;
  if (m - r >= 1) f(Count<1>{}, r);
}

// The same for up to 8 at a time, as few times as that takes: where each time costs more than a row.
template <class F>
ISOTILE_INLINE void by_most_rows(int64_t m, const F& f) {
  for (int64_t turns = ceil_div(m, 8), turn = 0; turn < turns; ++turn) {
    const int64_t r = turn * m / turns;
    switch ((turn + 1) * m / turns - r) {
      case 1: f(Count<1>{}, r); break;
      case 2: f(Count<2>{}, r); break;
      case 3: f(Count<3>{}, r); break;
      case 4: f(Count<4>{}, r); break;
      case 5: f(Count<5>{}, r); break;
      case 6: f(Count<6>{}, r); break;
      case 7: f(Count<7>{}, r); break;
      default: f(Count<8>{}, r);
    }
  }
}

#if defined(__AVX512VNNI__)
// x: a piece of each row [k / 128][m][128]; totals and scales of its rows may be null.
template <class Products>
inline void few_bytes(const Problem& p, const typename Products::X* x, const int32_t* totals, const float* scales) {
  const int64_t n = p.w.n, m = p.m;
  parallel_for(0, ceil_div(n, kSideOfBytes), most(1, 131072 / (kSideOfBytes * p.w.k)), [&](int64_t begin, int64_t end) {
    Scratch<float> sums(m * kSideOfBytes * 16), c(m * kSideOfBytes), w_scales(kSideOfBytes);
    for (int64_t j = 0; j < kSideOfBytes; ++j) w_scales[j] = 0.0f;
    for (int64_t j0 = begin * kSideOfBytes; j0 < least(n, end * kSideOfBytes); j0 += kSideOfBytes) {
      const int64_t rows = least(kSideOfBytes, n - j0);
      for (int64_t i = 0; i < m * kSideOfBytes; ++i)
        Products::start(totals != nullptr ? totals[i / kSideOfBytes] : 0).store(sums.data() + i * 16);
      add_block<Products>(p.w, j0, rows, x, m, sums.data(), [](int64_t count, const auto& f) {
        Products::kMostRows ? by_most_rows(count, f) : by_rows(count, f);
      });
      RowFactors::load_row(p.w.scales, p.w.scales_dtype, j0, rows, w_scales.data());
      for (int64_t r = 0; r < m; ++r) {
        Vec<float> places[kSideOfBytes];
        for (int64_t j = 0; j < kSideOfBytes; ++j)
          places[j] = Vec<float>::load(sums.data() + (r * kSideOfBytes + j) * 16);
        Vec<float> z = Products::whole(places) * Vec<float>::load(w_scales.data());
        if (scales != nullptr) z = z * Vec<float>::set1(scales[r]);
        z.store(c.data() + r * kSideOfBytes);
      }
      finish(p.out, c.data(), kSideOfBytes, 0, m, j0, rows);
    }
  });
}
#endif

// Rows of x [m][ld] as float32, or quantised to e4m3; zeros up to ld.
inline void float_rows(const Problem& p, float* rows, int64_t ld, float* scales) {
  const int64_t k = p.w.k;
  constexpr int64_t kLanes = Vec<float>::kLanes;
  dispatch_float(p.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t i = 0; i < p.m; ++i) {
      const T* x = static_cast<const T*>(p.x.data) + p.x.rows.at(i);
      float* row = rows + i * ld;
      for (int64_t l = k / kLanes * kLanes; l < ld; l += kLanes) Vec<float>::zero().store(row + l);
      if (p.w.dynamic()) {
        const RowScale scale = row_scale(x, p.x.col, k, 448.0f);
        scales[i] = scale.scale;
        quantize_row<true>(x, p.x.col, k, scale, [&](int64_t l, Vec<float> v, int64_t n) { v.store(row + l, n); });
        continue;
      }
      for (int64_t l = 0; l < k; l += kLanes)
        load_typed<false, float>(x + l * p.x.col, p.x.col, k - l).store(row + l, k - l);
    }
  });
}

inline void few_floats(const Problem& p) {
  const int64_t ld = most(1, ceil_div(p.w.k, kPiece)) * kPiece, m = p.m;
  Scratch<float> rows(m * ld), scales(m);
  float_rows(p, rows.data(), ld, scales.data());
  parallel_for(0, ceil_div(p.w.n, kColumns), most(1, 65536 / (kColumns * ld)), [&](int64_t begin, int64_t end) {
    Scratch<float> c(m * kColumns);
    RowFactors f(p.w);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t j0 = block * kColumns, cols = least(kColumns, p.w.n - j0);
      for (int64_t j = 0; j < cols; ++j) {
        f.load(p.w, j0 + j);
        by_rows(m, [&](auto count, int64_t r) {
          constexpr int kRows = decltype(count)::value;
          float sums[kRows];
          dot_floats<kRows>(p.w, p.w.row(j0 + j), f, rows.data() + r * ld, ld, sums);
          for (int i = 0; i < kRows; ++i)
            c[(r + i) * kColumns + j] = p.w.dynamic() ? sums[i] * f.scales[0] * scales[r + i] : sums[i];
        });
      }
      finish(p.out, c.data(), kColumns, 0, m, j0, cols);
    }
  });
}

#if ISOTILE_HAS_BF16_DOT
template <int kRows, bool kFourBits>
ISOTILE_INLINE void dot_pairs(const QuantizedWeight& w, const uint8_t* row, const RowFactors& f, const uint16_t* x,
                              int64_t ldx, float* sums) {
  switch (f.per_piece) {
    case 0: return dot_pairs<kRows, 0, kFourBits>(w, row, f, x, ldx, sums);
    case 1: return dot_pairs<kRows, 1, kFourBits>(w, row, f, x, ldx, sums);
    case 2: return dot_pairs<kRows, 2, kFourBits>(w, row, f, x, ldx, sums);
    default: return dot_pairs<kRows, 4, kFourBits>(w, row, f, x, ldx, sums);
  }
}

// Rows of bfloat16.
template <bool kFourBits>
inline void few_pairs(const Problem& p) {
  const int64_t ld = most(1, ceil_div(p.w.k, kPiece)) * kPiece, m = p.m;
  Scratch<uint16_t> rows(m * ld);
  for (int64_t i = 0; i < m; ++i) {
    const BFloat16* x = static_cast<const BFloat16*>(p.x.data) + p.x.rows.at(i);
    uint16_t* row = rows.data() + i * ld;
    if (p.x.col == 1) __builtin_memcpy(row, x, static_cast<size_t>(p.w.k) * sizeof(uint16_t));
    else
      for (int64_t l = 0; l < p.w.k; ++l) row[l] = x[l * p.x.col].bits;
    for (int64_t l = p.w.k; l < ld; ++l) row[l] = 0;
  }
  if (!kFourBits && serves_byte_blocks<PairProducts>(p.w, m)) {
    Scratch<uint16_t> pieces(m * ld);
    for (int64_t i = 0; i < m; ++i)
      for (int64_t l = 0; l < ld; l += kPiece)
        __builtin_memcpy(pieces.data() + l * m + i * kPiece, rows.data() + i * ld + l, kPiece * sizeof(uint16_t));
    return few_bytes<PairProducts>(p, pieces.data(), nullptr, nullptr);
  }
  parallel_for(0, ceil_div(p.w.n, kColumns), most(1, 131072 / (kColumns * ld)), [&](int64_t begin, int64_t end) {
    Scratch<float> c(m * kColumns);
    RowFactors f(p.w);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t j0 = block * kColumns, cols = least(kColumns, p.w.n - j0);
      for (int64_t j = 0; j < cols; ++j) {
        f.load(p.w, j0 + j);
        const uint8_t* row = p.w.row(j0 + j);
        by_rows<4>(m, [&](auto count, int64_t r) {
          constexpr int kRows = decltype(count)::value;
          float sums[kRows];
          dot_pairs<kRows, kFourBits>(p.w, row, f, rows.data() + r * ld, ld, sums);
          for (int i = 0; i < kRows; ++i) c[(r + i) * kColumns + j] = sums[i];
        });
      }
      finish(p.out, c.data(), kColumns, 0, m, j0, cols);
    }
  });
}
#endif

#if defined(__AVX2__)
// A vector's whole numbers as bytes or words.
ISOTILE_INLINE void store_integers(Vec<float> v, int8_t* to) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(v.v)));
#else
  const __m256i q = _mm256_cvtps_epi32(v.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm_packs_epi16(words, words));
#endif
}
ISOTILE_INLINE void store_integers(Vec<float> v, int16_t* to) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(v.v)));
#else
  const __m256i q = _mm256_cvtps_epi32(v.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(q), _mm256_extracti128_si256(q, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to), words);
#endif
}

// Rows [i0, i0 + count) of x as integers [count][ld], ld whole pieces, zeros up to there.
template <class Q>
inline void integer_rows(const Problem& p, int64_t i0, int64_t count, Q* rows, int64_t ld, float* scales) {
  const int64_t k = p.w.k;
  constexpr int64_t kLanes = Vec<float>::kLanes;
  dispatch_float(p.x.dtype, [&](auto type) {
    using T = typename decltype(type)::type;
    for (int64_t i = 0; i < count; ++i) {
      const T* x = static_cast<const T*>(p.x.data) + p.x.rows.at(i0 + i);
      Q* row = rows + i * ld;
      const RowScale scale = row_scale(x, p.x.col, k, 127.0f);
      scales[i] = scale.scale;
      quantize_row<false>(x, p.x.col, k, scale, [&](int64_t l, Vec<float> v, int64_t) { store_integers(v, row + l); });
      const int64_t whole = ceil_div(k, kLanes) * kLanes;
      __builtin_memset(row + whole, 0, static_cast<size_t>(ld - whole) * sizeof(Q));
    }
  });
}

template <int kRows, bool kFourBits, bool kOffsets>
ISOTILE_INLINE void dot_row(const QuantizedWeight& w, const uint8_t* row, const RowFactors& f, const IntegerRows& x,
                            float* sums) {
#if defined(__AVX512VNNI__)
  if (f.per_piece == 0) dot_integers<kRows, kFourBits, kOffsets, false>(w, row, f, x, sums);
  else dot_integers<kRows, kFourBits, kOffsets, true>(w, row, f, x, sums);
#else
  switch (f.per_piece) {
    case 0: dot_integers<kRows, kFourBits, kOffsets, 0>(w, row, f, x, sums); break;
    case 1: dot_integers<kRows, kFourBits, kOffsets, 1>(w, row, f, x, sums); break;
    case 2: dot_integers<kRows, kFourBits, kOffsets, 2>(w, row, f, x, sums); break;
    default: dot_integers<kRows, kFourBits, kOffsets, 4>(w, row, f, x, sums);
  }
#endif
}

// Rows of x as integers, a piece of each row [k / 128][m][128]; their sums and scales.
struct IntegerPieces {
  int64_t m, ld;
  Scratch<int8_t> q;
  Scratch<int32_t> totals;
  Scratch<float> scales;

  explicit IntegerPieces(const Problem& p)
      : m(p.m), ld(most(1, ceil_div(p.w.k, kPiece)) * kPiece), q(m * ld), totals(m), scales(m) {
    Scratch<int8_t> row(ld);
    for (int64_t i = 0; i < m; ++i) {
      integer_rows(p, i, 1, row.data(), ld, scales.data() + i);
      int32_t total = 0;
      for (int64_t l = 0; l < ld; ++l) total += row[l];
      totals[i] = total;
      for (int64_t l = 0; l < ld; l += kPiece) __builtin_memcpy(q.data() + l * m + i * kPiece, row.data() + l, kPiece);
    }
  }
};

template <bool kFourBits, bool kOffsets>
inline void few_integers(const Problem& p) {
  const IntegerPieces pieces(p);
  const int64_t m = p.m, ld = pieces.ld;
  Scratch<int32_t> part_sums(sums_of(p.w, m * ld));
  if (p.w.groups > 1) sum_parts(p.w, pieces.q.data(), m * ld, part_sums.data());
  parallel_for(0, ceil_div(p.w.n, kColumns), most(1, 131072 / (kColumns * ld)), [&](int64_t begin, int64_t end) {
    Scratch<float> c(m * kColumns);
    RowFactors f(p.w);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t j0 = block * kColumns, cols = least(kColumns, p.w.n - j0);
      for (int64_t j = 0; j < cols; ++j) {
        f.load(p.w, j0 + j);
        by_rows<kRowsOfIntegers>(m, [&](auto count, int64_t r) {
          constexpr int kRows = decltype(count)::value;
          float sums[kRows];
          const IntegerRows x{pieces.q.data() + r * kPiece, pieces.totals.data() + r,
                              part_sums.data() + r * sums_of(p.w, kPiece),
                              m * kPiece, sums_of(p.w, m * kPiece), {r == 0, r == 4 || m <= 4}};
          dot_row<kRows, kFourBits, kOffsets>(p.w, p.w.row(j0 + j), f, x, sums);
          for (int i = 0; i < kRows; ++i) c[(r + i) * kColumns + j] = sums[i] * pieces.scales[r + i];
        });
      }
      finish(p.out, c.data(), kColumns, 0, m, j0, cols);
    }
  });
}

// --- many rows -------------------------------------------------------------------------------------------------------

#if defined(__AVX512VNNI__) && !ISOTILE_HAS_TILES
inline void many_integers(const Problem& p) {
  // Rows a power of two apart compete for the same cache sets.
  const int64_t ld = ceil_div(p.w.k, kPiece) * kPiece + 64, m = p.m, panels = ceil_div(p.w.n, kPanel);
  Scratch<int8_t> rows(m * ld);
  Scratch<int32_t> sums(m * padded_groups(p.w));
  Scratch<float> scales(m);
  parallel_for(0, m, most(1, 32768 / ld), [&](int64_t begin, int64_t end) {
    integer_rows(p, begin, end - begin, rows.data() + begin * ld, ld, scales.data() + begin);
    for (int64_t i = begin; i < end; ++i) sum_groups(p.w, rows.data() + i * ld, m, sums.data() + i);
  });
  const int64_t per_task = most(ceil_div(1 << 20, m * kPanel * ld), least(8, panels / (4 * num_threads())));
  parallel_dynamic(ceil_div(panels, per_task), [&](int64_t task) {
    integer_panels(p.w, p.out, {m, rows.data(), ld, sums.data(), scales.data()}, task * per_task,
                   least(panels, (task + 1) * per_task));
  });
}
#else
template <class Q>
inline void many_integers(const Problem& p) {
  const int64_t padded = most(1, ceil_div(p.w.k, kPiece)) * kPiece, m = p.m, m_padded = ceil_div(m, kSide) * kSide;
  constexpr int64_t kPer = 4 / sizeof(Q);  // of k in a lane
  Scratch<float> tiles_of_x(m_padded * padded / kPer), scales(m_padded);
  const bool summed = p.w.has_offsets() || zeros_later(p.w);
  Scratch<int32_t> row_sums(summed ? p.w.groups * m_padded : 0);
  parallel_for(0, m_padded / kLanesOfX, 1, [&](int64_t begin, int64_t end) {
    Scratch<Q> rows(kLanesOfX * padded);
    for (int64_t block = begin; block < end; ++block) {
      const int64_t i0 = block * kLanesOfX, count = most(0, least(kLanesOfX, m - i0));
      __builtin_memset(rows.data() + count * padded, 0, static_cast<size_t>((kLanesOfX - count) * padded) * sizeof(Q));
      for (int64_t i = count; i < kLanesOfX; ++i) scales[i0 + i] = 0.0f;
      if (count > 0) integer_rows(p, i0, count, rows.data(), padded, scales.data() + i0);
      for (int64_t i = 0; i < kLanesOfX && summed; ++i) {
        for (int64_t g = 0; g < p.w.groups; ++g) {
          const int64_t k0 = g * p.w.group, length = least(p.w.group, p.w.k - k0);
          int32_t sum = 0;
          for (int64_t l = 0; l < length; ++l) sum += rows[i * padded + k0 + l];
          row_sums[g * m_padded + i0 + i] = sum;
        }
      }
      float* tiles = tiles_of_x.data() + i0 * padded / kPer;
      for (int64_t k0 = 0; k0 < padded; k0 += kLanesOfX * kPer) {
        Vec<float> words[kLanesOfX];
#pragma GCC unroll 16
        for (int i = 0; i < kLanesOfX; ++i)
          words[i] = Vec<float>::load(reinterpret_cast<const float*>(rows.data() + i * padded + k0));
        transpose_square(words);
#pragma GCC unroll 16
        for (int i = 0; i < kLanesOfX; ++i) words[i].store(tiles + (k0 / kPer + i) * kLanesOfX);
      }
    }
  });
  const auto* x = reinterpret_cast<const uint8_t*>(tiles_of_x.data());
  const int64_t per_task = p.w.n >= kRowsOfWeight * 2 * num_threads() ? kRowsOfWeight : kSide;
  parallel_dynamic(ceil_div(p.w.n, per_task), [&](int64_t task) {
    const int64_t i0 = task * per_task;
    integer_blocks<Q>(p.w, p.out, m, i0, least(per_task, p.w.n - i0), x, row_sums.data(), scales.data());
  });
}
#endif
#endif

// Rows of the weight in T [rows][ld], ld whole pieces; e4m3 numbers without their scale.
inline void dequantize_rows(const QuantizedWeight& w, int64_t j, int64_t rows, float* out, int64_t ld) {
  RowFactors f(w);
  for (int64_t i = 0; i < rows; ++i) {
    if (w.scheme != Scheme::kFp8) f.load(w, j + i);
    for (int64_t k0 = 0; k0 < w.k; k0 += kAtOnce) {
      Vec<float> v[kVectorsAtOnce];
      numbers_of_row(w, w.row(j + i), f, k0 / kAtOnce, v);
#pragma GCC unroll 8
      for (int u = 0; u < kVectorsAtOnce; ++u) v[u].store(out + i * ld + k0 + u * Vec<float>::kLanes);
    }
  }
}

#if ISOTILE_HAS_BF16_DOT
// The weight as a product's b that is made where it is used: its columns are rows `first` ... of the weight.
struct MadeColumns {
  const QuantizedWeight& w;
  int64_t first;
};
inline void make_columns(const void* b, int64_t j, int64_t columns, int64_t k0, int64_t kc, BFloat16* out, int64_t ld) {
  const auto& made = *static_cast<const MadeColumns*>(b);
  bfloat16_rows(made.w, made.first + j, columns, k0, kc, out, ld, true);
}
#endif

// Weights dequantised to T a slice of columns at a time, then multiplied. Where x is dynamic (fp8) all scales come last,
// so that e4m3 numbers stay exact in T.
template <class T>
inline void many_floats(const Problem& p) {
  const int64_t k = p.w.k, m = p.m, ld = most(1, ceil_div(k, kBlock4)) * kBlock4;
  const QuantizedWeight& w = p.w;
  const bool dynamic = w.dynamic();
  constexpr bool kMade = ISOTILE_HAS_BF16_DOT && sizeof(T) == 2;  // 64 rows of it at a time, in L1, for each thread
  const int64_t slice = kMade && !dynamic ? w.n : least(w.n, most(64, (int64_t{1} << 21) / ld / 64 * 64));
  Scratch<T> weight(kMade ? 0 : slice * ld), rows(dynamic ? m * ld : 0);
  Scratch<float> scales(dynamic ? m : 0), sums(dynamic ? m * slice + 16 : 0);  // finish() takes whole vectors
  if (dynamic) {
    dispatch_float(p.x.dtype, [&](auto type) {
      using X = typename decltype(type)::type;
      parallel_for(0, m, most(1, 16384 / ld), [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          const X* x = static_cast<const X*>(p.x.data) + p.x.rows.at(i);
          const RowScale scale = row_scale(x, p.x.col, k, 448.0f);
          scales[i] = scale.scale;
          T* row = rows.data() + i * ld;
          quantize_row<true>(x, p.x.col, k, scale, [&](int64_t l, Vec<float> v, int64_t n) { v.store(row + l, n); });
        }
      });
    });
  }
  for (int64_t j0 = 0; j0 < p.w.n; j0 += slice) {
    const int64_t cols = least(slice, p.w.n - j0);
    if constexpr (!kMade) {
      parallel_for(0, cols, most(1, 32768 / ld), [&](int64_t begin, int64_t end) {
        dequantize_rows(w, j0 + begin, end - begin, weight.data() + begin * ld, ld);
      });
    }
    OneGemm list;
    Gemm& g = list.first;
    g.m = m;
    g.n = cols;
    g.k = k;
    g.b = weight.data();
    g.b_k = 1;
    g.b_n = ld;
#if ISOTILE_HAS_BF16_DOT
    const MadeColumns made{w, j0};
    if (kMade) {
      g.b = &made;
      g.make_b = make_columns;
    }
#endif
    DType type = p.x.dtype;
    if (dynamic) {
      type = DTypeOf<T>::value;
      g.a = Matrix::of(rows.data(), type, m, ld, 1);
      g.out.y = Matrix::of(sums.data(), DType::kFloat32, m, slice, 1);
    } else {
      g.a = p.x;
      g.out = p.out;
      g.out.y.offset += j0 * g.out.y.col;
      g.out.preactivation.offset += j0 * g.out.preactivation.col;
      g.out.residual.offset += j0 * g.out.residual.col;
      if (g.out.bias != nullptr)
        g.out.bias = static_cast<const char*>(g.out.bias) + j0 * g.out.bias_stride * item_size(g.out.bias_dtype);
    }
    run_gemms(type, DTypeOf<T>::value, list);
    if (!dynamic) continue;
    parallel_for(0, m, most(1, 16384 / cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        float* row = sums.data() + i * slice;
        for (int64_t j = 0; j < cols; ++j) row[j] = row[j] * p.w.scale(j0 + j, 0) * scales[i];
        finish(p.out, row, slice, i, 1, j0, cols);
      }
    });
  }
}

// Whether fast ways that sum in an order that depends on the number of rows serve the call.
inline bool served_fast(const Problem& p, bool integers) {
  if (p.w.k == 0) return false;
#if defined(__AVX2__)
  if (integers) {
    if (p.m > few_integers_at_most(p)) {
#if defined(__AVX512VNNI__) && !ISOTILE_HAS_TILES
      many_integers(p);
#elif defined(__AVX512VNNI__)
      // A signed byte holds a four-bit number less its zero point.
      if (p.w.four_bits() && !p.w.has_offsets() && p.w.largest_zero() > 128) return false;
      many_integers<int8_t>(p);
#else
      p.w.four_bits() ? many_integers<int8_t>(p) : many_integers<int16_t>(p);
#endif
#if defined(__AVX512VNNI__)
    } else if (serves_byte_blocks<ByteProducts>(p.w, p.m)) {
      const IntegerPieces x(p);
      few_bytes<ByteProducts>(p, x.q.data(), x.totals.data(), x.scales.data());
#endif
    } else if (!p.w.four_bits()) few_integers<false, false>(p);
    else if (p.w.has_offsets()) few_integers<true, true>(p);
    else few_integers<true, false>(p);
    return true;
  }
#endif
  if (integers) return false;
#if ISOTILE_HAS_BF16_DOT
  if (p.m <= few_floats_at_most(p) && p.x.dtype == DType::kBFloat16 && serves_pairs(p.w)) {
    p.w.four_bits() ? few_pairs<true>(p) : few_pairs<false>(p);
    return true;
  }
#endif
  if (p.m <= few_floats_at_most(p)) {
    few_floats(p);
    return true;
  }
#if ISOTILE_HAS_BF16_DOT
  if (p.w.scheme == Scheme::kFp8 || p.x.dtype == DType::kBFloat16) {
    many_floats<BFloat16>(p);
    return true;
  }
#endif
  many_floats<float>(p);
  return true;
}

}  // namespace

void quantized_linear(const TensorView* t, const double* s) {
  Problem p;
  p.w = weight_of(t + 1, row_length(t[0]), s);
  p.x = Matrix::rows_of(t[0]);
  p.m = row_count(t[0]);
  if (p.m == 0 || p.w.n == 0) return;
  const TensorView &bias = t[5], &residual = t[6], &y = t[7], &preactivation = t[8];
  p.out.y = Matrix::rows_of(y);
  p.out.preactivation = Matrix::rows_of(preactivation);
  p.out.residual = Matrix::rows_of(residual);
  p.out.set_bias(bias);
  p.out.activation = static_cast<Activation>(static_cast<int>(s[2]));
  const bool integers = p.w.integer() && p.w.dynamic(), wide = p.x.dtype == DType::kFloat64;
  const bool batch_invariant = s[3] != 0;
  if (!wide && !batch_invariant && served_fast(p, integers)) return;
  if (integers) wide ? any_integer<double>(p) : any_integer<float>(p);
  else wide ? any_float<double>(p) : any_float<float>(p);
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
