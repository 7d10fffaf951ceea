// grad_a [total, k]: the rows of grad [total, n] in group g times b[g]^T; rows of no group get 0.
// grad_b [groups, k, n]: a[group g]^T @ grad[group g]; 0 for an empty group.
//
// Both are lists of problems for _gemm.h, transposed by strides alone.
#include "ops/_gemm.h"
#include "ops/_gemm_groups.h"

namespace isotile {
namespace ISOTILE_ISA {

namespace {

struct GradA {
  Gemm first;
  int64_t groups, group_stride;
  const int64_t* starts;

  int64_t count() const { return groups + 1; }
  int64_t m(int64_t i) const { return starts[i + 1] - starts[i]; }
  int64_t n() const { return first.n; }
  int64_t k(int64_t i) const { return i < groups ? first.k : 0; }
  Gemm problem(int64_t i) const {
    Gemm g = first;
    g.m = m(i);
    g.k = k(i);
    g.a.offset = g.a.rows.at(starts[i]);
    g.out.y.offset = g.out.y.rows.at(starts[i]);
    if (i < groups) g.b_offset = i * group_stride;
    return g;
  }
};

struct GradB {
  Gemm first;
  int64_t groups, group_stride;
  const int64_t* starts;

  int64_t count() const { return groups; }
  int64_t m(int64_t) const { return first.m; }
  int64_t n() const { return first.n; }
  int64_t k(int64_t i) const { return starts[i + 1] - starts[i]; }
  Gemm problem(int64_t i) const {
    Gemm g = first;
    g.k = k(i);
    g.a.offset = starts[i] * g.a.col;
    g.b_offset = starts[i] * g.b_k;
    g.out.y.offset = i * group_stride;
    return g;
  }
};

// The gradient may have another dtype than the operands (out_dtype).
template <class Source>
void run(DType a, DType b, const Source& source) {
  if (a == b) return run_gemm(a, source);
  dispatch_float(a, [&](auto type_a) {
    dispatch_float(b, [&](auto type_b) {
      using A = typename decltype(type_a)::type;
      using B = typename decltype(type_b)::type;
      if constexpr (sizeof(A) == 8 || sizeof(B) == 8) run_gemm<FloatKind<double>, A, B>(source);
      else run_gemm<FloatKind<float>, A, B>(source);
    });
  });
}

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
    run(grad.dtype, b.dtype, source);
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
    run(a.dtype, grad.dtype, source);
  }
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
