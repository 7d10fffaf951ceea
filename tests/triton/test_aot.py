"""Every kernel compiles for every target, by its own choice and by each shipped configuration (bench/triton_aot.py).

The whole table takes half an hour, so each target compiles one shard of it. Which one depends on the content of the
kernels and the tables: every change meets another shard, the same tree always the same.
"""

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")


SHARDS = 14


def _content():
    digest = hashlib.sha256()
    for path in sorted([*ROOT.glob("kernels/triton/*.py"), *ROOT.glob("python/isotile/tuning/triton/*/*.json")]):
        digest.update(path.read_bytes())
    return int.from_bytes(digest.digest()[:8], "big")


@pytest.mark.parametrize("index,target", enumerate(TARGETS))
def test_kernels_compile(index, target):
    command = [
        sys.executable,
        ROOT / "bench" / "triton_aot.py",
        "--targets",
        target,
        "--shard",
        f"{(_content() + index) % SHARDS}/{SHARDS}",
    ]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-4000:]
