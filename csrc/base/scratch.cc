#include "base/scratch.h"

#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace isotile {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kWorthHugePage = kHugePage / 16;  // a matrix product's panels meet hundreds of pages otherwise
constexpr size_t kCacheBytes = size_t{128} << 20;  // kept by one thread between calls
constexpr int kCacheBlocks = 16;

void free_block(void* block) { std::free(block); }

void* allocate_block(size_t capacity) {
  void* block = nullptr;
  const size_t alignment = capacity >= kHugePage ? kHugePage : kAlignment;
  if (posix_memalign(&block, alignment, capacity) != 0) throw std::bad_alloc();
#if defined(__linux__)
  if (capacity >= kHugePage) madvise(block, capacity, MADV_HUGEPAGE);  // advice only: refusal changes nothing
#endif
  return block;
}

#if !defined(__SANITIZE_ADDRESS__)
struct Cache {
  struct Block {
    void* data;
    size_t capacity;
  };
  Block blocks[kCacheBlocks];
  int count = 0;
  size_t bytes = 0;

  void drop(int index) {
    free_block(blocks[index].data);
    take(index);
  }
  Block take(int index) {
    const Block block = blocks[index];
    bytes -= block.capacity;
    for (int i = index + 1; i < count; ++i) blocks[i - 1] = blocks[i];  // oldest first
    --count;
    return block;
  }
  ~Cache() {
    while (count > 0) drop(count - 1);
  }
};

thread_local Cache cache;
#endif

}  // namespace

namespace detail {

#if defined(__SANITIZE_ADDRESS__)
// Blocks of the exact size, never used again and full of NaN: the sanitizer sees what lies beyond them, and the tests
// what nobody wrote.
void* scratch_acquire(size_t bytes, size_t* capacity) {
  *capacity = bytes;
  return std::memset(allocate_block(bytes), 0xff, bytes);
}
void scratch_release(void* block, size_t) noexcept { free_block(block); }
#else
void* scratch_acquire(size_t bytes, size_t* capacity) {
  if (bytes > (size_t{1} << 62)) throw std::bad_alloc();
  const size_t unit = bytes >= kWorthHugePage ? kHugePage : size_t{4096};
  const size_t wanted = (bytes + unit - 1) / unit * unit;
  int best = -1;
  for (int i = 0; i < cache.count; ++i) {
    if (cache.blocks[i].capacity >= wanted && (best < 0 || cache.blocks[i].capacity < cache.blocks[best].capacity)) {
      best = i;
    }
  }
  // A small lease must not hold a large block that the same kernel is about to want.
  if (best >= 0 && cache.blocks[best].capacity <= 4 * wanted + kHugePage) {
    const Cache::Block block = cache.take(best);
    *capacity = block.capacity;
    return block.data;
  }
  void* block = allocate_block(wanted);
  *capacity = wanted;
  return block;
}

void scratch_release(void* block, size_t capacity) noexcept {
  if (capacity > kCacheBytes) {
    free_block(block);
    return;
  }
  while (cache.count == kCacheBlocks || cache.bytes + capacity > kCacheBytes) cache.drop(0);
  cache.blocks[cache.count++] = {block, capacity};
  cache.bytes += capacity;
}
#endif

}  // namespace detail
}  // namespace isotile
