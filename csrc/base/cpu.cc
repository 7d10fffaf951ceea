#include "base/cpu.h"

#include <unistd.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#endif

#include <cstring>

namespace isotile {
namespace {

#if defined(__x86_64__)
bool runs_avx2() {  // all of x86-64-v3 that the compiler may use
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
         __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c") && __builtin_cpu_supports("lzcnt") &&
         __builtin_cpu_supports("movbe");
}
bool runs_avx512() {  // x86-64-v4
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vl");
}
bool runs_avx512_bf16() {
  return runs_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni");
}

bool has_tiles() {  // with products of bfloat16 and of 8-bit integers
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kOsXsave = 1u << 27, kBf16 = 1u << 22, kTile = 1u << 24, kInt8 = 1u << 25;
  if (!__get_cpuid(1, &a, &b, &c, &d) || (c & kOsXsave) == 0) return false;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  if ((d & (kBf16 | kTile | kInt8)) != (kBf16 | kTile | kInt8)) return false;
  constexpr unsigned kTileConfig = 1u << 17, kTileData = 1u << 18;
  unsigned low = 0, high = 0;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & (kTileConfig | kTileData)) == (kTileConfig | kTileData);
}
// Linux gives tile state only to processes that ask for it (Documentation/arch/x86/xstate.rst); all threads get it,
// those to come too.
bool may_use_tiles() {
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool granted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return granted;
#else
  return false;
#endif
}
bool runs_amx() { return runs_avx512_bf16() && has_tiles() && may_use_tiles(); }
#endif

int64_t cache_bytes(int name, int64_t usual) {
  const long bytes = name >= 0 ? sysconf(name) : -1;
  return bytes > 0 ? bytes : usual;
}

#if defined(_SC_LEVEL1_DCACHE_SIZE)
constexpr int kL1Name = _SC_LEVEL1_DCACHE_SIZE, kL2Name = _SC_LEVEL2_CACHE_SIZE, kL3Name = _SC_LEVEL3_CACHE_SIZE;
#else
constexpr int kL1Name = -1, kL2Name = -1, kL3Name = -1;
#endif

}  // namespace

int64_t l1_cache_bytes() {
  static const int64_t bytes = cache_bytes(kL1Name, 32 << 10);
  return bytes;
}
int64_t l2_cache_bytes() {
  static const int64_t bytes = cache_bytes(kL2Name, 1 << 20);
  return bytes;
}
int64_t last_level_cache_bytes() {
  static const int64_t bytes = cache_bytes(kL3Name, 32 << 20);
  return bytes;
}

bool cpu_runs(const char* set) {
  if (std::strcmp(set, "scalar") == 0) return true;
#if defined(__x86_64__)
  if (std::strcmp(set, "avx2") == 0) return runs_avx2();
  if (std::strcmp(set, "avx512") == 0) return runs_avx512();
  if (std::strcmp(set, "avx512_bf16") == 0) return runs_avx512_bf16();
  if (std::strcmp(set, "amx") == 0) return runs_amx();
#elif defined(__aarch64__)
  if (std::strcmp(set, "neon") == 0) return true;
#endif
  return false;
}

}  // namespace isotile
