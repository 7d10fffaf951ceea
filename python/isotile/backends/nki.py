"""NKI kernels for Trainium and Inferentia; on CPU tensors in the bundled emulator, where it is asked for."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .. import registry
from ..shapes import View
from .reference import ReferenceBackend

if TYPE_CHECKING:
    from ..dispatch import Request

REFERENCE = ReferenceBackend()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE_TYPES = ("neuron", "xla", "privateuseone")


@functools.cache
def _sdk() -> bool:
    """Whether the Neuron SDK's own nki is installed; PyPI's package of that name is an empty placeholder."""
    try:
        spec = importlib.util.find_spec("nki.isa")
        return spec is not None and spec.name == "nki.isa"  # the emulator's alias keeps its own name
    except ModuleNotFoundError:
        return False


@functools.cache
def _emulator() -> tuple[Any, str | None]:
    try:
        from isotile import nki_emulator
    except ImportError as error:
        return None, f"the NKI emulator does not import ({error}); pip install isotile[nki]"
    nki_emulator.install()
    return nki_emulator, None


class NkiBackend:
    """One target of the emulator, with one or two cores.

    No kernel has run on Neuron hardware yet, so tensors on a Neuron device are refused, not tried.
    """

    name = "nki"

    def __init__(self, target: str = "gen3", cores: int = 1) -> None:
        self.target, self.cores = target, cores

    def serves(self, device_type: str) -> bool:
        return device_type in DEVICE_TYPES

    def unavailable(self, device_type: str) -> str | None:
        if device_type in DEVICE_TYPES:
            return "launching on a Neuron device is not supported yet; cpu tensors run in the bundled emulator"
        if device_type != "cpu":
            return f"runs on Neuron devices and, emulated, on cpu tensors, got {device_type}"
        if _sdk():
            return "the Neuron SDK is installed, and running its simulator is not supported yet"
        return _emulator()[1]

    def refuses(self, request: Request) -> str | None:
        lowered = request.lowered
        if lowered.kernel not in registry.kernel_names("nki"):
            return f"has no kernel {lowered.kernel!r}"
        views = [v for v in (*lowered.tensors.values(), *lowered.outs.values()) if v is not None]
        if any(0 in v.shape for v in views):
            return None  # nothing for a chip to do, see `prepare`
        module = registry.kernel_module("nki", lowered.kernel)
        return module.supports(**lowered.tensors, **lowered.scalars, outs=lowered.outs)

    def prepare(self, request: Request) -> Callable[..., None]:
        lowered = request.lowered
        module = registry.kernel_module("nki", lowered.kernel)
        names = (*request.spec.tensors, *request.spec.results)
        outs = {n: None if v is None else str(v.dtype).removeprefix("torch.") for n, v in lowered.outs.items()}
        emulator, _ = _emulator()

        def at(tensors: tuple[torch.Tensor | None, ...], view: View) -> torch.Tensor:
            tensor = tensors[names.index(view.source)]
            assert tensor is not None
            return view.of(tensor)

        if any(v is not None and 0 in v.shape for v in (*lowered.tensors.values(), *lowered.outs.values())):
            # A chip has no empty tensors. Results are empty too, or sums of nothing: constants.
            return REFERENCE.prepare(request)

        def run(*tensors: torch.Tensor | None) -> None:
            given = {n: None if v is None else at(tensors, v) for n, v in lowered.tensors.items()}
            with emulator.session(self.target, record=False):
                results = module.run(**given, **lowered.scalars, outs=outs, cores=self.cores)
            for name, view in lowered.outs.items():
                if view is not None:
                    at(tensors, view).copy_(results[name].reshape(view.shape))

        return run

    def dtypes(self, kernel: str) -> tuple[torch.dtype, ...]:
        return DTYPES if kernel in registry.kernel_names("nki") else ()

    def info(self) -> dict[str, Any]:
        _, reason = _emulator()
        return {} if reason else {"runs_in": "bundled emulator", "target": self.target, "cores": self.cores}
