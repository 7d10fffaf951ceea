"""Which backends are verified, and on what: the hardware, or what stands in for it where that is asked for."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import torch

from ..backends import BACKENDS, named
from ..backends.nki import devices as neuron_devices


@dataclasses.dataclass(frozen=True)
class Backend:
    """A backend under test.

    Attributes:
        name: as in `isotile.use_backend`.
        device: PyTorch device of its tensors.
        emulated: what stands in for the hardware, or None on the hardware itself.
    """

    name: str
    device: str
    emulated: str | None

    def describe(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "info": BACKENDS[self.name].info()}


class Unavailable(ValueError):
    """A backend that cannot be verified here; the message says why and what would help."""


def device_types() -> list[str]:
    """Device types that this machine has, accelerators first."""
    return [*(["cuda"] if torch.cuda.is_available() else []), *neuron_devices(), "cpu"]


def find(name: str, emulated: bool) -> Backend:
    """The backend of that name on this machine.

    Args:
        name: a backend, or `cpu[ISA]` for one instruction set of the cpu backend.
        emulated: allow an interpreter or emulator where the hardware is missing.

    Raises:
        Unavailable: with the reason.
    """
    try:
        backend = named(name)
    except ValueError as error:
        raise Unavailable(str(error)) from None
    reasons = []
    for kind in device_types():
        if not backend.serves(kind):
            continue
        reason = backend.unavailable(kind)
        if reason is None:
            return Backend(name, kind, None)
        reasons.append(reason)
    if not reasons:
        reasons.append("this machine has none of its devices")
    stand_in = backend.unavailable("cpu") if not backend.serves("cpu") else "it runs natively or not at all"
    if emulated:
        if stand_in is None:
            return Backend(name, "cpu", _stand_in(name))
        reasons.append(stand_in)
    elif not backend.serves("cpu"):
        reasons.append("--emulated runs its kernels in software on the CPU")
    raise Unavailable(f"{name}: {'; '.join(reasons)}")


def _stand_in(name: str) -> str:
    return {"triton": "Triton's interpreter"}.get(name) or str(BACKENDS[name].info().get("runs_in", "an emulator"))


def native() -> tuple[list[Backend], dict[str, str]]:
    """Every backend that runs on this machine's own hardware, and why each other does not."""
    chosen, absent = [], {}
    for name in BACKENDS:
        try:
            chosen.append(find(name, emulated=False))
        except Unavailable as error:
            absent[name] = str(error).removeprefix(f"{name}: ")
    return chosen, absent


def needs_interpreter(names: list[str], emulated: bool) -> bool:
    """Whether the process must start anew with TRITON_INTERPRET=1, which Triton reads once, at its import."""
    return (
        emulated and "triton" in names and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1"
    )
