"""Distributions of errors, and digests and samples of results."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import zlib
from typing import Any

import numpy as np
import torch

from ..testing.check import bits
from ..testing.compare import Bound, ulp
from ..testing.draws import Random

#: Half-octave bins from 2^-LOW to 2^HIGH; below and above there is one each.
LOW, HIGH = 24, 12
QUANTILES = {"median": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999}


class Distribution:
    """Counts of non-negative values in half-octave bins, and their largest."""

    def __init__(self) -> None:
        self.zero = 0
        self.counts = np.zeros(2 * (LOW + HIGH) + 2, np.int64)
        self.largest = 0.0

    def add(self, values: torch.Tensor) -> None:
        values = values[values > 0].double()
        if not values.numel():
            return
        self.largest = max(self.largest, float(values.max()))
        place = (2 * values.log2() + 2 * LOW).floor().clamp(-1, 2 * (LOW + HIGH)).long() + 1
        self.counts += torch.bincount(place, minlength=len(self.counts)).numpy()

    def add_zeros(self, count: int) -> None:
        self.zero += count

    def quantile(self, share: float) -> float:
        """An upper edge: this share of the values is at most it."""
        total = self.zero + int(self.counts.sum())
        wanted, reached = share * total, self.zero
        if reached >= wanted:
            return 0.0
        for i, count in enumerate(self.counts):
            reached += int(count)
            if reached >= wanted:
                return min(self.largest, 2.0 ** ((i - 2 * LOW) / 2))
        return self.largest

    def record(self) -> dict[str, Any]:
        used = np.flatnonzero(self.counts)
        first, last = (int(used[0]), int(used[-1])) if len(used) else (0, -1)
        return {
            "zero": self.zero,
            "first_exponent": (first - 2 * LOW - 1) / 2,
            "counts": self.counts[first : last + 1].tolist(),
            "max": float(f"{self.largest:.6g}"),
            **{name: float(f"{self.quantile(share):.6g}") for name, share in QUANTILES.items()},
        }


@dataclasses.dataclass
class Errors:
    """How far the elements of one operator's results are from the truth."""

    elements: int = 0
    unpromised: int = 0
    share: Distribution = dataclasses.field(default_factory=Distribution)
    ulps: Distribution = dataclasses.field(default_factory=Distribution)

    def add(self, result: torch.Tensor, bound: Bound) -> float:
        """Counts one result's elements; returns the largest error in ulps. What is not finite is the law's to judge."""
        got, want = result.detach().cpu().double(), bound.truth
        finite = got.isfinite() & want.isfinite() & bound.allowed.isfinite()
        error = (got - want).abs()[finite]
        units = error / ulp(want[finite], bound.dtype)
        exact = int((error == 0).sum())
        self.elements += got.numel()
        self.unpromised += int((bound.allowed.isnan() | (bound.allowed.isinf() & want.isfinite())).sum())
        for distribution, values in ((self.share, error / bound.allowed[finite]), (self.ulps, units)):
            distribution.add(values)
            distribution.add_zeros(exact)
        return float(units.max()) if units.numel() else 0.0

    def record(self) -> dict[str, Any]:
        return {
            "elements": self.elements,
            "unpromised": self.unpromised,
            "share_of_bound": self.share.record(),
            "ulps": self.ulps.record(),
        }


def canonical(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with one NaN for all, and one zero: NaN's payload and zero's sign are nobody's promise."""
    tensor = tensor.detach().cpu()
    return torch.where(tensor.isnan(), math.nan, tensor) + 0.0 if tensor.is_floating_point() else tensor


def digest(*tensors: torch.Tensor | None) -> str:
    """SHA-256 over dtypes, shapes and elements, 128 bits of it."""
    found = hashlib.sha256()
    for tensor in tensors:
        if tensor is None:
            found.update(b"none;")
            continue
        plain = canonical(tensor).contiguous()
        found.update(f"{plain.dtype}{list(plain.shape)};".encode())
        found.update(bits(plain).numpy().astype(bits(plain).numpy().dtype.newbyteorder("<"), copy=False).tobytes())
    return found.hexdigest()[:32]


def positions(example: str, result: str, seed: int, elements: int, count: int) -> list[int]:
    """Which elements of a result are written down: the same on every machine."""
    if elements <= count:
        return list(range(elements))
    random = Random(seed, zlib.crc32(example.encode()), zlib.crc32(result.encode()))
    return sorted(set(random.integers(0, elements, (count,)).tolist()))


def spell(tensor: torch.Tensor, at: list[int]) -> str:
    """The bits of some elements, in hexadecimal, most significant digit first."""
    chosen = canonical(tensor).flatten()[at]
    width = 2 * chosen.element_size()
    return "".join(f"{v % 16**width:0{width}x}" for v in bits(chosen).tolist())


def read(text: str, dtype: torch.dtype) -> torch.Tensor:
    """The elements that `spell` wrote, as float64."""
    size = dtype.itemsize
    raw = np.frombuffer(bytes.fromhex(text), dtype=f">u{size}").astype(f"=u{size}").view(f"=i{size}")
    return torch.from_numpy(raw.copy()).view(dtype).double()
