"""Plain PyTorch: the specs' own reference functions, on any device: the last resort, and every operator's meaning."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ..spec import FLOATS

if TYPE_CHECKING:
    from ..dispatch import Request


class ReferenceBackend:
    name = "reference"

    def serves(self, device_type: str) -> bool:
        return True

    def unavailable(self, device_type: str) -> str | None:
        return None

    def refuses(self, request: Request) -> str | None:
        if request.state.batch_invariant:
            return "PyTorch's own kernels promise no batch invariance; leave determinism(batch_invariant=True)"
        return None

    def prepare(self, request: Request) -> Callable[..., None]:
        spec = request.spec
        scalars = request.scalars
        names = tuple(spec.tensors)
        results = tuple(spec.results)

        def run(*tensors: torch.Tensor | None) -> None:
            arguments = dict(zip(names, tensors[: len(names)], strict=True))
            with torch.no_grad():
                values = spec.reference(**arguments, **scalars)
                for name, out in zip(results, tensors[len(names) :], strict=True):
                    if out is not None:
                        out.copy_(values[name])

        return run

    def dtypes(self, kernel: str) -> tuple[torch.dtype, ...]:
        return FLOATS

    def info(self) -> dict[str, Any]:
        return {"torch": torch.__version__}
