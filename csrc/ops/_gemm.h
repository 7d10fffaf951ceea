// Lists of matrix products for matmul and its relatives. The work itself is compiled once for each instruction set,
// in matmul.cc; how it goes is told in _gemm_run.h.
#pragma once
#include "base/dtype.h"
#include "base/tensor_view.h"
#include "ops/_gemm_epilogue.h"

namespace isotile {
namespace ISOTILE_ISA {

// For products of bfloat16 on matrix tiles or with vdpbf16ps: makes elements [k0, k0 + count) of rows [j, j + rows) of a
// matrix whose rows are b's columns (or rows). Each row lies `ld` elements after the last and is filled up with zeros to
// a multiple of 128; k0 is such a multiple, count at most 256.
using MakeB = void (*)(const void* b, int64_t j, int64_t rows, int64_t k0, int64_t count, BFloat16* out, int64_t ld);

// A weight that stays may lie in panels of so many columns, the last filled up with zeros: [panel][k][column]. Pairs:
// [panel][k / 2][column][2], an odd k filled up likewise.
constexpr int64_t kPanelColumns = 64;

// y [m, n] = epilogue(a [m, k] @ b [k, n]). Strides in elements.
struct Gemm {
  int64_t m = 0, n = 0, k = 0;
  Matrix a;  // rows m, columns k
  const void* b = nullptr;
  int64_t b_offset = 0, b_k = 0, b_n = 0;
  int64_t b_panel = 0;        // where b lies in panels: from one to the next; b_n is 1
  bool b_pairs = false;       // of pairs, for a of bfloat16: b's elements are pairs, and b_k is half of the columns
  MakeB make_b = nullptr;     // where b is not in memory
  bool made_by_rows = false;  // b's rows are made, not its columns: on matrix tiles only
  Epilogue out;
};

// Products that differ in m or k and in their places, but in nothing else.
struct GemmList {
  Gemm first;

  virtual int64_t count() const = 0;
  virtual int64_t m(int64_t i) const = 0;
  virtual int64_t k(int64_t i) const = 0;
  virtual void place(int64_t i, Gemm* g) const = 0;  // sets m, k and offsets of a copy of `first`

 protected:
  ~GemmList() = default;
};

// A list of one product: `first`.
struct OneGemm final : GemmList {
  int64_t count() const override { return 1; }
  int64_t m(int64_t) const override { return first.m; }
  int64_t k(int64_t) const override { return first.k; }
  void place(int64_t, Gemm*) const override {}
};

// One thread's way through the list of all problems' parts, in order and only forward.
struct Cursor {
  int64_t problem = 0;
  int64_t first = 0;   // the problem's first part in the list
  int64_t packed = 0;  // where its packed operand starts
};

// Forward to `part`. parts(i), packed(i): how many parts problem i has, and how long its packed operand is.
template <class Parts, class Packed>
inline void advance(Cursor* cursor, int64_t part, const Parts& parts, const Packed& packed) {
  for (;;) {
    const int64_t count = parts(cursor->problem);
    if (part < cursor->first + count) return;
    cursor->first += count;
    cursor->packed += packed(cursor->problem);
    ++cursor->problem;
  }
}

// a and b are float tensors of these dtypes; if they differ, the wider's arithmetic is used (at least float32).
void run_gemms(DType a, DType b, const GemmList& list);

}  // namespace ISOTILE_ISA
}  // namespace isotile
