"""The emulated core: generation limits, memory with accounting, the instruction trace, and two-core rendezvous."""

from __future__ import annotations

import contextlib
import enum
import os
import threading
from dataclasses import dataclass, field
from typing import Any, NoReturn

import numpy as np

from .dtypes import DType, poison

PMAX = 128
BANK_BYTES = 2048
PSUM_BANKS = 8
PAGES = "awsdocs-neuron.readthedocs-hosted.com/en/v2.32.0/nki/api/generated/"
TENSOR_PAGE = "awsdocs-neuron.readthedocs-hosted.com/en/v2.32.0/nki/api/, class NkiTensor"


class NkiValidationError(Exception):
    """What the compiler or the hardware would refuse: instruction, operand, limit, and the page that states it."""


class NkiIndexError(NkiValidationError, IndexError):
    """An index, slice or access pattern outside its tensor."""


class MemoryRegion(enum.Enum):
    sbuf = "sbuf"
    psum = "psum"
    private_hbm = "private_hbm"
    shared_hbm = "shared_hbm"

    def __str__(self):
        return self.value

    @property
    def on_chip(self):
        return self in (MemoryRegion.sbuf, MemoryRegion.psum)


class nc_version(enum.IntEnum):
    gen2 = 2
    gen3 = 3
    gen4 = 4


@dataclass(frozen=True)
class Generation:
    """Sizes of one NeuronCore generation. Usable SBUF is the physical size less a 16 KiB reserve per partition."""

    version: nc_version
    sbuf_partition_bytes: int
    sbuf_usable_bytes: int


GENERATIONS = {
    2: Generation(nc_version.gen2, 192 * 1024, 176 * 1024),
    3: Generation(nc_version.gen3, 224 * 1024, 208 * 1024),
    4: Generation(nc_version.gen4, 256 * 1024, 240 * 1024),
}
TARGETS = {"trn1": 2, "inf2": 2, "gen2": 2, "trn2": 3, "gen3": 3, "trn3": 4, "gen4": 4}


def target_generation(target: str | None = None) -> int:
    """Generation of an explicit target, else of NEURON_PLATFORM_TARGET_OVERRIDE, else trn3 (the SDK's default)."""
    name = target or os.environ.get("NEURON_PLATFORM_TARGET_OVERRIDE") or "trn3"
    if name not in TARGETS:
        raise NkiValidationError(f"unknown platform target {name!r}; known: {', '.join(TARGETS)}")
    return TARGETS[name]


def psum_banks(generation: int) -> int:
    """One of the eight is reserved while dma_transpose is lowered to the Tensor engine."""
    lowered = os.environ.get("NKI_DMA_TRANSPOSE_AS_PE_TRANSPOSE", "").lower() == "true"
    return PSUM_BANKS - (1 if lowered and generation >= 3 else 0)


def refuse(instruction: str, operand: str | None, message: str, kind=NkiValidationError) -> NoReturn:
    """Raise for an instruction (`tensor_copy`), an `nl` function (`nl.ndarray`) or a view (`NkiTensor.slice`)."""
    where = instruction if "." in instruction else f"nisa.{instruction}"
    if where.startswith("NkiTensor"):
        page = TENSOR_PAGE
    else:
        page = PAGES + where.replace("nisa.", "nki.isa.", 1).replace("nl.", "nki.language.", 1) + ".html"
    raise kind(f"{where}: {f'operand `{operand}`: ' if operand else ''}{message} [{page}]")


@dataclass
class Instruction:
    """One traced instruction. `n` is elements per partition of the main input; the cost model reads `info`."""

    index: int
    name: str
    engine: str
    n: int
    info: dict
    reads: tuple = ()  # (storage id, partition start, partition end, byte start, byte end)
    writes: tuple = ()


class NkiInstruction:
    """Handle that an instruction returns, for scheduling only."""

    def __init__(self, handle=None):
        self.handle = handle

    def depends_on(self, *producers):
        return self


class Storage:
    """Bytes of one allocation. On chip: `partitions` rows of `row_bytes`; in HBM: one row of everything."""

    __slots__ = ("__weakref__", "buffer", "data", "id", "name", "partitions", "psum_state", "row_bytes", "scope")

    def __init__(self, ident, buffer, partitions, row_bytes, name, data):
        self.id, self.buffer, self.partitions, self.row_bytes, self.name = ident, buffer, partitions, row_bytes, name
        self.data = data
        self.psum_state = None
        self.scope = 0  # the dynamic loop iteration that made it; 0 is the kernel's own body

    @property
    def nbytes(self):
        return self.partitions * self.row_bytes


# State of each PSUM location, kept at the first byte of an element.
PSUM_WRITTEN, PSUM_MATMUL, PSUM_OPEN = 1, 2, 4


class Accumulator:
    """Per-partition float32 register of an engine, with who may still read it."""

    def __init__(self):
        self.value = np.zeros(PMAX, np.float32)
        self.valid = np.zeros(PMAX, bool)


@dataclass
class Report:
    """What one core did: the trace and the memory it needed."""

    generation: int
    core: int = 0
    trace: list = field(default_factory=list)
    allocations: dict = field(default_factory=dict)  # id -> [buffer, partitions, row_bytes, name, first, last]
    peak_sbuf_bytes: int = 0  # per partition, of live tiles
    peak_psum_banks: int = 0

    def measure(self):
        """Peak use from live ranges in program order: a tile lives from its first to its last instruction."""
        events: dict[int, list] = {}
        for buffer, partitions, row_bytes, _, first, last in self.allocations.values():
            if first is None or not buffer.on_chip:
                continue
            # A tile of few partitions can share its bytes with others: count it by 32-partition quadrants.
            share = -(-partitions // 32) if partitions <= 64 else 4
            events.setdefault(first, []).append((buffer, share, row_bytes, 1))
            events.setdefault(last + 1, []).append((buffer, share, row_bytes, -1))
        sbuf = psum = 0
        big_banks = 0
        for when in sorted(events):
            for buffer, share, row_bytes, sign in events[when]:
                if buffer is MemoryRegion.sbuf:
                    sbuf += sign * share * row_bytes
                else:
                    psum += sign * share * row_bytes
                    if share == 4 and row_bytes > BANK_BYTES // 2:
                        big_banks += sign * -(-row_bytes // BANK_BYTES)
            self.peak_sbuf_bytes = max(self.peak_sbuf_bytes, -(-sbuf // 4))
            self.peak_psum_banks = max(self.peak_psum_banks, big_banks, -(-psum // (4 * BANK_BYTES)))

    def check(self):
        limit = GENERATIONS[self.generation].sbuf_usable_bytes
        if self.peak_sbuf_bytes > limit:
            live = sorted(self.allocations.values(), key=lambda a: -a[2])
            names = ", ".join(f"{a[3] or 'tile'} {a[2]} B" for a in live[:4] if a[0] is MemoryRegion.sbuf)
            raise NkiValidationError(
                f"SBUF overflow: live tiles need {self.peak_sbuf_bytes} bytes per partition, "
                f"gen{self.generation} has {limit} "
                f"usable (largest: {names}) [{PAGES}nki.language.tile_size.html]"
            )
        banks = psum_banks(self.generation)
        if self.peak_psum_banks > banks:
            raise NkiValidationError(
                f"PSUM overflow: live tiles need {self.peak_psum_banks} banks of {BANK_BYTES} bytes per partition, "
                f"the core has {banks} [{PAGES}nki.language.tile_size.html]"
            )


class Pair:
    """What the two cores of an LNC2 launch share."""

    def __init__(self, size: int):
        self.size = size
        self.lock = threading.Condition()
        self.storages: dict[int, Storage] = {}  # shared_hbm allocations by ordinal
        self.mail: dict[tuple, list] = {}
        self.arrived = [0] * size
        self.finished = [False] * size
        self.failed = False

    def wait(self, core: int, what: str, ready):
        """Block until `ready()`; a peer that ended or failed first is an error, never a hang."""
        with self.lock:
            self.lock.notify_all()
            while not ready():
                if self.failed:
                    raise PeerFailed(f"core {core}: the other core failed while this one waited in {what}")
                if any(done for i, done in enumerate(self.finished) if i != core):
                    raise NkiValidationError(
                        f"nisa.{what}: core {core} waits but the other core has finished: "
                        f"control flow around {what} diverged "
                        f"[{PAGES}nki.isa.{what}.html]"
                    )
                self.lock.wait(timeout=0.5)

    def barrier(self, core: int):
        with self.lock:
            self.arrived[core] += 1
            mine = self.arrived[core]
            self.lock.notify_all()
        self.wait(core, "core_barrier", lambda: all(a >= mine for a in self.arrived))

    def end(self, core: int, failed: bool):
        with self.lock:
            self.finished[core] = True
            self.failed = self.failed or failed
            self.lock.notify_all()


class PeerFailed(Exception):
    """The other core raised; its own exception is the one reported."""


class Core:
    """One physical core running a kernel. `dry` keeps shapes, rules and the trace but computes nothing."""

    def __init__(self, generation: int, core: int, pair: Pair, grid: int, *, dry=False, record=True):
        self.generation = generation
        self.spec = GENERATIONS[generation]
        self.core = core
        self.pair = pair
        self.grid = grid  # 0 without a launch grid
        self.dry = dry
        self.record = record
        self.report = Report(generation, core)
        self.next_id = core
        self.shared_count = 0
        self.scalar_acc = Accumulator()
        self.vector_acc = Accumulator()
        self.identities: dict[tuple, Any] = {}
        self.rng_vector = np.random.Generator(np.random.Philox(0x5EED + core))
        self.xorwow: dict[str, np.ndarray] = {}
        self.no_reorder = 0
        self.count = 0
        self.scopes = [0]  # iterations of dynamic loops that are running, innermost last
        self.scope_count = 0

    def allocate(self, buffer, partitions, row_bytes, name, dtype: DType, data=None) -> Storage:
        if buffer is MemoryRegion.shared_hbm and data is None and self.pair.size > 1:
            return self._shared(partitions, row_bytes, name, dtype)
        return self._new(buffer, partitions, row_bytes, name, dtype, data)

    def _new(self, buffer, partitions, row_bytes, name, dtype, data=None):
        ident = self.next_id
        self.next_id += self.pair.size
        storage = Storage(ident, buffer, partitions, row_bytes, name, data)
        if data is None and not self.dry:
            count = partitions * row_bytes // dtype.itemsize
            storage.data = np.full(count, poison(dtype), dtype.dtype).view(np.uint8)
        if buffer is MemoryRegion.psum and not self.dry:
            storage.psum_state = np.zeros(storage.nbytes, np.uint8)
        if buffer.on_chip:
            self.report.allocations[ident] = [buffer, partitions, row_bytes, name, None, None]
            storage.scope = self.scopes[-1]
        return storage

    def _shared(self, partitions, row_bytes, name, dtype):
        """Both cores run the same code, so their n-th shared_hbm allocations are one tensor."""
        key = self.shared_count
        self.shared_count += 1
        with self.pair.lock:
            found = self.pair.storages.get(key)
            if found is None:
                found = self._new(MemoryRegion.shared_hbm, partitions, row_bytes, name, dtype)
                self.pair.storages[key] = found
            elif found.nbytes != partitions * row_bytes:
                raise NkiValidationError(
                    f"nl.ndarray: shared_hbm allocation {key} has {found.nbytes} bytes on one "
                    f"core and {partitions * row_bytes} "
                    "on the other: allocate shared tensors in the same order on both cores"
                )
            return found

    @contextlib.contextmanager
    def iteration(self):
        """One iteration of a dynamic loop: tiles made inside are gone afterwards."""
        self.scope_count += 1
        self.scopes.append(self.scope_count)
        try:
            yield
        finally:
            self.scopes.pop()

    def emit(self, name, engine, n, reads=(), writes=(), /, **info):
        """Record an instruction and keep the PSUM state and live ranges."""
        index = self.count
        self.count += 1
        allocations = self.report.allocations
        read_areas: list[tuple] = []
        write_areas: list[tuple] = []
        for tensors, areas in ((reads, read_areas), (writes, write_areas)):
            for tensor in tensors:
                storage = tensor.storage
                if storage.scope and storage.scope not in self.scopes:
                    refuse(
                        name, None, f"{tensor!r} was made inside a fori_loop or while_loop body and is not visible here"
                    )
                seen = allocations.get(storage.id)
                if seen is not None:
                    if seen[4] is None:
                        seen[4] = index
                    seen[5] = index
                if self.record:
                    areas.append((storage.id, *tensor.extent()))
        if not self.dry and name != "nc_matmul" and name != "nc_matmul_mx":
            for tensor in reads:
                if tensor.storage.psum_state is not None:
                    state = tensor.psum_state()
                    np.bitwise_and(state, 255 ^ PSUM_OPEN, out=state)
            for tensor in writes:
                if tensor.storage.psum_state is not None:
                    tensor.psum_state()[...] = PSUM_WRITTEN
        instruction = Instruction(index, name, engine, n, info, tuple(read_areas), tuple(write_areas))
        if self.record:
            self.report.trace.append(instruction)
        return NkiInstruction(instruction)


_active = threading.local()


def current() -> Core | None:
    return getattr(_active, "core", None)


def active() -> Core:
    core = current()
    if core is None:
        raise RuntimeError("NKI operations need an active kernel: call the function through nki.simulate or nki.jit")
    return core


def activate(core: Core | None):
    _active.core = core
