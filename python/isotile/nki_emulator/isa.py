"""`nki.isa`: the instructions, their enums and their errors."""

from __future__ import annotations

from .compute import *  # noqa: F403
from .constants import engine
from .dma import *  # noqa: F403
from .matmul import *  # noqa: F403

vector_engine, scalar_engine, gpsimd_engine = engine.vector, engine.scalar, engine.gpsimd
