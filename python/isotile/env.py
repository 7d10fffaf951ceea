"""The only reader of ISOTILE_* environment variables."""

from __future__ import annotations

import os
from pathlib import Path


def backend() -> str | None:
    """`ISOTILE_BACKEND`: the backend that every call must use, as `use_backend` would force it."""
    return os.environ.get("ISOTILE_BACKEND") or None


def instruction_set() -> str | None:
    """`ISOTILE_CPU_ISA`: the instruction set of the cpu backend, instead of the best that this CPU runs."""
    return os.environ.get("ISOTILE_CPU_ISA") or None


def cache_dir() -> Path:
    """`ISOTILE_CACHE_DIR`: where compiled kernels and measured machine peaks are kept."""
    given = os.environ.get("ISOTILE_CACHE_DIR")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "isotile"
