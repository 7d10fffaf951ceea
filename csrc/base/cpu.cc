#include "base/cpu.h"

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

}  // namespace

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
