// y = x / sqrt(mean(x^2) + eps) * (weight + weight_offset) over the last dimension, x = x + residual (rounded) if given.
#include "ops/_norm.h"

namespace isotile {
namespace ISOTILE_ISA {

void rms_norm(const TensorView* t, const double* s) {
  const TensorView no_bias;
  norm_forward<false>({t[0], t[2], t[1], no_bias, t[3], t[4]}, s[0], s[1]);
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
