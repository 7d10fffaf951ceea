"""The machine: what it is, and the roofline it reaches, measured on the spot."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

import isotile

from .. import env
from ..backends import BACKENDS
from ..state import use_backend
from ..testing.recipes import dtype_name
from .timing import least

#: Peaks are measured anew after this many hours: a virtual machine moves.
KEEP_HOURS = 24
DEFAULT_CACHE = 32 << 20


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def last_level_cache() -> int:
    """Bytes of the last-level cache; 32 MiB where the system does not say."""
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * units[text[-1]] if text[-1:] in units else int(text or 0))
    return max(sizes, default=DEFAULT_CACHE)


def instruction_set() -> str | None:
    return BACKENDS["cpu"].info().get("instruction_set")


def commit() -> dict[str, Any] | None:
    """The commit of the checkout that isotile runs from, and whether tracked files were changed; else None."""
    here = str(Path(__file__).parent)
    questions = (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"], ["ls-files", "--error-unmatch", __file__])
    try:
        run = [
            subprocess.run(["git", "-C", here, *words], capture_output=True, text=True, timeout=10)
            for words in questions
        ]
    except (OSError, subprocess.TimeoutExpired):
        return None
    if run[0].returncode or run[2].returncode:  # no checkout, or one that only surrounds an installed copy
        return None
    return {"commit": run[0].stdout.strip(), "changed": bool(run[1].stdout.strip())}


def provenance(command: Iterable[str]) -> dict[str, Any]:
    """Everything that a reader of the figures needs to know of how they came to be."""
    return {
        "date": now(),
        "command": " ".join(["isotile", "bench", *command]),
        "isotile": isotile.__version__,
        "git": commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.platform(terse=True),
        "machine": platform.machine(),
        "processor": processor(),
        "device_name": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": instruction_set(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "last_level_cache": last_level_cache(),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
    }


def now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def bandwidth(quick: bool) -> float:
    """Bytes a second of what no cache holds: the better of a copy (read and written) and a sum (read)."""
    size = min(max(4 * last_level_cache(), 64 << 20), 1 << 30)
    source = torch.zeros(size // 4, dtype=torch.float32)
    target = torch.ones_like(source)
    rounds = 5 if quick else 20
    return max(2 * size / least(lambda: target.copy_(source), 1, rounds), size / least(source.sum, 1, rounds))


def products(dtype: torch.dtype, quick: bool) -> float:
    """Operations a second of a large square product: the best of PyTorch's and the cpu backend's."""
    n = 1024 if quick else 1536
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(n, n, generator=generator).to(dtype) for _ in range(2))
    rounds = 5 if quick else 15
    best = least(lambda: torch.matmul(a, b), 1, rounds)
    if BACKENDS["cpu"].unavailable("cpu") is None:
        with use_backend("cpu"):
            best = min(best, least(lambda: isotile.matmul(a, b), 1, rounds))
    return 2 * n**3 / best


class Peaks:
    """The roofline for one number of threads: bandwidth, and operations a second for each dtype.

    Kept in `env.cache_dir()/peaks.json` under the processor, the threads and the versions.
    """

    def __init__(self, quick: bool = False, fresh: bool = False) -> None:
        self.quick = quick
        self.path = env.cache_dir() / "peaks.json"
        self.key = " | ".join(
            map(str, (processor(), torch.get_num_threads(), torch.__version__, isotile.__version__, instruction_set(),
                      "quick" if quick else "full"))
        )  # fmt: skip
        self.values: dict[str, Any] = {"date": now()}
        if not fresh:
            kept = self._read().get(self.key)
            if kept is not None and _hours_since(kept["date"]) < KEEP_HOURS:
                self.values = kept

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.read_text())
        except (OSError, json.JSONDecodeError):
            return {}  # nothing kept, or cut off while it was written: measure

    def _keep(self) -> None:
        everything = {**self._read(), self.key: self.values}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(everything, indent=1, sort_keys=True))
        part.replace(self.path)

    def bandwidth(self) -> float:
        if "bandwidth" not in self.values:
            self.values["bandwidth"] = bandwidth(self.quick)
            self._keep()
        return self.values["bandwidth"]

    def flops(self, dtype: torch.dtype) -> float:
        """Where a dtype's own product is slower than float32's (float16 without instructions for it), float32's."""
        for each in (dtype, torch.float32):
            if dtype_name(each) not in self.values:
                self.values[dtype_name(each)] = products(each, self.quick)
                self._keep()
        own = self.values[dtype_name(dtype)]
        return own if dtype == torch.float64 else max(own, self.values["float32"])

    def least_seconds(self, flops: float, moved: float, dtype: torch.dtype) -> float:
        """The roofline: no kernel of these operations and bytes from memory is faster."""
        return max(flops / self.flops(dtype), moved / self.bandwidth())


def _hours_since(date: str) -> float:
    then = datetime.datetime.fromisoformat(date)
    return (datetime.datetime.now(datetime.UTC) - then).total_seconds() / 3600
