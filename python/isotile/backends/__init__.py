"""The backends, in the order of preference."""

from __future__ import annotations

from typing import Any

from .base import Backend
from .cpu import CpuBackend
from .nki import NkiBackend
from .nki import devices as neuron_devices
from .reference import ReferenceBackend
from .triton import TritonBackend

BACKENDS: dict[str, Backend] = {b.name: b for b in (TritonBackend(), NkiBackend(), CpuBackend(), ReferenceBackend())}


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
