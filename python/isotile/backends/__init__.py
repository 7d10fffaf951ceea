"""The backends, in the order of preference."""

from __future__ import annotations

import re
from typing import Any

from .base import Backend
from .cpu import CpuBackend, extension
from .nki import NkiBackend
from .nki import devices as neuron_devices
from .reference import ReferenceBackend
from .triton import TritonBackend

BACKENDS: dict[str, Backend] = {b.name: b for b in (TritonBackend(), NkiBackend(), CpuBackend(), ReferenceBackend())}


def named(name: str) -> Backend:
    """The backend of that name; `cpu[ISA]` is the cpu backend held to one instruction set, and made at its first use.

    Raises:
        ValueError: there is no such backend, or this CPU lacks the instruction set.
    """
    found = re.fullmatch(r"cpu\[(\w+)\]", name)
    if found is not None and name not in BACKENDS:
        module, reason = extension()
        if reason is not None:
            raise ValueError(f"{name}: {reason}")
        runs = [isa for isa, supported in module.instruction_sets() if supported]
        if found[1] not in runs:
            raise ValueError(f"{name}: this CPU runs {', '.join(runs)}")
        BACKENDS[name] = CpuBackend(found[1])
    if name not in BACKENDS:
        raise ValueError(f"no backend {name!r}; there are {', '.join(BACKENDS)}")
    return BACKENDS[name]


def backends() -> list[dict[str, Any]]:
    """Every backend: its name, whether it is available, why not, and what it runs on (versions, devices)."""
    import torch

    found = []
    for backend in BACKENDS.values():
        devices = ["cpu"]
        if torch.cuda.is_available():
            devices.append("cuda")
        devices += neuron_devices()
        reasons = {d: backend.unavailable(d) for d in devices}
        usable = [d for d, reason in reasons.items() if reason is None]
        found.append(
            {
                "name": backend.name,
                "available": bool(usable),
                "devices": usable,
                "reason": None if usable else next(iter(reasons.values())),
                **backend.info(),
            }
        )
    return found
