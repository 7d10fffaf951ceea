"""Kernel tests run in a process of their own: `TRITON_INTERPRET=1 pytest tests/triton`."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_COMPILER = {"test_aot.py", "test_interpreted.py", "test_launch.py"}

if INTERPRETED:
    from _load import backend

    backend("_triton_interpreter").install()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.path.parent != Path(__file__).parent:
            continue
        if (item.path.name in NEEDS_COMPILER) == INTERPRETED:
            why = "compiles kernels" if INTERPRETED else "interprets kernels; test_interpreted.py starts that process"
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)
