"""CPU tensors on pages of 2 MB, Linux's transparent huge pages.

A kernel reads a large weight from them with far fewer address translations, and a large result comes into being with
far fewer page faults, which otherwise take as long as many a kernel.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
from collections.abc import Callable

import torch

_HUGE = 2 << 20
_ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)
_C_LIBRARY = ctypes.CDLL(None) if _ADVICE is not None else None

#: The C library maps memory for larger blocks anew each time, and gives it back when they are freed.
ALWAYS_FRESH = 32 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised contiguous tensor, on huge pages if it fills any and the system has them.

    Its storage cannot be resized.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE or _ADVICE is None:
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -torch.frombuffer(memory, dtype=torch.uint8).data_ptr() % _HUGE
    with contextlib.suppress(OSError):  # a system without them: the memory serves as it is
        memory.madvise(_ADVICE, start, size // _HUGE * _HUGE)
    return torch.frombuffer(memory, dtype=dtype, count=math.prod(shape), offset=start).view(shape)


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of the tensor on such pages; the tensor itself if it is small or on another device."""
    if not tensor.is_cpu or tensor.nbytes < _HUGE:
        return tensor
    return empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)


def allocated(allocate: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What `allocate` returns, a contiguous CPU tensor that nothing is written to yet, to be on huge pages."""
    tensor = allocate()
    if _C_LIBRARY is not None and _ADVICE is not None:
        first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        start = first + -first % _HUGE
        if start + _HUGE <= end:  # advice only: refusal changes nothing
            size = (end - start) // _HUGE * _HUGE
            _C_LIBRARY.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), ctypes.c_int(_ADVICE))
    return tensor
