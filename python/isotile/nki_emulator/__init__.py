"""A strict emulator of the Neuron Kernel Interface (NKI 0.6) on NumPy.

Kernels run unmodified: `install()` makes `import nki`, `nki.language` and `nki.isa` mean this package where the real
ones are absent. Semantics are exact per instruction (float32 compute, one cast, round half to even); what compiler
or hardware forbids raises `NkiValidationError` naming instruction, operand, limit and documentation page.
"""

from __future__ import annotations

import importlib
import sys

from . import collectives, compiler, constants, isa, language, typing
from .kernel import Kernel, Session, jit, session, simulate
from .machine import NkiValidationError
from .tensor import NKIObject, NkiTensor

API_LEVEL = "0.6.0"
_MODULES = {
    "nki": sys.modules[__name__],
    "nki.language": language,
    "nki.isa": isa,
    "nki.isa.constants": constants,
    "nki.collectives": collectives,
    "nki.typing": typing,
    "nki.compiler": compiler,
}


def __getattr__(name):
    if name in ("benchmark", "profile", "baremetal", "simulate_kernel"):
        raise AttributeError(f"nki.{name} was removed from NKI; nki.simulate(kernel) runs a kernel without hardware")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def real_nki():
    """The real `nki` package, or None. PyPI's placeholder of that name has no instructions and does not count."""
    present = sys.modules.get("nki")
    if present is _MODULES["nki"]:
        return None
    try:
        isa_module = importlib.import_module("nki.isa")
        importlib.import_module("nki.language")
        found = importlib.import_module("nki")
    except ImportError:
        return None
    return found if hasattr(isa_module, "nc_matmul") and hasattr(found, "jit") else None


def install() -> bool:
    """Make `import nki` mean the emulator. False, and nothing done, where the real package is present."""
    if real_nki() is not None:
        return False
    sys.modules.update(_MODULES)
    return True


def uninstall():
    for name, module in _MODULES.items():
        if sys.modules.get(name) is module:
            del sys.modules[name]


__all__ = [
    "API_LEVEL",
    "Kernel",
    "NKIObject",
    "NkiTensor",
    "NkiValidationError",
    "Session",
    "install",
    "jit",
    "real_nki",
    "session",
    "simulate",
    "uninstall",
]
