"""NKI kernels for Trainium and Inferentia.

Neuron tensors (`neuron` of TorchNeuron, `xla` of torch-xla) go to the jitted kernels; CPU tensors, where asked for, to
the SDK's simulator if the SDK is installed and to the bundled emulator if not. No kernel has run on hardware yet.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from .. import registry
from ..shapes import View
from .reference import ReferenceBackend

if TYPE_CHECKING:
    from ..dispatch import Request

REFERENCE = ReferenceBackend()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
DEVICE_TYPES = ("neuron", "xla")
#: Kernels that multiply matrices.
PRODUCTS = frozenset({"matmul", "grouped_matmul", "grouped_matmul_backward", "attention", "attention_backward"})
#: Distributions that a reader of a report from a Neuron machine needs the versions of.
PACKAGES = ("nki", "neuronx-cc", "torch-neuronx", "torch-xla", "libneuronxla")


@functools.cache
def _modules() -> tuple[Any, Any, str | None]:
    """(the emulator or None, the Neuron SDK's nki or None, why there is neither)."""
    try:
        from isotile import nki_emulator
    except ImportError as error:
        return None, None, f"the NKI emulator does not import ({error}); pip install isotile[nki]"
    if nki_emulator.install():
        return nki_emulator, None, None
    return nki_emulator, nki_emulator.real_nki(), None


def devices() -> list[str]:
    """The Neuron device types that PyTorch has here."""
    found = []
    module = getattr(torch, "neuron", None)
    if module is not None and torch._C._get_privateuse1_backend_name() == "neuron" and module.is_available():
        found.append("neuron")
    with contextlib.suppress(ModuleNotFoundError):  # no torch-xla: no xla device, which is not an error
        # torch-xla serves other chips too; libneuronxla is what makes it serve Neuron's.
        importlib.import_module("libneuronxla")
        importlib.import_module("torch_xla")
        found.append("xla")
    return found


#: Inside `modelling`, the reports of the launches so far.
MODELLING: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar("isotile_nki_modelling", default=None)


@contextlib.contextmanager
def modelling() -> Iterator[list[Any]]:
    """Calls on this backend are traced, not computed: results are left as they are. Gives each launch's reports."""
    runs: list[Any] = []
    token = MODELLING.set(runs)
    try:
        yield runs
    finally:
        MODELLING.reset(token)


def _traced(module: Any, tensors: dict, scalars: dict, outs: dict, target: str, cores: int) -> Any:
    """One report for each core of a launch. Kernels whose loops depend on values are computed for it."""
    emulator = _modules()[0]
    dry = not getattr(module, "NEEDS_VALUES", False)
    with emulator.session(target, dry=dry) as seen:
        module.run(**tensors, **scalars, outs=outs, cores=cores)
    return seen.runs


class NkiBackend:
    """The target and the number of cores are the emulator's and the simulator's; on a device they are the machine's."""

    name = "nki"

    def __init__(self, target: str = "gen3", cores: int = 1) -> None:
        self.target, self.cores = target, cores

    def serves(self, device_type: str) -> bool:
        return device_type in DEVICE_TYPES

    def unavailable(self, device_type: str) -> str | None:
        if device_type not in (*DEVICE_TYPES, "cpu"):
            return f"runs on Neuron devices and, emulated, on cpu tensors, got {device_type}"
        _, sdk, reason = _modules()
        if device_type in DEVICE_TYPES and sdk is None:
            return (
                f"{device_type} tensors need the Neuron SDK's nki package, which does not import here (PyPI's nki is "
                "an empty placeholder; the SDK is on AWS's package index)"
            )
        return reason

    def refuses(self, request: Request) -> str | None:
        lowered = request.lowered
        if lowered.kernel not in registry.kernel_names("nki"):
            return f"has no kernel {lowered.kernel!r}"
        views = [v for v in (*lowered.tensors.values(), *lowered.outs.values()) if v is not None]
        if any(0 in v.shape for v in views):
            return None  # nothing for a chip to do, see `prepare`
        if request.state.batch_invariant and lowered.kernel in PRODUCTS:
            return (
                "the order in which products are summed is not known to be independent of the batch: no hardware has "
                "shown it, and the emulator's depends on the shape; leave determinism(batch_invariant=True)"
            )
        module = registry.kernel_module("nki", lowered.kernel)
        return module.supports(**lowered.tensors, **lowered.scalars, outs=lowered.outs)

    def prepare(self, request: Request) -> Callable[..., None]:
        lowered = request.lowered
        module = registry.kernel_module("nki", lowered.kernel)
        names = (*request.spec.tensors, *request.spec.results)
        outs = {n: None if v is None else str(v.dtype).removeprefix("torch.") for n, v in lowered.outs.items()}

        def at(tensors: tuple[torch.Tensor | None, ...], view: View) -> torch.Tensor:
            tensor = tensors[names.index(view.source)]
            assert tensor is not None
            return view.of(tensor)

        if any(v is not None and 0 in v.shape for v in (*lowered.tensors.values(), *lowered.outs.values())):
            # A chip has no empty tensors. Results are empty too, or sums of nothing: constants.
            return REFERENCE.prepare(request)

        def run(*tensors: torch.Tensor | None) -> None:
            given = {n: None if v is None else at(tensors, v) for n, v in lowered.tensors.items()}
            if (model := MODELLING.get()) is not None:
                model.append(_traced(module, given, lowered.scalars, outs, self.target, self.cores))
                return
            with self._launching(request.device.type) as cores:
                results = module.run(**given, **lowered.scalars, outs=outs, cores=cores)
            for name, view in lowered.outs.items():
                if view is not None:
                    at(tensors, view).copy_(results[name].reshape(view.shape))

        return run

    @contextlib.contextmanager
    def _launching(self, device_type: str) -> Iterator[int]:
        """What a launch needs in force on this device type; gives the number of cores."""
        emulator, sdk, _ = _modules()
        if device_type in DEVICE_TYPES:
            yield int(os.environ.get("NEURON_LOGICAL_NC_CONFIG", "1"))
        elif sdk is None:
            with emulator.session(self.target, record=False):
                yield self.cores
        else:
            with _environment(NKI_SIMULATOR="1", NEURON_PLATFORM_TARGET_OVERRIDE=self.target):
                yield self.cores

    def dtypes(self, kernel: str) -> tuple[torch.dtype, ...]:
        return DTYPES if kernel in registry.kernel_names("nki") else ()

    def info(self) -> dict[str, Any]:
        emulator, sdk, reason = _modules()
        if reason is not None:
            return {}
        versions = {}
        for package in PACKAGES if sdk is not None else ():
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                versions[package.replace("-", "_")] = importlib.metadata.version(package)
        if sdk is not None and (present := devices()):
            cores = int(os.environ.get("NEURON_LOGICAL_NC_CONFIG", "1"))
            return {"runs_in": f"hardware ({', '.join(present)} tensors)", "cores": cores, **versions}
        if sdk is not None:
            return {"runs_in": "the Neuron SDK's simulator", "target": self.target, "cores": self.cores, **versions}
        return {
            "runs_in": "bundled emulator",
            "emulates": f"NKI {emulator.API_LEVEL}",
            "target": self.target,
            "cores": self.cores,
        }


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
