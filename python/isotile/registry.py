"""Finds operator specs, and kernels, by file name."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import pkgutil
from types import ModuleType

from .spec import OpSpec


@functools.cache
def specs() -> dict[str, OpSpec]:
    """Every operator's spec by name: each public module of `isotile.ops` with a `SPEC`."""
    from . import ops

    found = {}
    for module in sorted(pkgutil.iter_modules(ops.__path__), key=lambda m: m.name):
        if module.name.startswith("_"):
            continue
        spec = importlib.import_module(f"{ops.__name__}.{module.name}").SPEC
        found[module.name] = dataclasses.replace(spec, name=module.name)
    return found


def spec(name: str) -> OpSpec:
    """The spec of one operator; KeyError with the known names otherwise."""
    try:
        return specs()[name]
    except KeyError:
        raise KeyError(f"no operator {name!r}; there are {', '.join(specs())}") from None


@functools.cache
def kernel_names(backend: str) -> frozenset[str]:
    """The kernels that a backend's folder holds: `kernels/<backend>/<op>.py`."""
    package = importlib.import_module(f"isotile.kernels.{backend}")
    return frozenset(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


@functools.cache
def kernel_module(backend: str, op: str) -> ModuleType:
    """The module of one kernel, imported at its first use."""
    return importlib.import_module(f"isotile.kernels.{backend}.{op}")
