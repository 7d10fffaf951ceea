"""Random draws that are the same bits on every machine, whatever the versions of NumPy and PyTorch.

Of NumPy only the bit generator and its seeding are used, whose streams are promised never to change; the methods of
`numpy.random.Generator`, and PyTorch's generators, may change with versions and vector lengths. What is made of the
bits is integer arithmetic and single float64 operations, which IEEE 754 rounds alike everywhere: no logarithm, no
cosine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

T = TypeVar("T")

#: Normal values drawn at a time, to bound the memory of large draws. Part of the stream's definition.
CHUNK = 1 << 20


class Random:
    """A stream of values given by its seed, any number of non-negative ints."""

    def __init__(self, *seed: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(seed))

    def _words(self, count: int) -> np.ndarray:
        return self._bits.random_raw(count) if count else np.empty(0, np.uint64)

    def uniform(self, shape: Sequence[int] = ()) -> torch.Tensor:
        """float64 in [0, 1), multiples of 2^-53."""
        words = self._words(math.prod(shape))
        return torch.from_numpy((words >> np.uint64(11)) * 2.0**-53).reshape(tuple(shape))

    def normal(self, shape: Sequence[int] = ()) -> torch.Tensor:
        """float64 with mean 0 and variance 1, between -6 and 6.

        The sum of twelve uniform 16-bit integers, and one uniform number below their unit: the distribution of
        Irwin and Hall, which is close to the normal one up to about three standard deviations.
        """
        total = math.prod(shape)
        values = np.empty(total)
        for start in range(0, total, CHUNK):
            count = min(CHUNK, total - start)
            halves = self._words(3 * count).astype("<u8", copy=False).view("<u2").reshape(12, count)
            below = (self._words(count) >> np.uint64(11)) * 2.0**-53
            sums = halves.sum(0, dtype=np.int64)
            values[start : start + count] = ((sums - 393210) + (below - 0.5)) * 2.0**-16
        return torch.from_numpy(values).reshape(tuple(shape))

    def integers(self, low: int, high: int, shape: Sequence[int] = ()) -> torch.Tensor:
        """int64 from `low` to `high` - 1."""
        words = self._words(math.prod(shape)) % np.uint64(high - low)
        return torch.from_numpy((words + np.uint64(low % 2**64)).view(np.int64)).reshape(tuple(shape))

    def powers(self, low: int, high: int, shape: Sequence[int] = ()) -> torch.Tensor:
        """float64 powers of two, with exponents from `low` to `high` - 1."""
        exponents = self.integers(low, high, shape).numpy().astype(np.int32)
        return torch.from_numpy(np.asarray(np.ldexp(1.0, exponents)))

    def integer(self, low: int, high: int) -> int:
        """One int from `low` to `high` - 1."""
        return int(self.integers(low, high))

    def permutation(self, count: int) -> list[int]:
        return np.argsort(self._words(count), kind="stable").tolist()


class Source(Protocol):
    """Where the choices of a recipe come from: a seed, or hypothesis."""

    def choice(self, options: Sequence[T]) -> T: ...

    def integer(self, low: int, high: int) -> int:
        """From `low` to `high`, both included."""
        ...


class Seeded:
    """Choices that a seed decides."""

    def __init__(self, *seed: int) -> None:
        self._random = Random(*seed)

    def choice(self, options: Sequence[T]) -> T:
        return options[self._random.integer(0, len(options))]

    def integer(self, low: int, high: int) -> int:
        return self._random.integer(low, high + 1)


class Drawn:
    """Choices that hypothesis draws, and shrinks."""

    def __init__(self, draw: Any) -> None:
        from hypothesis import strategies

        self._draw, self._strategies = draw, strategies

    def choice(self, options: Sequence[T]) -> T:
        return self._draw(self._strategies.sampled_from(options))

    def integer(self, low: int, high: int) -> int:
        return self._draw(self._strategies.integers(low, high))
