"""C++ SIMD kernels for CPUs: one instruction set of `isotile._C`."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import env
from ..shapes import contiguous_strides
from ..spec import FLOATS

if TYPE_CHECKING:
    from ..dispatch import Request
    from ..shapes import View

#: codes of csrc/base/tensor_view.h
DTYPES = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.float64: 3,
    torch.bool: 4,
    torch.int32: 5,
    torch.int64: 6,
    torch.int8: 7,
    torch.uint8: 8,
}


#: Kernels that sum a row in another order where the rows lie side by side in memory, one to a lane. Which of the two
#: it is depends on the rows around, so that batch invariance runs these on copies.
COLUMN_KERNELS = frozenset({"softmax", "softmax_backward"})


@functools.cache
def extension() -> tuple[Any, str | None]:
    """The extension module with PyTorch's thread pool handed over, or the reason why there is none."""
    try:
        from isotile import _C
    except ImportError as error:
        return None, f"the extension module isotile._C does not load ({error}); reinstall isotile with a C++ compiler"
    path = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        library = ctypes.CDLL(str(path))
        addresses = [
            ctypes.cast(getattr(library, name), ctypes.c_void_p).value
            for name in ("torch_parallel_for", "torch_get_num_threads")
        ]
    except (OSError, AttributeError) as error:
        return None, f"PyTorch's thread pool is out of reach ({error}); install torch>=2.11"
    module: Any = _C
    module.set_parallel(*addresses)
    return module, None


@functools.cache
def instruction_set() -> str:
    """The instruction set in use: `ISOTILE_CPU_ISA`, or the best that this CPU runs."""
    module, reason = extension()
    if module is None:
        raise RuntimeError(reason)
    runs = [name for name, supported in module.instruction_sets() if supported]
    asked = env.instruction_set()
    if asked is None:
        return runs[-1]
    if asked not in runs:
        raise ValueError(f"ISOTILE_CPU_ISA: wanted one of {', '.join(runs)}, got {asked!r}")
    return asked


def panel_step(dtype: torch.dtype) -> int | None:
    """The step that the kernels read a constant weight's panels with, see `isotile.ops.packed_linear`.

    None: they read the weight itself. That is so for dtypes that they do not know, for those that matrix tiles take,
    and where there are no kernels.
    """
    if dtype not in FLOATS or extension()[0] is None:
        return None
    isa = instruction_set()
    if isa == "amx" and dtype.itemsize == 2:
        return None
    return 2 if dtype == torch.bfloat16 and isa == "avx512_bf16" else 1


class CpuBackend:
    """The kernels of one instruction set: `isa`, or `ISOTILE_CPU_ISA`, or the best that this CPU runs."""

    def __init__(self, isa: str | None = None) -> None:
        self.name = "cpu" if isa is None else f"cpu[{isa}]"
        self.isa = isa

    def serves(self, device_type: str) -> bool:
        return device_type == "cpu"

    def unavailable(self, device_type: str) -> str | None:
        if device_type != "cpu":
            return f"runs on cpu tensors, got {device_type}"
        return extension()[1]

    def refuses(self, request: Request) -> str | None:
        module, _ = extension()
        if request.lowered.kernel not in module.operators():
            return f"has no kernel {request.lowered.kernel!r}"
        for view in (*request.lowered.tensors.values(), *request.lowered.outs.values()):
            if view is not None and view.dtype not in DTYPES:
                return f"does not know dtype {view.dtype}"
            if view is not None and view.ndim > module.max_dims:
                most = module.max_dims
                return f"takes at most {most} dimensions that do not merge, got {view.ndim}; contiguous tensors merge"
        return None

    def prepare(self, request: Request) -> Callable[..., None]:
        module, _ = extension()
        lowered = request.lowered
        slots = [*lowered.tensors.values(), *lowered.outs.values()]
        names = (*request.spec.tensors, *request.spec.results)
        order = [None if v is None else names.index(v.source) for v in slots]
        by_rows = (
            request.state.batch_invariant
            and lowered.kernel in COLUMN_KERNELS
            and any(v is not None and v.strides[-1] != 1 for v in slots)
        )
        laid_out = [v if v is None else v.with_dims(v.shape, contiguous_strides(v.shape)) for v in slots]
        plan = module.plan(
            self.isa or instruction_set(),
            lowered.kernel,
            [_describe(v) for v in (laid_out if by_rows else slots)],
            [*lowered.scalars.values(), float(request.state.batch_invariant)],
        )
        if by_rows:
            return _on_rows(plan, slots, order, len(lowered.tensors))
        if all(i is None or i == position for position, i in enumerate(order)) and len(order) == len(names):
            return plan

        def run(*tensors: torch.Tensor | None) -> None:
            plan(*[None if i is None else tensors[i] for i in order])

        return run

    def dtypes(self, kernel: str) -> tuple[torch.dtype, ...]:
        module, _ = extension()
        return FLOATS if module is not None and kernel in module.operators() else ()

    def info(self) -> dict[str, Any]:
        module, reason = extension()
        if module is None:
            return {"reason": reason}
        return {
            "instruction_set": instruction_set(),
            "instruction_sets": [name for name, supported in module.instruction_sets() if supported],
            "threads": torch.get_num_threads(),
        }


def _on_rows(
    plan: Callable[..., None], slots: list[View | None], order: list[int | None], inputs: int
) -> Callable[..., None]:
    """`plan` on row-major copies of what the slots address."""

    def run(*tensors: torch.Tensor | None) -> None:
        placed = [
            None if v is None or i is None or (t := tensors[i]) is None else v.of(t)
            for v, i in zip(slots, order, strict=True)
        ]
        dense = [None if t is None else t.contiguous() for t in placed[:inputs]]
        dense += [
            None if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in placed[inputs:]
        ]
        plan(*dense)
        for t, filled in zip(placed[inputs:], dense[inputs:], strict=True):
            if t is not None and filled is not None:
                t.copy_(filled)

    return run


def _describe(view: View | None) -> tuple[int, tuple[int, ...], tuple[int, ...]] | None:
    return None if view is None else (DTYPES[view.dtype], view.shape, view.strides)
