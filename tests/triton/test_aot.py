"""Every kernel compiles for every target: one shard of bench/triton_aot.py's table for each target."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


@pytest.mark.parametrize("index,target", enumerate(TARGETS))
def test_kernels_compile(index, target):
    command = [
        sys.executable,
        ROOT / "bench" / "triton_aot.py",
        "--targets",
        target,
        "--shard",
        f"{index}/{len(TARGETS)}",
    ]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-4000:]
