// y [B.., m, n] = activation(a [B.., m, k] @ b [B.., k, n] + bias [n]) + residual [B.., m, n], and the preactivation.
//
// Loop dims over which b is broadcast become more rows of one product, so b is packed once for all of them.
// Accumulation order and its independence of the batch: see _gemm_run.h.
#include "ops/_gemm.h"
#include "ops/_gemm_run.h"

namespace isotile {
namespace ISOTILE_ISA {

namespace {

struct Batched final : GemmList {
  int64_t batch = 1;
  IndexMap a, b, y, preactivation, residual;  // offsets of problem i

  int64_t count() const override { return batch; }
  int64_t m(int64_t) const override { return first.m; }
  int64_t k(int64_t) const override { return first.k; }
  void place(int64_t i, Gemm* g) const override {
    g->a.offset = a.at(i);
    g->b_offset = b.at(i);
    g->out.y.offset = y.at(i);
    g->out.preactivation.offset = preactivation.at(i);
    g->out.residual.offset = residual.at(i);
  }
};

// Splits the loop dims between `matrix`'s rows and the map of problems; then the rows of one problem itself.
void split(const TensorView& t, const TensorView& b, Matrix* matrix, IndexMap* problems) {
  if (!t.present()) return;
  matrix->data = t.data;
  matrix->dtype = t.dtype;
  const int loops = t.ndim - 2;
  for (int d = 0; d < loops; ++d) {
    IndexMap* map = b.stride[d] == 0 ? &matrix->rows : problems;
    map->append(t.size[d], t.stride[d]);
  }
  matrix->rows.append(t.size[loops], t.stride[loops]);
  matrix->col = t.stride[loops + 1];
}

}  // namespace

void matmul(const TensorView* t, const double* s) {
  const TensorView &a = t[0], &b = t[1], &bias = t[2], &residual = t[3], &y = t[4], &preactivation = t[5];
  const int loops = a.ndim - 2;
  Batched source;
  Gemm& g = source.first;
  g.m = a.size[loops];
  g.k = a.size[loops + 1];
  g.n = b.size[loops + 1];
  for (int d = 0; d < loops; ++d) (b.stride[d] == 0 ? g.m : source.batch) *= a.size[d];
  split(a, b, &g.a, &source.a);
  split(y, b, &g.out.y, &source.y);
  split(residual, b, &g.out.residual, &source.residual);
  split(preactivation, b, &g.out.preactivation, &source.preactivation);
  for (int d = 0; d < loops; ++d)
    if (b.stride[d] != 0) source.b.append(b.size[d], b.stride[d]);
  g.b = b.data;
  g.b_k = b.stride[loops];
  g.b_n = b.stride[loops + 1];
  g.out.set_bias(bias);
  g.out.activation = static_cast<Activation>(static_cast<int>(s[0]));
  run_gemms(a.dtype, b.dtype, source);
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
