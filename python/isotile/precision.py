"""Which dtype a reference computes in, and when it rounds.

A reference function is written once and read two ways. Called plainly it is the `reference` backend: it accumulates in
float32 (float64 for float64) and rounds its result to the result dtype. Under `exact()` the same code is the truth of
every test: it computes in float64 on the same, already rounded inputs, and does not round its result. Roundings that
belong to an operator's meaning (`rounded`) happen in both.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

import torch

_EXACT: contextvars.ContextVar[bool] = contextvars.ContextVar("isotile_exact", default=False)


@contextlib.contextmanager
def exact() -> Iterator[None]:
    """Within the context, reference functions compute in float64 and return float64."""
    token = _EXACT.set(True)
    try:
        yield
    finally:
        _EXACT.reset(token)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that a result of `dtype` is accumulated in."""
    return torch.float64 if _EXACT.get() or dtype == torch.float64 else torch.float32


def stored(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value` as an operator returns it: rounded to `dtype`, or left exact under `exact()`."""
    return value if _EXACT.get() else value.to(dtype)


def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`value` rounded to `dtype` and back: a rounding that is part of an operator's meaning."""
    return value.to(dtype).to(value.dtype)
