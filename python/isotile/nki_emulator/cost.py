"""Modelled engine time of a traced kernel. Never a measurement: formulas and clocks of the documentation, summed.

Cycles for each instruction follow the formulas that the SDK documented last for version 2.26.1 (N elements per
partition, at least 64 cycles), with the automatic modes of the Vector engine from gen3 on. Two readings are ours:
from gen3 on Vector takes 256 float32 (512 16-bit) elements a cycle, so an operation with two SBUF inputs costs N
rather than 2N, and N / 2 in the documented 2x mode; GpSimd, with 128, keeps 2N. DMA time is bytes over the practical
rate, cut in proportion below 2 KiB contiguous and below 128 partitions; HBM traffic is also held against the core's
share of the chip's bandwidth. The kernel cannot be faster than its busiest engine with a DMA's start
before and after (`overlapped_us`), nor slower than all of them in turn (`serial_us`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

MII = 64
GPSIMD_START = 150
DMA_START_US = 1.3
RUN_BYTES = 2048
ENGINES = ("tensor", "vector", "scalar", "gpsimd", "dma")


@dataclass(frozen=True)
class Rates:
    """Clocks in GHz; bytes per ns of one core: practical DMA, and its share of the chip's HBM bandwidth."""

    tensor: float
    vector: float
    scalar: float
    gpsimd: float
    dma: float
    hbm: float

    @property
    def tensor_flops_per_us(self):
        """Peak of the 128 x 128 array on 16-bit operands."""
        return 2 * 128 * 128 * self.tensor * 1e3


RATES = {
    2: Rates(2.8, 1.12, 1.4, 1.4, 272, 820 / 2),
    3: Rates(2.4, 0.96, 1.2, 1.2, 368, 2900 / 8),
    4: Rates(2.4, 1.2, 1.2, 1.2, 528, 4900 / 8),
}

_SIXTEEN = {"bfloat16", "float16"}


def _narrow(info, extra=()):
    return all(d in _SIXTEEN or d in extra for d in info["dtypes"])


def _vector_cycles(name, n, info, generation):
    psum = any(info.get("psum", ()))
    if name in ("tensor_copy", "tensor_scalar"):
        if generation >= 3 and _narrow(info):
            return n / 4 if not psum and all(info["contiguous"]) else n / 2
        return n
    if name in ("tensor_tensor", "scalar_tensor_tensor"):
        narrow = _narrow(info)
        if generation >= 3:
            return n / 2 if name == "tensor_tensor" and narrow and not psum else n
        if name == "tensor_tensor":
            quick = narrow and all(info["contiguous"]) and info.get("op") in ("add", "multiply", "subtract")
            return n if psum or quick else 2 * n
        return n if narrow and info.get("op") == ("subtract", "multiply") and n % 2 == 0 else 2 * n
    if name == "tensor_reduce":
        return n / 2 if all(d == "bfloat16" for d in info["dtypes"]) and info.get("op") in ("add", "maximum") else n
    if name == "memset":
        return n / 2 if info.get("zero") and _narrow(info) else n
    if name == "tensor_copy_predicated":
        return n if psum else 2 * n
    if name == "tensor_tensor_scan":
        return 2 * n
    if name == "bn_aggr":
        return 13 * n / 3
    if name == "reciprocal":
        return 8 * n
    if name == "exponential":
        return n / 4
    if name == "quantize_mx":
        return n / 4
    if name == "tensor_scalar_reduce":
        return max(MII, n) + MII
    return n


def busy_ns(instruction, generation: int) -> tuple[str, float]:
    """(engine, nanoseconds) of one traced instruction."""
    rates, info, n, name = RATES[generation], instruction.info, instruction.n, instruction.name
    engine = instruction.engine
    if engine == "dma":
        rate = rates.dma
        if info.get("transpose"):
            rate *= 0.9 if info["hbm_read"] else 0.5
        else:
            rate *= min(1.0, info["run_bytes"] / RUN_BYTES) * min(1.0, info["partitions"] / 128)
        return "dma", max(info["bytes"] / rate, (info["hbm_read"] + info["hbm_write"]) / rates.hbm)
    if engine == "tensor":
        if name == "nc_transpose":
            return "tensor", max(info["p"], min(64, info["f"])) / rates.tensor
        passes = 4 if "float32" in info["dtypes"][1:] else 1
        return "tensor", passes * max(min(64, info["m"]), info["n"]) / rates.tensor
    if engine == "scalar":
        return "scalar", (max(MII, n) + (MII if info.get("accumulator") else 0)) / rates.scalar
    if engine == "gpsimd":
        return "gpsimd", (GPSIMD_START + (2 * n if name == "tensor_tensor" else n)) / rates.gpsimd
    if engine == "vector":
        return "vector", max(MII, _vector_cycles(name, n, info, generation)) / rates.vector
    return engine, 0.0


@dataclass
class Estimate:
    """Modelled time of one core."""

    generation: int
    busy_us: dict = field(default_factory=lambda: dict.fromkeys(ENGINES, 0.0))
    instructions: dict = field(default_factory=lambda: dict.fromkeys(ENGINES, 0))
    hbm_bytes: int = 0

    @property
    def critical(self) -> str:
        return max(self.busy_us, key=self.busy_us.__getitem__)

    @property
    def overlapped_us(self) -> float:
        """With perfect overlap of the engines: the busiest one's time, between the first load's start and the last
        store's."""
        return max(self.busy_us.values()) + (2 * DMA_START_US if self.instructions["dma"] else 0.0)

    @property
    def serial_us(self) -> float:
        """Without any overlap, each DMA with its start latency."""
        return sum(self.busy_us.values()) + self.instructions["dma"] * DMA_START_US

    def tensor_share(self, flops: float) -> float:
        """Useful operations against the Tensor engine's 16-bit peak over the overlapped time."""
        return flops / (RATES[self.generation].tensor_flops_per_us * self.overlapped_us)

    def hbm_share(self, useful_bytes: float) -> float:
        """Bytes that must move against the core's HBM share over the overlapped time."""
        return useful_bytes / (RATES[self.generation].hbm * 1e3 * self.overlapped_us)


def estimate(trace: Iterable, generation: int) -> Estimate:
    """Model a trace (`session.last[core].trace`)."""
    result = Estimate(generation)
    for instruction in trace:
        engine, ns = busy_ns(instruction, generation)
        if engine in result.busy_us:
            result.busy_us[engine] += ns / 1e3
            result.instructions[engine] += 1
        if engine == "dma":
            result.hbm_bytes += instruction.info["hbm_read"] + instruction.info["hbm_write"]
    return result


def summary(runs: Iterable) -> dict:
    """What a sequence of launches (`session.runs`: a report for each core of each) is modelled to take, in seconds.

    A launch takes as long as its slower core. `busy_s` is of the slower cores, engine by engine.
    """
    busy = dict.fromkeys(ENGINES, 0.0)
    total = serial = 0.0
    hbm_bytes, launches, cores, generation, sbuf, psum = 0, 0, 1, 0, 0, 0
    for reports in runs:
        estimates = [estimate(r.trace, r.generation) for r in reports]
        slowest = max(estimates, key=lambda e: e.overlapped_us)
        total += slowest.overlapped_us / 1e6
        serial += slowest.serial_us / 1e6
        for engine, us in slowest.busy_us.items():
            busy[engine] += us / 1e6
        hbm_bytes += sum(e.hbm_bytes for e in estimates)
        launches, cores, generation = launches + 1, len(reports), slowest.generation
        sbuf = max(sbuf, *(r.peak_sbuf_bytes for r in reports))
        psum = max(psum, *(r.peak_psum_banks for r in reports))
    return {
        "generation": generation,
        "cores": cores,
        "launches": launches,
        "overlapped_s": total,
        "serial_s": serial,
        "busy_s": busy,
        "critical": max(busy, key=busy.__getitem__),
        "hbm_bytes": hbm_bytes,
        "peak_sbuf_bytes": sbuf,
        "peak_psum_banks": psum,
    }


def shares(summed: dict, flops: float, useful_bytes: float) -> dict:
    """A summary's useful work against the peaks of its cores over the overlapped time."""
    rates = RATES[summed["generation"]]
    time_us = summed["overlapped_s"] * 1e6 * summed["cores"]
    return {
        "tensor_share": flops / (rates.tensor_flops_per_us * time_us),
        "hbm_share": useful_bytes / (rates.hbm * 1e3 * time_us),
    }
