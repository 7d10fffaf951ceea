"""Triton kernels: NVIDIA and AMD GPUs, or Triton's interpreter on CPU tensors where it is asked for."""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .. import registry, tuning

if TYPE_CHECKING:
    from ..dispatch import Request

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@functools.cache
def _import_failure() -> str | None:
    """Why Triton cannot be used, or None once it is imported."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton does not import ({error}); pip install isotile[triton]"
    return None


def interpreted() -> bool:
    """Triton reads this variable when kernels are defined, so it must be set before the process starts."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _install_interpreter() -> None:
    from . import _triton_interpreter

    _triton_interpreter.install()


def _runs_on(device_type: str) -> str | None:
    if device_type == "cuda":
        return "TRITON_INTERPRET=1 is set, which runs kernels on CPU tensors only" if interpreted() else None
    if device_type == "cpu":
        if interpreted():
            return None
        return "cpu tensors need Triton's interpreter: start the process with TRITON_INTERPRET=1"
    return f"runs on cuda tensors, got {device_type}"


@functools.cache
def device_names(index: int) -> tuple[str, ...]:
    """The folders of a GPU's tuning tables, most particular first: its own name, then its architecture."""
    import triton

    target = triton.runtime.driver.active.get_current_target()
    return tuning.slug(torch.cuda.get_device_name(index)), tuning.arch_name(target.backend, target.arch)


class TritonBackend:
    name = "triton"

    def serves(self, device_type: str) -> bool:
        return device_type == "cuda"

    def unavailable(self, device_type: str) -> str | None:
        return _import_failure() or _runs_on(device_type)

    def _arguments(self, request: Request) -> dict[str, Any]:
        lowered = request.lowered
        return {**lowered.tensors, **lowered.outs, **lowered.scalars}

    def refuses(self, request: Request) -> str | None:
        kernel = request.lowered.kernel
        if kernel not in registry.kernel_names("triton"):
            return f"has no kernel {kernel!r}"
        if interpreted():
            _install_interpreter()
        return registry.kernel_module("triton", kernel).supports(**self._arguments(request))

    def prepare(self, request: Request) -> Callable[..., None]:
        from . import triton_launch

        module = registry.kernel_module("triton", request.lowered.kernel)
        arguments = self._arguments(request)
        if request.state.batch_invariant:
            arguments["config"] = "batch_invariant"  # the tuned one would depend on the batch
        lowered = request.lowered
        views = [*lowered.tensors.values(), *lowered.outs.values()]
        names = (*request.spec.tensors, *request.spec.results)
        order = [None if v is None else names.index(v.source) for v in views]

        def replay(allow_tf32: bool) -> Callable[..., None]:
            given = {**arguments, "allow_tf32": True} if allow_tf32 else arguments
            if "config" not in given:
                given = {**given, "config": self._tuned(request, module, given)}
            launches = module.prepare(**given)
            if interpreted():

                def run(*tensors: torch.Tensor | None) -> None:
                    memory = {
                        id(v): tensors[i] for v, i in zip(views, order, strict=True) if v is not None and i is not None
                    }
                    triton_launch.run_plain(launches, memory)

                return run
            run_recorded = triton_launch.Replay(launches, views, request.device, order, len(names)).run
            return lambda *tensors: run_recorded(tensors)

        exact = replay(False)
        if request.dtype != torch.float32 or "allow_tf32" not in inspect.signature(module.prepare).parameters:
            return exact
        fast = functools.cache(lambda: replay(True))  # made at the first call that allows TF32

        def run_float32(*tensors: torch.Tensor | None) -> None:
            (exact if torch.get_float32_matmul_precision() == "highest" else fast())(*tensors)

        return run_float32

    def _tuned(self, request: Request, module: Any, given: dict[str, Any]) -> dict[str, Any] | None:
        """The tuned configuration for a call's shapes, or None: the kernel's own choice."""
        empty = any(v.numel() == 0 for v in (*request.lowered.tensors.values(), *request.lowered.outs.values()) if v)
        if empty or request.device.type != "cuda" or not hasattr(module, "problem"):
            return None
        index = torch.cuda.current_device() if request.device.index is None else request.device.index
        return tuning.lookup("triton", device_names(index), request.lowered.kernel, module.problem(**given))

    def dtypes(self, kernel: str) -> tuple[torch.dtype, ...]:
        return DTYPES if kernel in registry.kernel_names("triton") else ()

    def info(self) -> dict[str, Any]:
        reason = _import_failure()
        if reason is not None:
            return {}
        facts: dict[str, Any] = {"triton": importlib.metadata.version("triton"), "interpreter": interpreted()}
        if torch.cuda.is_available():
            facts["gpus"] = [_describe(i) for i in range(torch.cuda.device_count())]
        return facts


def _describe(index: int) -> str:
    capability = ".".join(map(str, torch.cuda.get_device_capability(index)))
    return f"{torch.cuda.get_device_name(index)} (compute capability {capability})"
