"""What is measured: operator x case x dtype x direction, made from the specs' cases."""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import itertools
import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch

from .. import dispatch, library, registry
from ..spec import Case, OpSpec
from ..testing.recipes import Call, build, dtype_name, recipe_of_case

DIRECTIONS = ("forward", "backward")


class UsageError(ValueError):
    """A selection that selects nothing; the message says what there is."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One line of work that every contender does.

    Attributes:
        sweep: (size's name, its value) where the case is one of a series that differ in it alone.
        given: the recipe of a recorded call; it is made from the case otherwise.
        count: how often a recorded program makes this call.
    """

    spec: OpSpec
    case: Case
    dtype: torch.dtype
    direction: str
    sweep: tuple[str, int] | None = None
    given: dict[str, Any] | None = dataclasses.field(default=None, compare=False)
    count: int = 1

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.spec.name, self.case.name, dtype_name(self.dtype), self.direction

    def __str__(self) -> str:
        return " ".join(self.key)

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe of `isotile.testing` for this case, so that one line repeats a disagreement."""
        return recipe_of_case(self.spec, self.case, self.dtype) if self.given is None else self.given

    def shapes(self) -> dict[str, list[int]]:
        return {n: list(self.case.args[n]) for n in self.spec.tensors if n in self.case.args}


def select(
    ops: Sequence[str],
    cases: Sequence[str] | None,
    dtypes: Sequence[torch.dtype] | None,
    directions: Sequence[str],
    quick: bool,
    pool: Sequence[Workload] | None = None,
) -> list[Workload]:
    """The workloads asked for.

    Args:
        ops: operators by name; all public ones if empty.
        cases: glob patterns of case names; if None, the cases tagged `bench` (with `quick` those also tagged `smoke`).
        dtypes: if None, each case's own.
        directions: of `DIRECTIONS`. An internal operator (`layer_norm_backward`) has only a forward one.
        pool: choose among these instead of the specs' cases; `dtypes` and `cases` that are None choose all.

    Raises:
        UsageError: an operator or a pattern that matches nothing.
    """
    known = registry.specs()
    for op in ops:
        if op not in known:
            raise UsageError(f"no operator {op!r}; there are {', '.join(known)}")
    if pool is not None:
        return _among(pool, ops, cases, dtypes, directions)
    chosen = [known[o] for o in dict.fromkeys(ops)] or [s for s in known.values() if not s.internal]
    unmatched = set(cases or ())
    found: list[Workload] = []
    for spec, direction in itertools.product(chosen, directions):
        if direction == "backward" and spec.internal:
            continue
        for case in spec.cases:
            tags = case.tags.split()
            if cases is None:
                if "bench" not in tags or (quick and "smoke" not in tags):
                    continue
            else:
                matched = {p for p in cases if fnmatch.fnmatchcase(case.name, p)}
                unmatched -= matched
                if not matched:
                    continue
            own = case.dtypes if dtypes is None else dtypes
            found.extend(Workload(spec, case, dtype, direction) for dtype in own)
    if unmatched:
        names = dict.fromkeys(c.name for s in chosen for c in s.cases)
        raise UsageError(f"no case matches {', '.join(sorted(unmatched))}; there are {', '.join(names)}")
    if not found:
        raise UsageError("nothing to measure: no case of the chosen operators fits")
    return found


def _among(
    pool: Sequence[Workload],
    ops: Sequence[str],
    cases: Sequence[str] | None,
    dtypes: Sequence[torch.dtype] | None,
    directions: Sequence[str],
) -> list[Workload]:
    found = [
        w
        for w in pool
        if (not ops or w.spec.name in ops)
        and (cases is None or any(fnmatch.fnmatchcase(w.case.name, p) for p in cases))
        and (dtypes is None or w.dtype in dtypes)
        and w.direction in directions
    ]
    if not found:
        names = dict.fromkeys(f"{w.spec.name} {w.case.name}" for w in pool)
        raise UsageError(f"nothing to measure; there are {', '.join(names)}")
    return found


def tokens_of(spec: OpSpec, values: dict[str, Any]) -> int:
    """Tokens that a call works on: rows of activations, or queries of attention over all heads."""
    dims = dispatch.bind_call(spec, values)
    found = math.prod(dims.loop)
    for name in next(iter(spec.tensors.values())).pattern.names:
        if name in TOKENS and name not in dims.absent:
            found *= dims[name]
    if "dim" in spec.scalars and dims.loop:
        found //= max(1, dims.loop[values["dim"]])
    return int(found)


#: dimensions of a first argument that count tokens, besides the leading ones
TOKENS = ("m", "sq", "total", "total_q")


class Inputs:
    """A workload's tensors, and copies of them at other addresses.

    Args:
        workload: whose inputs.
        cache_bytes: the last-level cache; 0 keeps one warm set.
        needs_grad: make every differentiable tensor a leaf that requires a gradient.
    """

    #: An operand set smaller than this was just produced, or stays in the cache, in a real model too: it stays warm.
    WARM_BYTES = 1 << 20
    MAX_BYTES = 1 << 30

    def __init__(self, workload: Workload, cache_bytes: int, needs_grad: bool) -> None:
        self.call: Call = build(workload.recipe)
        self.spec = workload.spec
        self.operator = library.operator(self.spec.name)
        self.bytes = sum(t.numel() * t.element_size() for t in self.tensors().values())
        wanted = 1
        if cache_bytes and self.bytes >= self.WARM_BYTES:
            # Three caches' worth between two uses of one set: what a use finds was evicted since the last one.
            wanted = math.ceil(3 * cache_bytes / self.bytes)
            wanted = max(1, min(wanted, self.MAX_BYTES // self.bytes))
        self.cold = bool(cache_bytes) and self.bytes >= self.WARM_BYTES and self.bytes * wanted >= 2 * cache_bytes
        self.sets = [self._copy(i, needs_grad) for i in range(wanted)]

    def tensors(self) -> dict[str, torch.Tensor]:
        return {n: v for n, v in self.call.values.items() if isinstance(v, torch.Tensor)}

    def differentiable(self) -> list[str]:
        return [n for n, t in self.tensors().items() if self.spec.tensors[n].differentiable and t.is_floating_point()]

    def _copy(self, index: int, needs_grad: bool) -> dict[str, Any]:
        wanted = set(self.differentiable()) if needs_grad else set()
        found = {}
        for name, value in self.call.values.items():
            if isinstance(value, torch.Tensor):
                value = (value if index == 0 else value.clone()).detach()
                value.requires_grad_(name in wanted)
            found[name] = value
        return found

    @property
    def device(self) -> str:
        """The type of the device that the tensors are on."""
        return next(iter(self.tensors().values())).device.type

    def overload(self) -> str:
        return self.call.overload

    def results_bytes(self) -> int:
        dims = dispatch.bind_call(self.spec, self.call.values)
        outs = dispatch.out_specs(self.spec, self.call.overload, self.call.values, dims)
        return sum(math.prod(o.shape) * o.dtype.itemsize for o in outs if o is not None)

    def flops(self) -> float:
        return flops_of(self.spec, self.call.values)


def flops_of(spec: OpSpec, values: dict[str, Any]) -> float:
    dims = dispatch.bind_call(spec, values)
    return float(spec.flops(dims, SimpleNamespace(**{n: values[n] for n in spec.scalars})))
