// y = (x - mean) / sqrt(var + eps) * weight + bias over the last dimension, x = x + residual (rounded) if given.
#include "ops/_norm.h"

namespace isotile {
namespace ISOTILE_ISA {

void layer_norm(const TensorView* t, const double* s) {
  norm_forward<true>({t[0], t[3], t[1], t[2], t[4], t[5]}, s[0], 0.0);
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
