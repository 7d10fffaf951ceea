"""Runs the whole test suite, as `make test`. Groups that need a process of their own get one."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORKERS = os.environ.get("ISOTILE_TEST_WORKERS", str(os.cpu_count() or 2))


def main() -> int:
    groups = [
        ("everything but the interpreter", ["-n", WORKERS, "--dist", "worksteal", "tests"], {}),
        ("operators through Triton's interpreter", ["-n", WORKERS, "tests/test_triton.py"], {"TRITON_INTERPRET": "1"}),
    ]
    worst = 0
    for title, arguments, environment in groups:
        print(f"== {title}", flush=True)
        began = time.monotonic()
        code = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "--durations=8", *arguments, *sys.argv[1:]],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        ).returncode
        print(f"== {title}: exit {code}, {time.monotonic() - began:.0f} s", flush=True)
        worst = worst or code
    return worst


if __name__ == "__main__":
    sys.exit(main())
