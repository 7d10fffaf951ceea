// Types of vec128.h, apart because the hardware operations need them first.
#pragma once

namespace isotile {
namespace ISOTILE_ISA {

typedef float F4 __attribute__((vector_size(16)));
typedef double D2 __attribute__((vector_size(16)));
typedef int32_t I4 __attribute__((vector_size(16)));
typedef uint32_t U4 __attribute__((vector_size(16)));
typedef int64_t L2 __attribute__((vector_size(16)));
typedef uint16_t H4 __attribute__((vector_size(8)));

}  // namespace ISOTILE_ISA
}  // namespace isotile
