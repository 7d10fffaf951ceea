"""The errors and warnings that isotile adds to Python's own ValueError and TypeError."""

from __future__ import annotations


class BackendError(RuntimeError):
    """A backend that was explicitly asked for cannot serve the call; the message says why and what would help."""


class FallbackWarning(UserWarning):
    """The preferred backend refused a call, and the next one runs it."""
