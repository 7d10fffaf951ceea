// Threads: PyTorch's own pool, through a function pointer, so that there is never a second pool to fight with.
#pragma once
#include <cstdint>

#include "base/inline.h"

namespace isotile {

// Addresses of torch_parallel_for and torch_get_num_threads (libtorch_cpu's stable C interface); null: serial.
void set_parallel(void* parallel_for_address, void* num_threads_address);

int num_threads();          // threads that a parallel region would use now; 1 inside one
bool in_parallel_region();  // true in code that parallel_for or parallel_dynamic calls

namespace detail {
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
void run_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction f, void* context);
void run_dynamic(int64_t count, RangeFunction f, void* context);
}  // namespace detail

// f(begin, end) over contiguous pieces of at least `grain` indices, one piece for each thread; serial when the range
// is not larger than grain or when already inside a region. An exception is rethrown here after the region.
template <class F>
ISOTILE_INLINE void parallel_for(int64_t begin, int64_t end, int64_t grain, const F& f) {
  detail::run_ranges(
      begin, end, grain,
      [](int64_t piece_begin, int64_t piece_end, void* context) {
        (*static_cast<const F*>(context))(piece_begin, piece_end);
      },
      const_cast<void*>(static_cast<const void*>(&f)));
}

// f(index) once for each index in [0, count), handed out one at a time to the threads that are free: for few uneven
// tasks. What f computes must not depend on which thread runs it.
template <class F>
ISOTILE_INLINE void parallel_dynamic(int64_t count, const F& f) {
  detail::run_dynamic(
      count, [](int64_t index, int64_t, void* context) { (*static_cast<const F*>(context))(index); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace isotile
