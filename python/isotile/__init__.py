"""isotile: one set of operators for PyTorch on GPUs, Trainium and CPUs, proven to give the same numbers."""

from __future__ import annotations

from typing import Any

import torch  # noqa: F401  (before the extension module, which uses its thread pool)

from . import doors as _doors
from . import library as _library
from . import registry as _registry
from .backends import backends
from .doors import explain
from .errors import BackendError, FallbackWarning
from .quantization import QuantizedWeight, quantize, quantize_model
from .record import record
from .state import determinism, use_backend

__version__ = "0.1.0"

_library.register_all()
_OPERATORS = tuple(name for name, spec in _registry.specs().items() if not spec.internal)
globals().update({name: _doors.make(name) for name in _OPERATORS})

__all__ = [
    "BackendError",
    "FallbackWarning",
    "QuantizedWeight",
    "backends",
    "determinism",
    "explain",
    "quantize",
    "quantize_model",
    "record",
    "use_backend",
    *_OPERATORS,
]


def __getattr__(name: str) -> Any:
    raise AttributeError(f"isotile has no operator or function {name!r}; operators: {', '.join(_OPERATORS)}")
