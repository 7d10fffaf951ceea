// y [total, n]: the rows of a [total, k] in group g times b[g] [k, n]; rows of no group are 0.
//
// Every group is one problem of the list for _gemm_run.h; the rows of no group are one more, with k = 0.
#include "base/scratch.h"
#include "ops/_gemm.h"
#include "ops/_gemm_groups.h"

namespace isotile {
namespace ISOTILE_ISA {

namespace {

struct Grouped final : GemmList {
  int64_t groups, group_stride;
  const int64_t* starts;

  int64_t count() const override { return groups + 1; }
  int64_t m(int64_t i) const override { return starts[i + 1] - starts[i]; }
  int64_t k(int64_t i) const override { return i < groups ? first.k : 0; }
  void place(int64_t i, Gemm* g) const override {
    g->m = m(i);
    g->k = k(i);
    g->a.offset = g->a.rows.at(starts[i]);
    g->out.y.offset = g->out.y.rows.at(starts[i]);
    if (i < groups) g->b_offset = i * group_stride;
  }
};

}  // namespace

void grouped_matmul(const TensorView* t, const double*) {
  const TensorView &a = t[0], &b = t[1], &offsets = t[2], &y = t[3];
  Grouped source;
  source.groups = b.size[0];
  source.group_stride = b.stride[0];
  Scratch<int64_t> starts(source.groups + 2);
  group_starts(offsets, a.size[0], starts.data());
  source.starts = starts.data();
  Gemm& g = source.first;
  g.k = b.size[1];
  g.n = b.size[2];
  g.a = Matrix::rows_of(a);
  g.b = b.data;
  g.b_k = b.stride[1];
  g.b_n = b.stride[2];
  g.out.y = Matrix::rows_of(y);
  run_gemms(a.dtype, b.dtype, source);
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
