#include "base/cpu.h"

#include <unistd.h>

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
#elif defined(__aarch64__)
  if (std::strcmp(set, "neon") == 0) return true;
#endif
  return false;
}

}  // namespace isotile
