"""Records in which a kernel file describes its work: made once per signature, replayed by the backend."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch


@dataclass(frozen=True, eq=False)
class Scratch:
    """Temporary device memory of one call: contiguous, uninitialised. The same object is the same memory."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    role: ClassVar[str] = "scratch"

    @property
    def strides(self) -> tuple[int, ...]:
        strides, step = [], 1
        for size in reversed(self.shape):
            strides.append(step)
            step *= max(size, 1)
        return tuple(reversed(strides))

    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True, eq=False)
class Descriptor:
    """A host TMA descriptor argument over the memory of `base`, a View or Scratch; sizes and strides in elements."""

    base: object
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block: tuple[int, ...]
    role: ClassVar[str] = "descriptor"


@dataclass(frozen=True, eq=False)
class Launch:
    """One kernel launch. Views, Scratch and Descriptors in `args` become pointers; `meta` holds the constants.

    `fallback` runs instead if the memory of a Descriptor does not start on 16 bytes, which only the call itself knows.
    """

    kernel: object
    grid: tuple[int, ...]
    args: tuple
    meta: dict = field(default_factory=dict)
    fallback: tuple = ()
