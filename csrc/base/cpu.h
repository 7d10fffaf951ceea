// What this machine's CPU is like.
#pragma once
#include <cstdint>

namespace isotile {

// Also whether its operating system does. The first question about "amx" asks the system for this process's leave to
// use tiles.
bool cpu_runs(const char* instruction_set);

// Of the data caches, as the operating system tells; a usual size where it does not.
int64_t l1_cache_bytes();
int64_t l2_cache_bytes();
int64_t last_level_cache_bytes();

}  // namespace isotile
