"""What a backend is to the dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

if TYPE_CHECKING:
    from ..dispatch import Request


class Backend(Protocol):
    """One way to run operators. Refusals are returned sentences, never exceptions that somebody catches."""

    name: str

    def serves(self, device_type: str) -> bool:
        """Whether tensors of this device type come here without being asked."""

    def unavailable(self, device_type: str) -> str | None:
        """Why this backend cannot run here at all (what is missing, and what would help), or None."""

    def refuses(self, request: Request) -> str | None:
        """Why this backend cannot serve this call, or None."""

    def prepare(self, request: Request) -> Callable[..., None]:
        """What fills the results: called as `run(*tensors, *outs)` in the spec's order, None where absent."""

    def dtypes(self, kernel: str) -> tuple[torch.dtype, ...]:
        """The dtypes that this backend's kernel takes, on hardware that has them; () without a kernel."""

    def info(self) -> dict[str, Any]:
        """Versions, devices, instruction set: for `isotile.backends()` and `isotile info`."""
