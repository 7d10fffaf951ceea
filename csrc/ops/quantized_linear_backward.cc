// grad_x [m, k] = grad [m, n] @ weight [n, k], the weight quantised.
//
// A task owns a strip of columns. The weight is read once: a few of its rows at a time are dequantised, one or two rows
// of grad add them up as they come out of registers; more rows go through a block in L1 and the register tile of
// `matmul`. Each element adds its n products one after another, whatever m and the number of threads. More bfloat16 rows
// multiply as `matmul` does: matrix tiles turn the weight into bfloat16 where they pack it, other bfloat16 dot products
// want a slice of its columns in memory.
#include "base/parallel.h"
#include "base/scratch.h"
#include "ops/_gemm.h"
#include "ops/_gemm_pack.h"
#include "ops/_gemm_tile.h"
#include "ops/_quantized_bfloat16.h"
#include "ops/_quantized_few_rows.h"
#include "ops/_quantized_format.h"
#include "ops/_rows.h"

namespace isotile {
namespace ISOTILE_ISA {

namespace {

struct Problem {
  QuantizedWeight w;
  Matrix grad;
  int64_t m;
  Epilogue out;
};

constexpr int64_t kPieceColumns = kBlock4;  // what a strip is made of: whole groups, whole runs of nibbles
constexpr int64_t kStripPieces = 4;
constexpr int64_t kFew = ISOTILE_HAS_TILES ? 2 : 16;  // rows of grad for which float32 products cost less

// --- any rows --------------------------------------------------------------------------------------------------------

// A panel's columns: as many as the register tile takes, and a part of a piece.
template <class Kind>
constexpr int64_t kWidth = kRegisterVecs * Kind::kLanes;

// One row of the weight in T, piece by piece.
template <class T>
struct RowReader {
  const QuantizedWeight& w;
  int64_t j = 0;

  explicit RowReader(const QuantizedWeight& weight) : w(weight) {}
  void row(int64_t index) { j = index; }
  void piece(int64_t piece, T* out) const {
    const int64_t k0 = piece * kPieceColumns, cols = least(kPieceColumns, w.k - k0);
    dequantize_part(w, j, k0, k0 + cols, out);
    for (int64_t i = cols; i < kPieceColumns; ++i) out[i] = 0;
  }
};

template <>
struct RowReader<float> {
  const QuantizedWeight& w;
  RowFactors f;
  const uint8_t* bytes = nullptr;

  explicit RowReader(const QuantizedWeight& weight) : w(weight), f(weight) {}
  ISOTILE_INLINE void row(int64_t index) {
    f.load(w, index);
    bytes = w.row(index);
  }
  // Elements kAtOnce * index ...
  ISOTILE_INLINE void numbers(int64_t index, Vec<float> (&out)[kVectorsAtOnce]) const {
    numbers_of_row(w, bytes, f, index, out);
    if (w.scheme != Scheme::kFp8) return;
#pragma GCC unroll 8
    for (int v = 0; v < kVectorsAtOnce; ++v) out[v] = out[v] * Vec<float>::set1(f.scales[0]);
  }
  ISOTILE_INLINE void piece(int64_t piece, float* out) const {
    for (int64_t i = 0; i < kPiece / kAtOnce; ++i) {
      Vec<float> v[kVectorsAtOnce];
      if (piece * kPiece + i * kAtOnce >= w.k) {
        for (auto& some : v) some = Vec<float>::zero();
      } else {
        numbers(piece * kPiece / kAtOnce + i, v);
      }
#pragma GCC unroll 8
      for (int u = 0; u < kVectorsAtOnce; ++u) v[u].store(out + i * kAtOnce + u * Vec<float>::kLanes);
    }
  }
};

// Rows [j0, j0 + rows) of the weight, pieces [piece0, piece1) -> panels [columns / width][rows][width].
template <class Kind>
inline void dequantize_block(RowReader<typename Kind::Packed>* reader, int64_t j0, int64_t rows, int64_t piece0,
                             int64_t piece1, typename Kind::Packed* out) {
  using T = typename Kind::Packed;
  constexpr int64_t kPanel = kWidth<Kind>;
  static_assert(kPieceColumns % kPanel == 0, "a piece is whole panels");
  for (int64_t j = 0; j < rows; ++j) {
    reader->row(j0 + j);
    for (int64_t piece = piece0; piece < piece1; ++piece) {
      T row[kPieceColumns];
      reader->piece(piece, row);
      for (int64_t i = 0; i < kPieceColumns; i += kPanel)
        __builtin_memcpy(out + ((piece - piece0) * kPieceColumns + i) * rows + j * kPanel, row + i, kPanel * sizeof(T));
    }
  }
}

template <class T>
inline void by_blocks(const Problem& p) {
  using Kind = FloatKind<T>;
  constexpr int64_t kRows = 128;  // of the weight, dequantised together: 256 KB of float32 in L2
  constexpr int64_t kTaskRows = 504;
  const int64_t m = p.m, n = p.w.n, k = p.w.k, panels = panel_count(m);
  const auto first_row = [&](int64_t panel) { return panel_row(m, panel); };
  const int64_t grad_row = RowsOfA<Kind>::row_stride(n);
  Scratch<T> grad(m * grad_row);
  dispatch_float(p.grad.dtype, [&](auto type) {
    using G = typename decltype(type)::type;
    parallel_for(0, m, most(kTransposed, 65536 / most(1, n)), [&](int64_t begin, int64_t end) {
      pack_rows<Kind>(grad.data() + begin * grad_row, static_cast<const G*>(p.grad.data), p.grad.rows, begin, end,
                      p.grad.col, n);
    });
  });
  const int64_t pieces = ceil_div(k, kPieceColumns), threads = m * n * k <= (1 << 17) ? 1 : num_threads();
  const int64_t strip = most(1, least(kStripPieces, pieces / (2 * threads))), strips = ceil_div(pieces, strip);
  const int64_t most_panels = kTaskRows / kTileRows;
  const int64_t wanted = strips < 2 * threads && m >= 4 * kRows ? ceil_div(2 * threads, strips) : 1;
  const int64_t blocks = most(ceil_div(panels, most_panels), least(wanted, panels));
  const auto work = [&](int64_t task) {
    const int64_t piece0 = task % strips * strip, piece1 = least(pieces, piece0 + strip);
    const int64_t panel0 = task / strips * panels / blocks, panel1 = (task / strips + 1) * panels / blocks;
    const int64_t row0 = first_row(panel0), rows = first_row(panel1) - row0;
    const int64_t k0 = piece0 * kPieceColumns, columns = least(k, piece1 * kPieceColumns) - k0;
    const int64_t ldc = (piece1 - piece0) * kPieceColumns;
    Scratch<T> c(rows * ldc), block(kRows * ldc);
    RowReader<T> reader(p.w);
    Prefetch prefetch;
    if (n == 0)
      for (int64_t i = 0; i < rows * ldc; ++i) c[i] = 0;
    for (int64_t j0 = 0; j0 < n; j0 += kRows) {
      const int64_t steps = least(kRows, n - j0);
      dequantize_block<Kind>(&reader, j0, steps, piece0, piece1, block.data());
      for (int64_t i = 0; i < columns; i += kWidth<Kind>) {
        for (int64_t panel = panel0; panel < panel1; ++panel) {
          const int64_t row = first_row(panel), count = first_row(panel + 1) - row;
          const T* a[kTileRows];
          for (int64_t r = 0; r < count; ++r) a[r] = grad.data() + (row + r) * grad_row + j0;
          tile_function<Kind>(count, kWidth<Kind>)(steps, a, block.data() + i * steps, kWidth<Kind>,
                                                   c.data() + (row - row0) * ldc + i, ldc,
                                                   j0 == 0 ? Into::kSet : Into::kContinue, &prefetch);
        }
      }
    }
    finish(p.out, c.data(), ldc, row0, rows, k0, columns);
  };
  if (threads == 1) {
    for (int64_t task = 0; task < strips * blocks; ++task) work(task);
  } else {
    parallel_dynamic(strips * blocks, work);
  }
}

// --- one or two rows -------------------------------------------------------------------------------------------------

template <int kRows>
inline void by_rows_of_weight(const Problem& p) {
  using V = Vec<float>;
  constexpr int64_t kTogether = 4;  // rows of the weight between a load and a store of the sums
  const int64_t n = p.w.n, k = p.w.k, pieces = ceil_div(k, kPiece);
  Scratch<float> grad(kRows * n);
  dispatch_float(p.grad.dtype, [&](auto type) {
    using G = typename decltype(type)::type;
    for (int64_t i = 0; i < kRows; ++i) {
      const G* from = static_cast<const G*>(p.grad.data) + p.grad.rows.at(i);
      for (int64_t j = 0; j < n; j += V::kLanes)
        load_typed<false, float>(from + j * p.grad.col, p.grad.col, n - j).store(grad.data() + i * n + j, n - j);
    }
  });
  parallel_for(0, pieces, most(1, 65536 / (kPiece * n)), [&](int64_t begin, int64_t end) {
    const int64_t ld = (end - begin) * kPiece;
    Scratch<float> sums(kRows * ld);
    for (int64_t i = 0; i < kRows * ld; i += V::kLanes) V::zero().store(sums.data() + i);
    RowReader<float> readers[kTogether] = {RowReader<float>(p.w), RowReader<float>(p.w), RowReader<float>(p.w),
                                           RowReader<float>(p.w)};
    for (int64_t j0 = 0; j0 < n; j0 += kTogether) {
      const int64_t together = least(kTogether, n - j0);
      for (int64_t j = 0; j < together; ++j) readers[j].row(j0 + j);
      for (int64_t i0 = begin * kPiece; i0 < least(end * kPiece, k); i0 += kAtOnce) {
        float* at = sums.data() + i0 - begin * kPiece;
        V acc[kRows][kVectorsAtOnce];
#pragma GCC unroll 2
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
          for (int v = 0; v < kVectorsAtOnce; ++v) acc[i][v] = V::load(at + i * ld + v * V::kLanes);
        for (int64_t j = 0; j < together; ++j) {
          V weights[kVectorsAtOnce];
          readers[j].numbers(i0 / kAtOnce, weights);
#pragma GCC unroll 2
          for (int i = 0; i < kRows; ++i) {
            const V g = V::set1(grad[i * n + j0 + j]);
#pragma GCC unroll 8
            for (int v = 0; v < kVectorsAtOnce; ++v) acc[i][v] = fma(g, weights[v], acc[i][v]);
          }
        }
#pragma GCC unroll 2
        for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 8
          for (int v = 0; v < kVectorsAtOnce; ++v) acc[i][v].store(at + i * ld + v * V::kLanes);
      }
    }
    const int64_t k0 = begin * kPiece;
    finish(p.out, sums.data(), ld, 0, kRows, k0, least(k, end * kPiece) - k0);
  });
}

// --- bfloat16 --------------------------------------------------------------------------------------------------------

#if ISOTILE_HAS_BF16_DOT
inline void run(const Problem& p, Gemm* g, int64_t k0, int64_t columns) {
  OneGemm list;
  g->m = p.m;
  g->n = columns;
  g->k = p.w.n;
  g->a = p.grad;
  g->out = p.out;
  g->out.y.offset += k0 * g->out.y.col;
  list.first = *g;
  run_gemms(DType::kBFloat16, DType::kBFloat16, list);
}

#if ISOTILE_HAS_TILES
inline void by_products(const Problem& p) {
  Gemm g;
  g.b = &p.w;
  g.made_by_rows = true;
  g.make_b = [](const void* b, int64_t j, int64_t rows, int64_t k0, int64_t count, BFloat16* out, int64_t ld) {
    bfloat16_rows(*static_cast<const QuantizedWeight*>(b), j, rows, k0, count, out, ld, false);
  };
  run(p, &g, 0, p.w.k);
}
#else
inline void by_products(const Problem& p) {
  const int64_t n = p.w.n, k = p.w.k;
  const int64_t slice = least(ceil_div(k, kPiece), most(1, (int64_t{1} << 22) / n / kPiece)) * kPiece;
  Scratch<BFloat16> weight(n * slice);
  for (int64_t k0 = 0; k0 < k; k0 += slice) {
    const int64_t columns = least(slice, k - k0);
    parallel_for(0, n, most(1, 32768 / slice), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t i = 0; i < columns; i += kMadeElements)
          bfloat16_rows(p.w, j, 1, k0 + i, least(kMadeElements, columns - i), weight.data() + j * slice + i, slice, false);
    });
    Gemm g;
    g.b = weight.data();
    g.b_k = slice;
    g.b_n = 1;
    run(p, &g, k0, columns);
  }
}
#endif
#endif

}  // namespace

void quantized_linear_backward(const TensorView* t, const double* s) {
  const TensorView &grad = t[0], &grad_x = t[5];
  Problem p;
  p.m = row_count(grad_x);
  p.w = weight_of(t + 1, static_cast<int64_t>(s[2]), s);
  if (p.m == 0 || p.w.k == 0) return;
  p.grad = Matrix::rows_of(grad);
  p.out.y = Matrix::rows_of(grad_x);
  const bool batch_invariant = s[3] != 0;
  if (grad.dtype == DType::kFloat64) return by_blocks<double>(p);
  if (!batch_invariant && p.w.n > 0) {
    if (p.m == 1) return by_rows_of_weight<1>(p);
    if (p.m == 2) return by_rows_of_weight<2>(p);
#if ISOTILE_HAS_BF16_DOT
    if (grad.dtype == DType::kBFloat16 && p.m > kFew) return by_products(p);
#endif
  }
  by_blocks<float>(p);
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
