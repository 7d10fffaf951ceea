// Throwing from a kernel without a standard template in the kernel's object.
#pragma once

namespace isotile {

[[noreturn]] void fail(const char* message);  // std::invalid_argument

}  // namespace isotile
