"""CPU tensors on pages of 2 MB, which a kernel reads a large weight from with far fewer address translations."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch

_HUGE = 2 << 20


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised contiguous tensor, on Linux's transparent huge pages if it fills any and the system has them.

    Its storage cannot be resized.
    """
    size = math.prod(shape) * dtype.itemsize
    if size < _HUGE or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, dtype=dtype, device="cpu")
    memory = mmap.mmap(-1, size + _HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    start = -whole.data_ptr() % _HUGE
    with contextlib.suppress(OSError):  # a system without them: the memory serves as it is
        memory.madvise(mmap.MADV_HUGEPAGE, start, size // _HUGE * _HUGE)
    return whole[start : start + size].view(dtype).view(shape)


def moved(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of the tensor on such pages; the tensor itself if it is small or on another device."""
    if not tensor.is_cpu or tensor.nbytes < _HUGE:
        return tensor
    return empty(tuple(tensor.shape), tensor.dtype).copy_(tensor)
