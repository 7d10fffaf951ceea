// y [.., n] = activation(x [.., k] @ weight.T + bias [n]) + residual [.., n], and the preactivation. The weight lies in
// panels [n / 64, k, 64], or as pairs [n / 64, k / 2, 128]: see kPanelColumns.
#include "ops/_gemm.h"

namespace isotile {
namespace ISOTILE_ISA {

void packed_linear(const TensorView* t, const double* s) {
  const TensorView &x = t[0], &panels = t[1], &bias = t[2], &residual = t[3], &y = t[4], &preactivation = t[5];
  OneGemm source;
  Gemm& g = source.first;
  g.a = Matrix::rows_of(x);
  g.m = 1;
  for (int d = 0; d + 1 < x.ndim; ++d) g.m *= x.size[d];
  g.k = x.size[x.ndim - 1];
  g.n = y.size[y.ndim - 1];
  g.b = panels.data;
  g.b_pairs = panels.size[2] == 2 * kPanelColumns;
  g.b_panel = panels.stride[0] / (g.b_pairs ? 2 : 1);
  g.b_k = kPanelColumns / (g.b_pairs ? 2 : 1);
  g.b_n = 1;
  g.out.y = Matrix::rows_of(y);
  g.out.preactivation = Matrix::rows_of(preactivation);
  g.out.residual = Matrix::rows_of(residual);
  g.out.set_bias(bias);
  g.out.activation = static_cast<Activation>(static_cast<int>(s[0]));
  run_gemms(x.dtype, panels.dtype, source);
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
