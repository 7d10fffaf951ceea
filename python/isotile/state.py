"""What the caller asked for: a backend, determinism. A context variable, so threads and tasks do not mix."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Iterator

from . import env


@dataclasses.dataclass(frozen=True)
class State:
    """The choices in force. Part of every plan's key; equal choices are the same object, hashed by identity."""

    backend: str | None = None
    deterministic: bool = False
    batch_invariant: bool = False
    __hash__ = object.__hash__

    def __eq__(self, other: object) -> bool:
        return self is other


@functools.cache
def _state(backend: str | None, deterministic: bool, batch_invariant: bool) -> State:
    return State(backend, deterministic, batch_invariant)


CURRENT: contextvars.ContextVar[State] = contextvars.ContextVar(
    "isotile_state",
    default=_state(env.backend(), False, False),  # noqa: B039 (frozen)
)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every isotile call on one backend, or raise: context manager and decorator.

    Args:
        name: `"cpu"`, `"triton"`, `"nki"` or `"reference"`.

    Raises:
        ValueError: no backend has that name.
        BackendError: at the call, where the backend is unavailable or refuses; the message says why.
    """
    from .backends import BACKENDS

    if name not in BACKENDS:
        raise ValueError(f"isotile.use_backend: name: wanted one of {', '.join(map(repr, BACKENDS))}, got {name!r}")
    now = CURRENT.get()
    token = CURRENT.set(_state(name, now.deterministic, now.batch_invariant))
    try:
        yield
    finally:
        CURRENT.reset(token)


@contextlib.contextmanager
def determinism(batch_invariant: bool = False) -> Iterator[None]:
    """Make every operator, forward and backward, bitwise repeatable: context manager and decorator.

    Args:
        batch_invariant: also make row i of a batch bitwise equal to that row alone. A backend that cannot promise
            it for a call refuses the call.
    """
    now = CURRENT.get()
    token = CURRENT.set(_state(now.backend, True, bool(batch_invariant)))
    try:
        yield
    finally:
        CURRENT.reset(token)
