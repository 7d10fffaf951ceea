// grad_a [total, k]: the rows of grad [total, n] in group g times b[g]^T; rows of no group get 0.
// grad_b [groups, k, n]: a[group g]^T @ grad[group g]; 0 for an empty group.
//
// Both are lists of problems for _gemm_run.h, transposed by strides alone. grad may have another dtype (out_dtype).
#include "base/scratch.h"
#include "ops/_gemm.h"
#include "ops/_gemm_groups.h"

namespace isotile {
namespace ISOTILE_ISA {

namespace {

struct GradA final : GemmList {
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

struct GradB final : GemmList {
  int64_t groups, group_stride;
  const int64_t* starts;

  int64_t count() const override { return groups; }
  int64_t m(int64_t) const override { return first.m; }
  int64_t k(int64_t i) const override { return starts[i + 1] - starts[i]; }
  void place(int64_t i, Gemm* g) const override {
    g->k = k(i);
    g->a.offset = starts[i] * g->a.col;
    g->b_offset = starts[i] * g->b_k;
    g->out.y.offset = i * group_stride;
  }
};

}  // namespace

void grouped_matmul_backward(const TensorView* t, const double*) {
  const TensorView &grad = t[0], &a = t[1], &b = t[2], &offsets = t[3], &grad_a = t[4], &grad_b = t[5];
  const int64_t groups = b.size[0], total = a.size[0], k = b.size[1], n = b.size[2];
  Scratch<int64_t> starts(groups + 2);
  group_starts(offsets, total, starts.data());
  if (grad_a.present()) {
    GradA source;
    source.groups = groups;
    source.group_stride = b.stride[0];
    source.starts = starts.data();
    Gemm& g = source.first;
    g.n = k;
    g.k = n;
    g.a = Matrix::rows_of(grad);
    g.b = b.data;
    g.b_k = b.stride[2];
    g.b_n = b.stride[1];
    g.out.y = Matrix::rows_of(grad_a);
    run_gemms(grad.dtype, b.dtype, source);
  }
  if (grad_b.present()) {
    GradB source;
    source.groups = groups;
    source.group_stride = grad_b.stride[0];
    source.starts = starts.data();
    Gemm& g = source.first;
    g.m = k;
    g.n = n;
    g.a = Matrix::of(a.data, a.dtype, k, a.stride[1], a.stride[0]);
    g.b = grad.data;
    g.b_k = grad.stride[0];
    g.b_n = grad.stride[1];
    g.out.y = Matrix::of(grad_b.data, grad_b.dtype, k, grad_b.stride[1], grad_b.stride[2]);
    run_gemms(a.dtype, grad.dtype, source);
  }
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
