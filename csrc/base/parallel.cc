#include "base/parallel.h"

#include <atomic>
#include <exception>
#include <stdexcept>

namespace isotile {
namespace {

using TorchRange = void (*)(int64_t, int64_t, void*);
using TorchParallelFor = int32_t (*)(int64_t, int64_t, int64_t, TorchRange, void*);
using TorchNumThreads = int32_t (*)(uint32_t*);

std::atomic<TorchParallelFor> torch_parallel_for{nullptr};
std::atomic<TorchNumThreads> torch_num_threads{nullptr};
thread_local bool inside_region = false;

// One region's shared state. Exceptions must not cross PyTorch's frames: the first is kept and rethrown by the caller.
struct Region {
  detail::RangeFunction f;
  void* context;
  int64_t count = 0;
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  std::exception_ptr error;

  void keep_error() noexcept {
    if (!failed.exchange(true)) error = std::current_exception();
  }
};

struct InsideRegion {
  bool before = inside_region;
  InsideRegion() { inside_region = true; }
  ~InsideRegion() { inside_region = before; }
};

void range_body(int64_t begin, int64_t end, void* pointer) noexcept {
  auto& region = *static_cast<Region*>(pointer);
  InsideRegion inside;
  try {
    region.f(begin, end, region.context);
  } catch (...) {
    region.keep_error();
  }
}

void dynamic_body(int64_t, int64_t, void* pointer) noexcept {
  auto& region = *static_cast<Region*>(pointer);
  InsideRegion inside;
  try {
    while (!region.failed.load(std::memory_order_relaxed)) {
      const int64_t index = region.next.fetch_add(1, std::memory_order_relaxed);
      if (index >= region.count) return;
      region.f(index, index + 1, region.context);
    }
  } catch (...) {
    region.keep_error();
  }
}

void run(Region& region, int64_t begin, int64_t end, int64_t grain, TorchRange body) {
  const int32_t code = torch_parallel_for.load()(begin, end, grain, body, &region);
  if (region.error) std::rethrow_exception(region.error);
  if (code != 0) throw std::runtime_error("torch_parallel_for failed");
}

}  // namespace

void set_parallel(void* parallel_for_address, void* num_threads_address) {
  torch_num_threads = reinterpret_cast<TorchNumThreads>(num_threads_address);
  torch_parallel_for = num_threads_address ? reinterpret_cast<TorchParallelFor>(parallel_for_address) : nullptr;
}

bool in_parallel_region() { return inside_region; }

int num_threads() {
  if (inside_region || !torch_parallel_for.load(std::memory_order_relaxed)) return 1;
  uint32_t threads = 1;
  if (torch_num_threads.load(std::memory_order_relaxed)(&threads) != 0 || threads < 1) return 1;
  return static_cast<int>(threads);
}

namespace detail {

void run_ranges(int64_t begin, int64_t end, int64_t grain, RangeFunction f, void* context) {
  if (end <= begin) return;
  if (grain < 1) grain = 1;
  if (end - begin <= grain || num_threads() == 1) {
    f(begin, end, context);
    return;
  }
  Region region{};
  region.f = f;
  region.context = context;
  run(region, begin, end, grain, range_body);
}

void run_dynamic(int64_t count, RangeFunction f, void* context) {
  const int threads = count > 1 ? num_threads() : 1;
  if (threads == 1) {
    for (int64_t i = 0; i < count; ++i) f(i, i + 1, context);
    return;
  }
  Region region{};
  region.f = f;
  region.context = context;
  region.count = count;
  run(region, 0, threads < count ? threads : count, 1, dynamic_body);
}

}  // namespace detail
}  // namespace isotile
