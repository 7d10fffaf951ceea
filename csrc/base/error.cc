#include "base/error.h"

#include <stdexcept>

namespace isotile {

void fail(const char* message) { throw std::invalid_argument(message); }

}  // namespace isotile
