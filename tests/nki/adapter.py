"""The NKI backend on CPU tensors, in the emulator: what the tests run the operators' own checks through."""

from __future__ import annotations

import importlib
import pkgutil

from isotile import nki_emulator

nki_emulator.install()


def kernel_names():
    package = importlib.import_module("isotile.kernels.nki")
    return {m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_")}


def _short(dtype):
    return str(dtype).removeprefix("torch.")


class NkiBackend:
    """One target and launch size of the emulator."""

    name = "nki"

    def __init__(self, target="gen3", cores=1):
        self.target, self.cores = target, cores
        self.reports = None

    def serves(self, device_type):
        return False

    def unavailable(self, device_type):
        return None if device_type == "cpu" else f"the emulator runs on cpu tensors, got {device_type}"

    def refuses(self, request):
        lowered = request.lowered
        if lowered.kernel not in kernel_names():
            return f"has no kernel {lowered.kernel!r}"
        module = importlib.import_module(f"isotile.kernels.nki.{lowered.kernel}")
        views = [v for v in (*lowered.tensors.values(), *lowered.outs.values()) if v is not None]
        if any(0 in v.shape for v in views):
            return None
        return module.supports(**lowered.tensors, **lowered.scalars, outs=lowered.outs)

    def prepare(self, request):
        lowered, spec = request.lowered, request.spec
        module = importlib.import_module(f"isotile.kernels.nki.{lowered.kernel}")
        slots = [*spec.tensors, *spec.results]
        outs = {n: None if v is None else _short(v.dtype) for n, v in lowered.outs.items()}
        views = [v for v in (*lowered.tensors.values(), *lowered.outs.values()) if v is not None]
        empty = any(0 in v.shape for v in views)

        def at(tensors, view):
            tensor = tensors[slots.index(view.source)]
            return tensor.as_strided(view.shape, view.strides, tensor.storage_offset())

        def run(*tensors):
            if empty:  # a Neuron kernel has no empty tensors: nothing to compute, or sums of nothing
                values = spec.reference(
                    **dict(zip(spec.tensors, tensors[: len(spec.tensors)], strict=True)), **request.scalars
                )
                for name, out in zip(spec.results, tensors[len(spec.tensors) :], strict=True):
                    if out is not None:
                        out.copy_(values[name])
                return
            given = {n: None if v is None else at(tensors, v) for n, v in lowered.tensors.items()}
            with nki_emulator.session(self.target, record=False):
                results = module.run(**given, **lowered.scalars, outs=outs, cores=self.cores)
            for name, view in lowered.outs.items():
                if view is not None:
                    at(tensors, view).copy_(results[name].reshape(view.shape))

        return run

    def info(self):
        return {"target": self.target, "cores": self.cores}


def use(target="gen3", cores=1):
    """Register the backend for a test; returns it."""
    from isotile import library, registry
    from isotile.backends import BACKENDS

    BACKENDS["nki"] = NkiBackend(target, cores)
    for name in registry.specs():
        library.operator(name).plans.clear()  # plans of another target
    return BACKENDS["nki"]
