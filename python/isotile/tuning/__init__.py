"""Configurations as data: `tuning/<backend>/<device>/<op>.json`, looked up by nearest shape, never measured on a call.

A table's entry holds the problem that it was found for (a kernel's own words for what its best configuration depends
on), the configuration, and how it was found: `measured` on that device, or `modelled`, which is a choice by bytes,
operations and the compiler's own report that no device has confirmed.

A lookup tries the user's tables (`isotile tune` writes them under `env.cache_dir()`), then the package's; in each the
device by its own name, then by its architecture. An entry serves if its words and truths equal the problem's and its
numbers are within its `REACH` in doublings. Without one the kernel's own default stands.
"""

from __future__ import annotations

import functools
import importlib.resources
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .. import env

Problem = Mapping[str, Any]
Config = dict[str, Any]
SOURCES = ("measured", "modelled")
#: The farthest entry that may serve: so many doublings between the numbers of two problems, summed. A kernel's own
#: choice is the model at the very shape, so that a modelled entry serves no other.
REACH = {"measured": 2.0, "modelled": 0.25}


class BadTable(ValueError):
    """A tuning file that is not one; the message says which and why."""


def slug(device_name: str) -> str:
    """A device's name as a folder: `NVIDIA H100 80GB HBM3` is `nvidia_h100_80gb_hbm3`."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_")


def arch_name(kind: str, arch: int | str) -> str:
    """The folder of an architecture: `sm_90`, `gfx942`."""
    return f"sm_{arch}" if kind == "cuda" else str(arch).split(":")[0]


def user_folder() -> Path:
    return env.cache_dir() / "tuning"


def package_folder() -> Any:
    return importlib.resources.files(__name__)


def distance(a: Problem, b: Problem) -> float | None:
    """Doublings between two problems, or None where a word or truth differs and no configuration carries over."""
    if a.keys() != b.keys():
        return None
    total = 0.0
    for name, value in a.items():
        other = b[name]
        if isinstance(value, bool | str) or isinstance(other, bool | str):
            if value != other:
                return None
        else:
            total += abs(math.log2((value + 1) / (other + 1)))
    return total


def check(table: Any, where: str) -> list[dict[str, Any]]:
    """The entries of a table that was read from `where`.

    Raises:
        BadTable: naming the entry that is not whole.
    """
    if not isinstance(table, dict) or not isinstance(table.get("entries"), list):
        raise BadTable(f"{where}: wanted an object with a list of entries")
    for i, entry in enumerate(table["entries"]):
        for name, kind in (("problem", dict), ("config", dict), ("source", str), ("case", str)):
            if not isinstance(entry.get(name), kind):
                raise BadTable(f"{where}: entry {i}: wanted {name} as {kind.__name__}, got {entry.get(name)!r}")
        if entry["source"] not in SOURCES:
            raise BadTable(f"{where}: entry {i}: source: wanted one of {', '.join(SOURCES)}, got {entry['source']!r}")
        if entry["source"] == "measured" and not entry.get("time_us"):
            raise BadTable(f"{where}: entry {i}: a measured entry needs its time_us")
    return table["entries"]


def read(folder: Any, backend: str, device: str, op: str) -> list[dict[str, Any]]:
    """A table's entries; empty where there is no such file."""
    path = folder / backend / device / f"{op}.json"
    if not path.is_file():
        return []
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise BadTable(f"{path}: not JSON ({error})") from None
    return check(table, str(path))


@functools.cache
def entries(backend: str, device: str, op: str) -> tuple[dict[str, Any], ...]:
    """The user's entries, then the package's; read once in a process."""
    own, shipped = read(user_folder(), backend, device, op), read(package_folder(), backend, device, op)
    return (*own, *shipped)


def nearest(found: Sequence[dict[str, Any]], problem: Problem) -> dict[str, Any] | None:
    """The entry with the least distance within reach; the first of equals, measured before modelled."""
    best: tuple[float, int, dict[str, Any]] | None = None
    for entry in found:
        away = distance(entry["problem"], problem)
        if away is None or away > REACH[entry["source"]]:
            continue
        rank = (away, SOURCES.index(entry["source"]))
        if best is None or rank < best[:2]:
            best = (*rank, entry)
    return None if best is None else best[2]


def lookup(backend: str, devices: Sequence[str], op: str, problem: Problem) -> Config | None:
    """The configuration for a problem on the first of `devices` that has one, or None: the kernel's default.

    Args:
        backend: such as `"triton"`.
        devices: folder names, most particular first.
        op: the kernel's name.
        problem: what `kernels/<backend>/<op>.py` says of it.
    """
    for device in devices:
        entry = nearest(entries(backend, device, op), problem)
        if entry is not None:
            return dict(entry["config"])
    return None


def write(folder: Path, backend: str, device: str, op: str, found: Sequence[dict[str, Any]]) -> Path:
    """Writes a table, replacing entries for the same problem and keeping the others; sorted, one entry a line."""
    merged = {_key(e): e for e in read(folder, backend, device, op)}
    for entry in found:
        old = merged.get(_key(entry))
        if old is None or not (old["source"] == "measured" and entry["source"] == "modelled"):
            merged[_key(entry)] = entry
    check({"entries": list(merged.values())}, f"{backend}/{device}/{op}")
    lines = ",\n".join(json.dumps(merged[key], sort_keys=True) for key in sorted(merged))
    path = folder / backend / device / f"{op}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(f'{{"backend": "{backend}", "device": "{device}", "op": "{op}", "entries": [\n{lines}\n]}}\n')
    part.replace(path)
    entries.cache_clear()
    return path


def _key(entry: dict[str, Any]) -> str:
    return json.dumps(entry["problem"], sort_keys=True)
