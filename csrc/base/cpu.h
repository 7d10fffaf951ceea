// Which instruction sets this CPU and its operating system run.
#pragma once

namespace isotile {

bool cpu_runs(const char* instruction_set);

}  // namespace isotile
