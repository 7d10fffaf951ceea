"""`nki.jit` and `nki.simulate`: turn arguments into HBM tensors, run one or two cores, hand back arrays."""

from __future__ import annotations

import builtins
import contextlib
import copy
import functools
import inspect
import math
import os
import sys
import threading
import warnings
from typing import Any

import numpy as np

from .dtypes import as_dtype, bool_
from .machine import Core, MemoryRegion, NkiValidationError, Pair, PeerFailed, activate, current, target_generation
from .tensor import NKIObject, NkiTensor, VirtualRegister, allocate

_session = threading.local()


class Session:
    """What runs inside `session(...)` did: one `Report` for each core of each run, in order."""

    def __init__(self, target, dry, record):
        self.target, self.dry, self.record = target, dry, record
        self.runs = []

    @property
    def last(self):
        return self.runs[-1]


@contextlib.contextmanager
def session(target=None, *, dry=False, record=True):
    """Choose the target and collect reports. `dry` checks rules and traces without computing."""
    outer = getattr(_session, "current", None)
    _session.current = Session(target, dry, record)
    try:
        yield _session.current
    finally:
        _session.current = outer


class Kernel:
    """A jitted function; `kernel[2]` launches it on two cores, a call inside a kernel runs inline."""

    def __init__(self, function, grid=0, simulated=False):
        functools.update_wrapper(self, function)
        self.func = function
        self.grid = grid
        self.simulated = simulated

    def __getitem__(self, grid):
        if isinstance(grid, (tuple, list)):
            if len(grid) != 1:
                raise NkiValidationError(f"nki.jit: the launch grid is one number, given {grid!r}")
            grid = grid[0]
        if not isinstance(grid, (int, np.integer)) or grid not in (1, 2):
            raise NkiValidationError(f"nki.jit: a kernel launches on 1 or 2 cores, given {grid!r}")
        return Kernel(self.func, int(grid), self.simulated)

    def with_schedule(self, schedule):
        """Order constraints for the compiler; the emulator runs in program order, which meets them all."""
        return self

    def __get__(self, instance, owner=None):
        return self if instance is None else functools.partial(self, instance)

    def __call__(self, *args, **kwargs):
        if current() is not None:
            return self.func(*args, **kwargs)
        return run(self.func, self.grid, args, kwargs)


def jit(fn=None, **kwargs):
    """Wrap a function as a kernel. Options of the compiler (mode, debug flags, configs) are accepted and ignored."""
    if kwargs.get("platform_target") is not None:
        warnings.warn("nki.jit: platform_target is ignored; use NEURON_PLATFORM_TARGET_OVERRIDE", stacklevel=2)
    if fn is None:
        return functools.partial(jit, **kwargs)
    return fn if isinstance(fn, Kernel) else Kernel(fn)


def simulate(kernel):
    """nki.simulate(kernel)(arrays) or nki.simulate(kernel[2])(arrays)."""
    return Kernel(kernel.func, kernel.grid, True) if isinstance(kernel, Kernel) else Kernel(kernel, 0, True)


def _torch():
    return sys.modules.get("torch")


def _is_torch(value):
    torch = _torch()
    return torch is not None and isinstance(value, torch.Tensor)


class _Arguments:
    """Arrays seen so far: each becomes one HBM storage shared by both cores, updated in place."""

    def __init__(self):
        self.known = {}
        self.copies = []
        self.saw_torch = False

    def array(self, value):
        """(contiguous NumPy array over the caller's memory if possible, dtype)."""
        if id(value) in self.known:
            return self.known[id(value)][:2]
        original = value
        if _is_torch(value):
            self.saw_torch = True
            torch = _torch()
            value = value.detach()
            if value.device.type != "cpu":
                raise NkiValidationError(f"the emulator takes CPU tensors, given one on {value.device}")
            dtype = as_dtype(value.dtype)
            if value.dtype == torch.bool:
                value = value.view(torch.uint8)
            array = (
                value.numpy()
                if dtype.dtype.kind in "fiu" and dtype.dtype.isbuiltin == 1
                else value.view({1: torch.uint8, 2: torch.int16}[dtype.itemsize]).numpy().view(dtype.dtype)
            )
        else:
            array = value
            dtype = as_dtype(array.dtype)
            if dtype is bool_:
                array = array.view(np.uint8)
        live = np.asarray(array)
        if not live.flags.c_contiguous or not live.flags.writeable:
            held = np.array(live, order="C", copy=True)
            if live.flags.writeable:
                self.copies.append((live, held))
        else:
            held = live
        self.known[id(original)] = (held, dtype, original)
        return held, dtype

    def finish(self):
        for live, held in self.copies:
            live[...] = held


def _is_array(value):
    return isinstance(value, np.ndarray) or _is_torch(value) or type(value).__module__.split(".")[0] == "jaxlib"


def _convert(value, arguments, name=""):
    if _is_array(value):
        if not isinstance(value, np.ndarray) and not _is_torch(value):
            value = np.asarray(value)
        held, dtype = arguments.array(value)
        if held.size == 0:
            raise NkiValidationError(
                f"kernel argument {name!r} is empty (shape {held.shape}); a kernel has no empty tensors"
            )
        shape = held.shape or (1,)
        return allocate(shape, dtype, MemoryRegion.shared_hbm, name, data=held.view(np.uint8).reshape(-1))
    if isinstance(value, (tuple, list)):
        items = [_convert(v, arguments, f"{name}[{i}]") for i, v in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {k: _convert(v, arguments, f"{name}.{k}") for k, v in value.items()}
    if isinstance(value, NKIObject) and not isinstance(value, (NkiTensor, VirtualRegister)):
        fields = getattr(value, "__dict__", {})
        if any(_is_array(v) or isinstance(v, (NKIObject, tuple, list, dict)) for v in fields.values()):
            clone = copy.copy(value)
            for k, v in fields.items():
                object.__setattr__(clone, k, _convert(v, arguments, f"{name}.{k}"))
            return clone
    return value


def _result(value, arguments):
    if isinstance(value, NkiTensor):
        if value.buffer is not MemoryRegion.shared_hbm:
            raise NkiValidationError(f"a kernel returns nl.shared_hbm tensors, given {value!r}")
        array = value.array()
        for held, _, original in arguments.known.values():
            if (
                value.storage.data.base is not None
                and np.shares_memory(value.storage.data, held)
                and array.shape == held.shape
            ):
                return original
        array = np.array(array)
        if value.dtype is bool_:
            array = array.astype(np.bool_)
        if arguments.saw_torch:
            return _to_torch(array, value.dtype)
        return array
    if isinstance(value, (tuple, list)):
        return tuple(_result(v, arguments) for v in value)
    if isinstance(value, dict):
        return {k: _result(v, arguments) for k, v in value.items()}
    return value


def _to_torch(array, dtype):
    torch = _torch()
    wanted = getattr(torch, dtype.name, None) if dtype.kind == "f" else None
    if wanted is not None and array.dtype.isbuiltin != 1:
        return torch.from_numpy(array.view({1: np.uint8, 2: np.int16}[dtype.itemsize])).view(wanted)
    return torch.from_numpy(array)


def _cores(grid):
    configured = os.environ.get("NEURON_LOGICAL_NC_CONFIG")
    if configured is None:
        return grid or 1
    if configured not in ("1", "2"):
        raise NkiValidationError(f"NEURON_LOGICAL_NC_CONFIG is 1 or 2, given {configured!r}")
    if grid and grid != int(configured):
        raise NkiValidationError(f"the launch grid has {grid} cores, NEURON_LOGICAL_NC_CONFIG says {configured}")
    return int(configured)


_names_lock = threading.Lock()
_names_users = 0


@contextlib.contextmanager
def _parser_names():
    """The parser front end gives kernels `math` without an import; older kernels rely on it."""
    global _names_users
    with _names_lock:
        _names_users += 1
        vars(builtins).setdefault("math", math)
    try:
        yield
    finally:
        with _names_lock:
            _names_users -= 1
            if not _names_users and vars(builtins).get("math") is math:
                del vars(builtins)["math"]


def run(function, grid, args, kwargs):
    """Run a kernel function on fresh cores and return its outputs as arrays."""
    if os.environ.get("NKI_PRECISE_FP", "1") != "1":
        raise NkiValidationError(
            "NKI_PRECISE_FP=0 is not emulated: low-precision tiles are always stored in their own dtype"
        )
    current = getattr(_session, "current", None) or Session(None, False, False)
    generation = target_generation(current.target)
    count = _cores(grid)
    if count == 2 and generation == 2:
        raise NkiValidationError("gen2 has no two-core launch (LNC2); use kernel[1]")
    pair = Pair(count)
    arguments = _Arguments()
    results: list[Any] = [None] * count
    errors: list[BaseException | None] = [None] * count
    cores = [
        Core(generation, i, pair, grid or (count if count > 1 else 0), dry=current.dry, record=current.record)
        for i in range(count)
    ]

    names = list(inspect.signature(function).parameters)

    def work(i):
        core = cores[i]
        activate(core)
        try:
            with np.errstate(all="ignore"):
                with pair.lock:
                    given = [
                        _convert(a, arguments, names[j] if j < len(names) else f"arg{j}") for j, a in enumerate(args)
                    ]
                    named = {k: _convert(v, arguments, k) for k, v in kwargs.items()}
                results[i] = function(*given, **named)
            pair.end(i, False)
        except BaseException as error:  # handed to the caller below
            errors[i] = error
            pair.end(i, True)
        finally:
            activate(None)

    with _parser_names():
        if count == 1:
            work(0)
        else:
            threads = [threading.Thread(target=work, args=(i,), name=f"nki-core-{i}") for i in range(count)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    for error in sorted((e for e in errors if e is not None), key=lambda e: isinstance(e, PeerFailed)):
        raise error
    for core in cores:
        core.report.measure()
        core.report.check()
    current.runs.append([core.report for core in cores])
    if current.dry:
        return results[0]
    arguments.finish()
    return _result(results[0], arguments)
