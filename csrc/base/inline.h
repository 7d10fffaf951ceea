// Everything that a header defines outside an instruction set's own namespace must be inlined: an out-of-line copy
// would be a weak symbol, and the linker could keep the one compiled for the widest set for the whole module.
#pragma once

#define ISOTILE_INLINE inline __attribute__((always_inline))
