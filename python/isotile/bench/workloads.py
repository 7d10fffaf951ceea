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

from .. import dispatch, library, registry, shapes
from ..spec import Case, OpSpec
from ..testing.recipes import Call, build, dtype_name

DIRECTIONS = ("forward", "backward")


class UsageError(ValueError):
    """A selection that selects nothing; the message says what there is."""


@dataclasses.dataclass(frozen=True)
class Workload:
    """One line of work that every contender does."""

    spec: OpSpec
    case: Case
    dtype: torch.dtype
    direction: str

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.spec.name, self.case.name, dtype_name(self.dtype), self.direction

    def __str__(self) -> str:
        return " ".join(self.key)

    @functools.cached_property
    def recipe(self) -> dict[str, Any]:
        """The recipe of `isotile.testing` for this case, so that one line repeats a disagreement."""
        return recipe_of(self.spec, self.case, self.dtype)

    def shapes(self) -> dict[str, list[int]]:
        return {n: list(self.case.args[n]) for n in self.spec.tensors if n in self.case.args}


def recipe_of(spec: OpSpec, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    present = {n: tuple(case.args[n]) for n in spec.tensors if n in case.args}
    scalars = {n: case.args[n] for n in spec.scalars if n in case.args}
    plain = {n: v for n, v in scalars.items() if spec.scalars[n].star is None}
    stars = {s.star: tuple(scalars[n]) for n, s in spec.scalars.items() if s.star is not None}
    patterns = {n: spec.tensors[n].pattern for n in present}
    dims = shapes.bind(present, patterns, stars)
    tensors = {}
    for name, shape in present.items():
        arg = spec.tensors[name]
        core = sum(len(dims.stars[t[1:]]) if t.startswith("*") else 1 for t in arg.pattern.core)
        core -= sum(t.endswith("?") and t[:-1] in dims.absent for t in arg.pattern.core)
        own = dtype if dtype in arg.dtypes else arg.dtypes[0]
        tensors[name] = {"loop": list(shape[: len(shape) - core]), "layout": "contiguous", "dtype": dtype_name(own)}
        if arg.broadcast:
            tensors[name]["ones"] = [False] * 6
    overload = next((o for o in spec.overloads if o in present), "default")
    return {
        "op": spec.name,
        "overload": overload,
        "dtype": dtype_name(dtype),
        "kind": "normal",
        "sizes": {n: size for n, size in dims.sizes.items() if n not in dims.stars},
        "groups": {n: list(group) for n, group in dims.stars.items()},
        "absent": sorted(dims.absent),
        "tensors": tensors,
        "scalars": {n: dtype_name(v) if isinstance(v, torch.dtype) else v for n, v in plain.items()},
        "out": "contiguous",
        "seed": 0,
    }


def select(
    ops: Sequence[str],
    cases: Sequence[str] | None,
    dtypes: Sequence[torch.dtype] | None,
    directions: Sequence[str],
    quick: bool,
) -> list[Workload]:
    """The workloads asked for.

    Args:
        ops: operators by name; all public ones if empty.
        cases: glob patterns of case names; if None, the cases tagged `bench` (with `quick` those also tagged `smoke`).
        dtypes: if None, each case's own.
        directions: of `DIRECTIONS`. An internal operator (`layer_norm_backward`) has only a forward one.

    Raises:
        UsageError: an operator or a pattern that matches nothing.
    """
    known = registry.specs()
    for op in ops:
        if op not in known:
            raise UsageError(f"no operator {op!r}; there are {', '.join(known)}")
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
