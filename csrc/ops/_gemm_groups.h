// Groups of rows given by cumulative ends.
#pragma once
#include "base/scratch.h"
#include "base/tensor_view.h"

namespace isotile {
namespace ISOTILE_ISA {

// starts[g] .. starts[g + 1] are group g's rows; starts[groups] .. starts[groups + 1] = total belong to no group. The
// ends are data: a value out of order or out of range makes its group empty or shorter, never an access out of bounds.
inline void group_starts(const TensorView& offsets, int64_t total, int64_t* starts) {
  const int64_t groups = offsets.size[0];
  const int32_t* ends = static_cast<const int32_t*>(offsets.data);
  starts[0] = 0;
  for (int64_t g = 0; g < groups; ++g) {
    int64_t end = ends[g * offsets.stride[0]];
    if (end > total) end = total;
    starts[g + 1] = end > starts[g] ? end : starts[g];
  }
  starts[groups + 1] = total;
}

}  // namespace ISOTILE_ISA
}  // namespace isotile
