"""From a call's signature to a plan: validate, choose a backend, lower, prepare; all of it once per signature."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import torch

from . import huge_pages, shapes
from .errors import BackendError, FallbackWarning
from .shapes import contiguous_strides
from .spec import Lowered, OpSpec, Result, Scalar
from .state import CURRENT, State

#: Plans kept for one operator before the table is emptied; a plan is a few kilobytes.
MAX_PLANS = 4096


#: TorchInductor's way to allocate: half of the time of torch.empty_strided, which asks PyTorch's dispatcher first.
_EMPTY_ON_CPU = getattr(getattr(torch._C._dynamo, "guards", None), "_empty_strided_cpu", None)


@dataclasses.dataclass(frozen=True)
class OutSpec:
    """How a result is allocated."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @functools.cached_property
    def empty(self) -> Callable[[], torch.Tensor]:
        """A function that allocates it; for plain calls only, no mode of PyTorch gets to see it."""
        if self.device.type != "cpu" or _EMPTY_ON_CPU is None:
            return functools.partial(
                torch.empty_strided, self.shape, self.strides, dtype=self.dtype, device=self.device
            )
        allocate = functools.partial(_EMPTY_ON_CPU, self.shape, self.strides, self.dtype)
        if math.prod(self.shape) * self.dtype.itemsize >= huge_pages.ALWAYS_FRESH:
            return functools.partial(huge_pages.allocated, allocate)
        return allocate


class Plan:
    """A call with everything decided that its signature decides.

    `run(*tensors, *outs)` takes the tensor arguments in the spec's order (None where absent) and all results of the
    spec in order (None where absent), and fills the results.
    """

    __slots__ = ("backend", "empty", "meta", "outs", "passed_over", "run", "state")

    def __init__(
        self,
        backend: str,
        run: Callable[..., None],
        outs: tuple[OutSpec | None, ...],
        passed_over: tuple[tuple[str, str], ...],
    ) -> None:
        self.backend = backend
        self.run = run
        self.outs = outs
        self.passed_over = passed_over
        self.state: State | None = None  # the state and the signature that it is for, which the backward pass needs
        self.meta: dict[str, Any] = {}
        self.empty = tuple(None if o is None else o.empty for o in outs)


# --- validation ------------------------------------------------------------------------------------------------------


def _where(spec: OpSpec, argument: str) -> str:
    public = spec.name.removeprefix("packed_").removesuffix("_backward") if spec.internal else spec.name
    return f"isotile.{public}: {argument}"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_types(spec: OpSpec, values: dict[str, Any]) -> None:
    """Types, dtypes, devices and options of a call; shapes are `bind_call`'s."""
    device = None
    owner = ""
    for name, arg in spec.tensors.items():
        value = values[name]
        if value is None:
            if arg.optional:
                continue
            raise TypeError(f"{_where(spec, name)}: wanted a torch.Tensor, got None")
        if not isinstance(value, torch.Tensor):
            optional = " or None" if arg.optional else ""
            raise TypeError(f"{_where(spec, name)}: wanted a torch.Tensor{optional}, got {type(value).__name__}")
        if value.layout is not torch.strided:
            raise TypeError(f"{_where(spec, name)}: wanted a dense tensor, got layout {value.layout}")
        if value.dtype not in arg.dtypes:
            wanted = ", ".join(map(_short, arg.dtypes))
            raise TypeError(f"{_where(spec, name)}: wanted dtype {wanted}, got {_short(value.dtype)}")
        if arg.same_as is not None:
            other = values[arg.same_as]
            if isinstance(other, torch.Tensor) and value.dtype != other.dtype:
                raise TypeError(
                    f"{_where(spec, name)}: wanted dtype {_short(other.dtype)} (that of {arg.same_as}), "
                    f"got {_short(value.dtype)}"
                )
        if device is None:
            device, owner = value.device, name
        elif value.device != device:
            raise ValueError(f"{_where(spec, name)}: wanted device {device} (that of {owner}), got {value.device}")
    for name, scalar in spec.scalars.items():
        check_scalar(spec, name, scalar, values[name])


def _is_int(value: Any) -> bool:
    return isinstance(value, int | torch.SymInt) and not isinstance(value, bool)


_SCALAR_TYPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "float": ("a number", lambda v: _is_int(v) or isinstance(v, float | torch.SymFloat)),
    "int": ("an int", _is_int),
    "SymInt": ("an int", _is_int),
    "bool": ("a bool", lambda v: isinstance(v, bool)),
    "str": ("a str", lambda v: isinstance(v, str)),
    "ScalarType": ("a torch.dtype", lambda v: isinstance(v, torch.dtype)),
    "SymInt[]": ("an int or a sequence of ints", lambda v: isinstance(v, list | tuple) and all(map(_is_int, v))),
}


def check_scalar(spec: OpSpec, name: str, scalar: Scalar, value: Any) -> None:
    optional = scalar.type.endswith("?")
    if value is None and optional:
        return
    wanted, fits = _SCALAR_TYPES[scalar.type.removesuffix("?")]
    if not fits(value):
        raise TypeError(f"{_where(spec, name)}: wanted {wanted}{' or None' if optional else ''}, got {value!r}")
    if scalar.choices is not None and value not in scalar.choices:
        if isinstance(value, torch.dtype):
            wanted = ", ".join(map(_short, scalar.choices))
            raise TypeError(f"{_where(spec, name)}: wanted dtype {wanted}, got {_short(value)}")
        raise ValueError(f"{_where(spec, name)}: wanted one of {', '.join(map(repr, scalar.choices))}, got {value!r}")
    reason = scalar.check(value) if scalar.check is not None else None
    if reason is not None:
        raise ValueError(f"{_where(spec, name)}: {reason}, got {value!r}")


def bind_call(spec: OpSpec, values: dict[str, Any], same: Callable[[Any, Any], bool] | None = None) -> shapes.Dims:
    """Bind the shapes of a call, check what the spec requires, and return the dimensions."""
    present = {n: tuple(values[n].shape) for n, a in spec.tensors.items() if values[n] is not None and not a.broadcast}
    stars = {s.star: tuple(values[n]) for n, s in spec.scalars.items() if s.star is not None}
    for group in stars.values():
        if not group:
            raise ValueError(f"{_where(spec, 'normalized_shape')}: wanted at least one size, got ()")
    try:
        dims = shapes.bind(
            present, {n: spec.tensors[n].pattern for n in present}, stars, **({"same": same} if same else {})
        )
        for name, arg in spec.tensors.items():
            if arg.broadcast and values[name] is not None:
                _check_broadcast(name, tuple(values[name].shape), dims.shape(arg.pattern), same)
    except shapes.ShapeError as error:
        raise ValueError(f"{_where(spec, error.argument)}: {error}") from None
    scalars = SimpleNamespace(**values)
    for argument, sentence, predicate in spec.requires:
        if not predicate(dims, scalars):
            got = values[argument]
            shown = list(got.shape) if isinstance(got, torch.Tensor) else got
            wanted = sentence if isinstance(sentence, str) else sentence(dims, scalars)
            raise ValueError(f"{_where(spec, argument)}: wanted {wanted}, got {shown}")
    return dims


def _check_broadcast(
    name: str, shape: tuple[Any, ...], target: tuple[Any, ...], same: Callable[[Any, Any], bool] | None
) -> None:
    same = same or (lambda a, b: bool(a == b))
    fits = len(shape) <= len(target) and all(
        (isinstance(s, int) and s == 1) or same(s, t) for s, t in zip(reversed(shape), reversed(target), strict=False)
    )
    if not fits:
        raise shapes.ShapeError(name, f"wanted a shape that broadcasts to {list(target)}, got {list(shape)}")


def result_dtype(spec: OpSpec, result: Result, values: dict[str, Any]) -> torch.dtype:
    for name in result.dtype:
        if name == "accumulator":
            first = values[next(iter(spec.tensors))]
            return torch.float64 if first.dtype == torch.float64 else torch.float32
        value = values[name]
        if isinstance(value, torch.Tensor):
            return value.dtype
        if isinstance(value, torch.dtype):
            return value
    raise AssertionError(f"{spec.name}: no dtype for a result from {result.dtype}")


def out_specs(spec: OpSpec, overload: str, values: dict[str, Any], dims: shapes.Dims) -> tuple[OutSpec | None, ...]:
    """Shape, dtype and device of every result; None for those of other overloads or not needed."""
    device = values[next(iter(spec.tensors))].device
    wanted = spec.results_of(overload)
    outs: list[OutSpec | None] = []
    for name, result in spec.results.items():
        if name not in wanted or (result.needs is not None and not values[result.needs]):
            outs.append(None)
            continue
        shape = dims.shape(result.pattern)
        outs.append(OutSpec(shape, contiguous_strides(shape), result_dtype(spec, result, values), device))
    return tuple(outs)


def check_outs(spec: OpSpec, outs: Sequence[torch.Tensor], wanted: Sequence[OutSpec | torch.Tensor]) -> None:
    """A caller's `out=` against what the call gives. Raises before anything is written."""
    if len(outs) != len(wanted):
        plural = "" if len(wanted) == 1 else "s"
        raise ValueError(f"{_where(spec, 'out')}: wanted {len(wanted)} tensor{plural}, got {len(outs)}")
    for out, want in zip(outs, wanted, strict=True):
        if not isinstance(out, torch.Tensor):
            raise TypeError(f"{_where(spec, 'out')}: wanted a torch.Tensor, got {type(out).__name__}")
        if out.dtype != want.dtype:
            raise TypeError(f"{_where(spec, 'out')}: wanted dtype {_short(want.dtype)}, got {_short(out.dtype)}")
        if tuple(out.shape) != tuple(want.shape):
            raise ValueError(f"{_where(spec, 'out')}: wanted shape {list(want.shape)}, got {list(out.shape)}")
        if out.device != want.device:
            raise ValueError(f"{_where(spec, 'out')}: wanted device {want.device}, got {out.device}")
        if not torch.compiler.is_compiling() and _may_overlap_itself(out):
            raise ValueError(
                f"{_where(spec, 'out')}: wanted a tensor whose elements do not overlap, got shape {list(out.shape)} "
                f"with strides {list(out.stride())}"
            )


def _may_overlap_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements may share memory: a dimension's stride does not step over all that lies within it."""
    if tensor.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n != 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


# --- lowering --------------------------------------------------------------------------------------------------------


def lower(
    spec: OpSpec, values: dict[str, Any], dims: shapes.Dims, outs: dict[str, tuple[Any, Any, Any, Any] | None]
) -> Lowered:
    """A call in the kernel form of docs/design.md section 3: canonical views and scalars as numbers."""
    views: dict[str, shapes.View | None] = {}
    for name, arg in spec.tensors.items():
        value = values[name]
        if value is None:
            views[name] = None
            continue
        view = shapes.View(name, tuple(value.shape), tuple(value.stride()), value.dtype, value.device)
        if arg.broadcast:
            view = view.expand(dims.shape(arg.pattern))
        views[name] = _canonical(view, arg.pattern, dims)
    out_views: dict[str, shapes.View | None] = {}
    for name, result in spec.results.items():
        out = outs[name]
        out_views[name] = None if out is None else _canonical(shapes.View(name, *out), result.pattern, dims)
    scalars = SimpleNamespace(**{n: values[n] for n in spec.scalars}, dims=dims)
    rank: int | None = None
    if spec.lower is None:
        numbers = {n: encode(s, values[n]) for n, s in spec.scalars.items() if s.star is None}
        kernel, tensors, results = spec.name, views, out_views
    else:
        kernel, tensors, results, numbers, *given = spec.lower(views, out_views, scalars)
        rank = given[0] if given else None
    loops = {**{n: a.pattern for n, a in spec.tensors.items()}, **{n: r.pattern for n, r in spec.results.items()}}
    everything = [*tensors.values(), *results.values()]
    rank = len(dims.loop) if rank is None else rank
    # A view has loop dimensions by its pattern, or because the lowering expanded it (linear's weight).
    ranks = [
        rank if v is not None and (loops[v.source].loop or v.ndim > len(loops[v.source].core)) else 0
        for v in everything
    ]
    merged = shapes.coalesce_loops(everything, ranks)
    return Lowered(
        kernel,
        dict(zip(tensors, merged[: len(tensors)], strict=True)),
        dict(zip(results, merged[len(tensors) :], strict=True)),
        {n: float(v) for n, v in numbers.items()},
    )


class NeedsCopy(Exception):
    """A `*n` group that no single stride can address; the dispatcher takes a contiguous copy of `source`."""

    def __init__(self, source: str) -> None:
        super().__init__(source)
        self.source = source


def _canonical(view: shapes.View, pattern: shapes.Pattern, dims: shapes.Dims) -> shapes.View:
    core = pattern.core
    lacking = [len(core) - core.index(f"{name}?") for name in pattern.optional if name in dims.absent]
    for from_end in sorted(lacking):
        view = view.unsqueeze(view.ndim - from_end + 1)
    if pattern.star is not None:
        length = len(dims.stars[pattern.star])
        after = len(core) - 1 - core.index(f"*{pattern.star}")
        start = view.ndim - after - length
        flat = shapes.flatten_group(view, start, length)
        if flat is None:
            raise NeedsCopy(view.source)
        view = flat
    if pattern.loop:
        width = len(core)
        view = view.expand((*dims.loop, *view.shape[view.ndim - width :]))
    return view


def encode(scalar: Scalar, value: Any) -> float:
    """A scalar as a kernel gets it: a choice is its index, a flag 0 or 1."""
    if scalar.choices is not None:
        return float(scalar.choices.index(value))
    return float(value)


# --- choosing --------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Request:
    """A validated call as backends see it: metadata only."""

    spec: OpSpec
    overload: str
    scalars: dict[str, Any]
    device: torch.device
    dtype: torch.dtype  # of the first tensor
    state: State
    lowered: Lowered
    copied: frozenset[str] = frozenset()  # arguments and results that the plan passes as contiguous copies


def make_plan(
    spec: OpSpec, overload: str, values: dict[str, Any], caller_outs: Sequence[torch.Tensor] | None, state: State
) -> Plan:
    """Validate a call, choose its backend and prepare it.

    Raises:
        ValueError, TypeError: wrong arguments.
        BackendError: the chosen backend (or, without a choice, every backend) cannot serve the call.
    """
    request, outs = make_request(spec, overload, values, caller_outs, state)
    passed_over: list[tuple[str, str]] = []
    for backend, reason in candidates(request):
        if reason is not None:
            if state.backend is not None:
                raise BackendError(f"isotile.{spec.name}: backend {state.backend!r}: {reason}")
            passed_over.append((backend.name, reason))
            continue
        if passed_over and state.backend is None:
            _warn_fallback(spec, backend.name, passed_over, request)
        run = backend.prepare(request)
        if request.copied:
            run = _with_copies(spec, request.copied, run)
        return Plan(backend.name, run, outs, tuple(passed_over))
    reasons = "; ".join(f"{name}: {why}" for name, why in passed_over)
    raise BackendError(f"isotile.{spec.name}: no backend can serve this call. {reasons}")


def make_request(
    spec: OpSpec, overload: str, values: dict[str, Any], caller_outs: Sequence[torch.Tensor] | None, state: State
) -> tuple[Request, tuple[OutSpec | None, ...]]:
    """A call's request, and how its results are allocated; looks at nothing but the tensors' metadata.

    Raises:
        ValueError, TypeError: wrong arguments.
    """
    check_types(spec, values)
    dims = bind_call(spec, values)
    outs = out_specs(spec, overload, values, dims)
    addresses: dict[str, tuple[Any, Any, Any, Any] | None] = {
        n: None if o is None else (o.shape, o.strides, o.dtype, o.device)
        for n, o in zip(spec.results, outs, strict=True)
    }
    if caller_outs is not None:
        wanted = [n for n in spec.results if addresses[n] is not None][: len(caller_outs)]
        for name, tensor in zip(wanted, caller_outs, strict=True):
            addresses[name] = (tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype, tensor.device)
    copied: set[str] = set()
    while True:
        try:
            lowered = lower(spec, {**values, **_contiguous(values, copied)}, dims, _dense(addresses, copied))
            break
        except NeedsCopy as need:
            copied.add(need.source)
    first = values[next(iter(spec.tensors))]
    scalars = {n: values[n] for n in spec.scalars}
    request = Request(spec, overload, scalars, first.device, first.dtype, state, lowered, frozenset(copied))
    return request, outs


class _Dense:
    """The metadata of a contiguous copy that is not made yet."""

    def __init__(self, like: torch.Tensor) -> None:
        self.shape, self.dtype, self.device = like.shape, like.dtype, like.device

    def stride(self) -> tuple[int, ...]:
        return contiguous_strides(self.shape)


def _contiguous(values: dict[str, Any], copied: set[str]) -> dict[str, Any]:
    return {n: _Dense(values[n]) for n in copied if n in values}


def _dense(addresses: dict[str, Any], copied: set[str]) -> dict[str, Any]:
    return {
        n: (a[0], contiguous_strides(a[0]), a[2], a[3]) if n in copied and a is not None else a
        for n, a in addresses.items()
    }


def _with_copies(spec: OpSpec, copied: frozenset[str], run: Callable[..., None]) -> Callable[..., None]:
    """`run` on contiguous copies of the arguments and results that no strided view can express."""
    names = [*spec.tensors, *spec.results]
    inputs = [i for i, n in enumerate(names) if n in copied and n in spec.tensors]
    results = [i for i, n in enumerate(names) if n in copied and n in spec.results]

    def copying(*tensors: torch.Tensor | None) -> None:
        dense = list(tensors)
        for i in inputs:
            if (given := tensors[i]) is not None:
                dense[i] = given.contiguous()
        for i in results:
            if (given := tensors[i]) is not None:
                dense[i] = torch.empty_like(given, memory_format=torch.contiguous_format)
        run(*dense)
        for i in results:
            if (given := tensors[i]) is not None and (filled := dense[i]) is not None:
                given.copy_(filled)

    return copying


def candidates(request: Request) -> list[tuple[Any, str | None]]:
    """Each backend to consider, in order, with its reason for not serving the call (None: it can)."""
    from .backends import BACKENDS

    if request.state.backend is not None:
        if request.state.backend not in BACKENDS:  # use_backend checks its argument, so it came from the environment
            raise ValueError(
                f"ISOTILE_BACKEND: wanted one of {', '.join(map(repr, BACKENDS))}, got {request.state.backend!r}"
            )
        chosen = BACKENDS[request.state.backend]
        return [(chosen, chosen.unavailable(request.device.type) or chosen.refuses(request))]
    found = []
    for backend in BACKENDS.values():
        if not backend.serves(request.device.type):
            continue
        found.append((backend, backend.unavailable(request.device.type) or backend.refuses(request)))
    return found


_warned: set[tuple[str, str]] = set()


def _warn_fallback(spec: OpSpec, backend: str, passed_over: list[tuple[str, str]], request: Request) -> None:
    for name, reason in passed_over:
        if (spec.name, reason) in _warned:
            continue
        warnings.warn(
            f"isotile.{spec.name} on {request.device.type} runs on backend {backend!r}, "
            f"since {name!r} refuses: {reason}",
            FallbackWarning,
            stacklevel=_caller_level(),
        )
        _warned.add((spec.name, reason))  # not before: a warning turned into an error stays one


#: Where isotile's and PyTorch's own frames lie.
_OWN_FILES = tuple(str(Path(module).parent) + os.sep for module in (__file__, torch.__file__))


def _caller_level() -> int:
    """The `stacklevel` of the first frame outside isotile and PyTorch, for the function that calls this one."""
    frame: FrameType | None = sys._getframe(1)
    level = 1
    while frame is not None and frame.f_code.co_filename.startswith(_OWN_FILES):
        frame = frame.f_back
        level += 1
    return level


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Which backend would run a call, and why not the others."""

    operator: str
    backend: str | None
    reasons: dict[str, str | None]  # None: it can serve the call

    def __str__(self) -> str:
        lines = [
            f"isotile.{self.operator} runs on {self.backend!r}"
            if self.backend
            else f"isotile.{self.operator}: no backend can serve this call"
        ]
        for name, reason in self.reasons.items():
            lines.append(f"  {name:<10} {'serves it' if reason is None else reason}")
        return "\n".join(lines)


def explain_call(spec: OpSpec, overload: str, values: dict[str, Any]) -> Explanation:
    from .backends import BACKENDS

    state = CURRENT.get()
    request, _ = make_request(spec, overload, values, None, state)
    chosen = next((b.name for b, reason in candidates(request) if reason is None), None)
    reasons: dict[str, str | None] = {}
    for backend in BACKENDS.values():
        why = backend.unavailable(request.device.type)
        if why is None and not backend.serves(request.device.type) and state.backend != backend.name:
            why = f"takes {request.device.type} tensors only inside isotile.use_backend({backend.name!r})"
        reasons[backend.name] = why or backend.refuses(request)
    return Explanation(spec.name, chosen, reasons)
