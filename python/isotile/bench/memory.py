"""How much memory a call takes beside its inputs."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
#: The kernel counts resident pages for each thread and adds them up in steps, so less than this is not told apart.
RESOLUTION = 1 << 20


def peak_extra_bytes(call: Callable[[], Any]) -> int | None:
    """Bytes by which resident memory rises while `call` runs, its results included; None where nothing can tell.

    What a library holds from call to call is in it only as far as it grows again. 0 stands for less than `RESOLUTION`.
    """
    if not RESET.exists():
        return None
    gc.collect()
    _trim()
    try:
        RESET.write_text("5")  # the peak starts again from here
    except OSError:  # a container may forbid it
        return None
    before = _kilobytes("VmRSS")
    kept = call()
    peak = _kilobytes("VmHWM")
    del kept
    extra = max(0, peak - before) << 10
    return extra if extra >= RESOLUTION else 0


def cuda_peak_extra_bytes(call: Callable[[], Any], device: torch.device) -> int:
    """The same for a GPU, from PyTorch's allocator."""
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call()
    torch.cuda.synchronize(device)
    extra = torch.cuda.max_memory_allocated(device) - before
    del kept
    return extra


def _kilobytes(name: str) -> int:
    for line in STATUS.read_text().splitlines():
        if line.startswith(name + ":"):
            return int(line.split()[1])
    raise LookupError(f"{STATUS} has no {name}")


def _trim() -> None:
    """Give free heap pages back to the system, or a call would find its memory resident already."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except AttributeError:  # a C library other than glibc
        return
