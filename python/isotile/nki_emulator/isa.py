"""`nki.isa`: the instructions, their enums and their errors."""

from __future__ import annotations

from . import compute, constants, dma, matmul
from .compute import *  # noqa: F403
from .constants import dge_mode, dma_engine, engine, matmul_perf_mode, nc_version, oob_mode, reduce_cmd
from .dma import *  # noqa: F403
from .machine import NkiInstruction, NkiValidationError
from .matmul import *  # noqa: F403
from .tensor import VirtualRegister

vector_engine, scalar_engine, gpsimd_engine = engine.vector, engine.scalar, engine.gpsimd
tensor_engine, unknown_engine, sync_engine = engine.tensor, engine.unknown, engine.sync


def __getattr__(name):
    if name in ("tensor_copy_dynamic_src", "tensor_copy_dynamic_dst"):
        raise AttributeError(f"nisa.{name} was removed from NKI: use nisa.tensor_copy on a view with a run-time index")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    *compute.__all__,
    *dma.__all__,
    *matmul.__all__,
    "NkiInstruction",
    "NkiValidationError",
    "VirtualRegister",
    "constants",
    "dge_mode",
    "dma_engine",
    "engine",
    "matmul_perf_mode",
    "nc_version",
    "oob_mode",
    "reduce_cmd",
]
