"""`assert_equivalent`: isotile's comparison, drawn inputs and laws for anybody's kernels and models."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import registry
from ..precision import exact
from ..spec import ErrorModel, OpSpec, Scalar, Tensor
from .check import bits
from .compare import Disagreement, bounds, compare
from .draws import Random, Seeded
from .laws import difference, on_cpu
from .recipes import build, draw_recipe, dtype_name, kinds_of

#: A sound program's error is at most this many times that of another one, plus a rounding.
MARGIN = 4.0
#: How often the inputs are moved by a rounding, to see how far that moves the truth.
NUDGES = 3
KINDS = ("normal", "mixed", "integers")
LAWS = ("inputs_unchanged", "deterministic", "layout")
LOW = (torch.float32, torch.bfloat16, torch.float16)

Arguments = tuple[Any, ...] | dict[str, Any]


@dataclasses.dataclass
class Equivalence:
    """What `assert_equivalent` found.

    Attributes:
        examples: how many were compared.
        worst: the largest share of what was allowed that `fn_a` used.
        worst_example: its number.
    """

    examples: int = 0
    worst: float = 0.0
    worst_example: int = 0

    def add(self, example: int, share: float) -> None:
        self.examples += 1
        if share >= self.worst:
            self.worst, self.worst_example = share, example


def assert_equivalent(
    fn_a: Callable[..., Any],
    fn_b: Callable[..., Any],
    inputs: Any,
    *,
    examples: int = 25,
    seed: int = 0,
    dtypes: Sequence[torch.dtype] = LOW,
    kinds: Sequence[str] = KINDS,
    truth: Callable[..., Any] | None = None,
    gradients: bool = False,
    laws: Sequence[str] = LAWS,
    margin: float = MARGIN,
    device: str = "cpu",
    example: int | None = None,
) -> Equivalence:
    """Asserts that `fn_a` computes what `fn_b` computes, as precisely as that can be asked, on drawn inputs.

    With an operator of isotile as `inputs` both functions are held to its derived bound around its float64 truth,
    and to the sum of both bounds between each other. Otherwise both are measured against the truth, `fn_b` in
    float64: the error of `fn_a` may be at most `margin` times that of `fn_b` and of what rounding the inputs once
    (to the accumulator's precision) does to the truth, plus one rounding of the result; in units in the last place
    at the element's magnitude or its row's root mean square, whichever is larger.

    Args:
        fn_a: the kernel or model under test.
        fn_b: the one that is trusted.
        inputs: where the arguments come from, one of
            an operator's name or `OpSpec`: both functions get its parameters by keyword;
            a dict of `isotile.spec.Tensor` and `Scalar` by argument name: likewise;
            a function of a `isotile.testing.Random` that returns a tuple or dict of arguments;
            a hypothesis strategy of such tuples or dicts (hypothesis then draws, and shrinks).
        examples: how many, for each dtype where dtypes are drawn.
        seed: of the draws.
        dtypes: of the first tensor, with an operator or a dict.
        kinds: of values, with an operator or a dict; among `isotile.testing.KINDS`.
        truth: `fn_b` in float64; by default a float64 copy of `fn_b` if it is an `nn.Module`, else `fn_b` itself.
        gradients: compare the gradients of all floating point inputs too (not with an operator: there its backward
            operator is the one to name).
        laws: `"inputs_unchanged"`, `"deterministic"` (the same bits again), `"layout"` (strided inputs give what
            dense ones give).
        margin: see above.
        device: of the drawn tensors.
        example: run this one alone, as a failure says.

    Returns:
        How many examples were compared, and the largest error as a share of what was allowed.

    Raises:
        Disagreement: an AssertionError that names the element, what it is, what it should be, and the example.
        TypeError: `inputs` is none of the above.
        ValueError: a law that there is not.
    """
    unknown = [law for law in laws if law not in LAWS]
    if unknown:
        raise ValueError(f"assert_equivalent: laws: wanted some of {', '.join(LAWS)}, got {', '.join(unknown)}")
    if isinstance(inputs, str):
        inputs = registry.spec(inputs)
    if truth is None:
        truth = copy.deepcopy(fn_b).double() if isinstance(fn_b, torch.nn.Module) else fn_b
    found = Equivalence()
    rule = _Rule(fn_a, fn_b, truth, margin, gradients, tuple(laws))

    if _is_strategy(inputs):
        _with_hypothesis(inputs, rule, found, examples)
        return found

    spec = inputs if isinstance(inputs, OpSpec) else _ad_hoc(inputs) if isinstance(inputs, Mapping) else None
    if spec is None and not callable(inputs):
        raise TypeError(
            "assert_equivalent: inputs: wanted an operator's name, an OpSpec, a dict of Tensor and Scalar, a function "
            f"of a Random, or a hypothesis strategy, got {inputs!r}"
        )
    numbers = range(examples * (1 if spec is None else len(dtypes))) if example is None else (example,)
    for number in numbers:
        described = ""
        try:
            if spec is None:
                arguments = _moved(inputs(Random(seed, number)), device)
                share = rule.check(arguments, number)
            else:
                dtype = dtypes[number % len(dtypes)]
                recipe = draw_recipe(Seeded(seed, number), spec, dtype, kinds_of(spec, tuple(kinds)))
                described = f" {dtype_name(dtype)}, {recipe['kind']} values, sizes {recipe['sizes'] | recipe['groups']}"
                call = build(recipe, device, spec)
                if isinstance(inputs, OpSpec):
                    share = rule.check_operator(spec, call.overload, call.values)
                else:
                    share = rule.check(call.values, number)
        except Disagreement as error:
            raise Disagreement(f"example {number} of seed {seed}{described}: {error}\n  repeat with example={number}") \
                from None  # fmt: skip
        found.add(number, share)
    return found


@dataclasses.dataclass
class _Rule:
    """What one example must keep."""

    fn_a: Callable[..., Any]
    fn_b: Callable[..., Any]
    truth: Callable[..., Any]
    margin: float
    gradients: bool
    laws: tuple[str, ...]

    def check_operator(self, spec: OpSpec, overload: str, values: dict[str, Any]) -> float:
        """Both functions within the operator's bound; each other within the sum."""
        expected = bounds(spec, overload, on_cpu(values))
        names = list(expected)
        ours, theirs = (dict(zip(names, _results(self._run(f, values)), strict=False))
                        for f in (self.fn_a, self.fn_b))  # fmt: skip
        worst = 0.0
        for name in ours:
            worst = max(worst, compare(f"fn_a: {name}", ours[name], expected[name]))
            compare(f"fn_b: {name}", theirs[name], expected[name])
            difference(name, ours[name], theirs[name], expected[name])
        self._keeps_laws(values, list(ours.values()), [2 * expected[n].allowed for n in ours])
        return worst

    def check(self, arguments: Arguments, number: int) -> float:
        """The rule of two programs around one truth; the largest share of the limit that fn_a uses."""
        ours, theirs = (_results(self._run(f, arguments)) for f in (self.fn_a, self.fn_b))
        wide = _wide(arguments)
        true = self._true(wide)
        if not len(ours) == len(theirs) == len(true):
            raise Disagreement(f"fn_a gives {len(ours)} results, fn_b {len(theirs)}, the truth {len(true)}")
        moved = [self._true(nudged) for nudged in _nudged(wide, _unit(arguments), number)]
        worst, limits = 0.0, []
        for i, (a, b, t, *m) in enumerate(zip(ours, theirs, true, *moved, strict=True)):
            name = "result" if len(ours) == 1 else f"result {i}"
            share, limit = self._within(name, a, b, t, m)
            worst = max(worst, share)
            limits.append(2 * limit)
        self._keeps_laws(arguments, ours, limits)
        return max(worst, self._check_gradients(arguments, wide, true, number)) if self.gradients else worst

    def _check_gradients(self, arguments: Arguments, wide: Arguments, true: list[torch.Tensor], number: int) -> float:
        random = Random(number, 2)
        upstream = [random.normal(t.shape) for t in true]
        with exact():
            t, *moved = (_pull(self.truth, x, upstream) for x in (wide, *_nudged(wide, _unit(arguments), number)))
        a, b = (_pull(f, arguments, upstream) for f in (self.fn_a, self.fn_b))
        worst = 0.0
        for name in t:
            gradients = [g[name].double().cpu() for g in (t, *moved)]
            worst = max(worst, self._within(f"gradient of {name}", a[name], b[name], gradients[0], gradients[1:])[0])
        return worst

    def _within(
        self, name: str, a: torch.Tensor, b: torch.Tensor, true: torch.Tensor, moved: list[torch.Tensor]
    ) -> tuple[float, torch.Tensor]:
        """The share of the limit that `a` uses, and the limit of each element."""
        for who, result in (("fn_a", a), ("fn_b", b)):
            if result.shape != true.shape:
                raise Disagreement(f"{name}: {who} gives shape {list(result.shape)}, the truth {list(true.shape)}")
        if a.dtype != b.dtype:
            raise Disagreement(f"{name}: fn_a gives {a.dtype}, fn_b {b.dtype}")
        got, other = a.detach().cpu().double(), b.detach().cpu().double()
        if not a.dtype.is_floating_point:
            if not torch.equal(got, other):
                raise Disagreement(f"{name}: {int((got != other).sum())} of {got.numel()} elements differ")
            return 0.0, torch.zeros_like(got)
        if got.numel() == 0:
            return 0.0, torch.zeros_like(got)
        info = torch.finfo(a.dtype)
        finite = true.isfinite() & (true.abs() < info.max)
        row = torch.where(finite, true, 0.0).square().mean(-1, keepdim=True).sqrt() if true.ndim else true.abs()
        unit = info.eps * torch.maximum(true.abs().nan_to_num(0.0, 0.0, 0.0), row).clamp_min(info.tiny)

        def units(value: torch.Tensor) -> torch.Tensor:
            return torch.where(finite, (value - true).abs() / unit, 0.0)

        nudge = max(float(units(m).nan_to_num(0.0, 0.0, 0.0).max()) for m in moved)
        limit = self.margin * (float(units(other).nan_to_num(0.0, 0.0, 0.0).max()) + nudge) + 1.0
        share = units(got).nan_to_num(math.inf, math.inf) / limit
        # Where the truth is NaN or infinite, or beyond the dtype, so must the result be.
        kind = torch.where(true.isnan(), got.isnan(), (got == true.to(a.dtype).double()) | finite)
        share = torch.where(kind, share, math.inf)
        at = int(share.argmax())
        if float(share.flatten()[at]) > 1:
            place = [int(i) for i in torch.unravel_index(torch.tensor(at), true.shape)] if true.ndim else []
            raise Disagreement(
                f"{name}{place}: fn_a gives {got.flatten()[at].item()!r}, fn_b {other.flatten()[at].item()!r}, the "
                f"truth is {true.flatten()[at].item()!r}; fn_a is off by {float(units(got).flatten()[at]):.3g} units "
                f"in the last place, allowed are {limit:.3g}; {int((share > 1).sum())} of {share.numel()} elements "
                "are wrong"
            )
        return float(share.max()), limit * unit

    def _keeps_laws(self, arguments: Arguments, first: list[torch.Tensor], limits: list[torch.Tensor]) -> None:
        if "deterministic" in self.laws:
            for a, b in zip(first, _results(self._run(self.fn_a, arguments)), strict=True):
                if not torch.equal(bits(a), bits(b)):
                    raise Disagreement("deterministic: fn_a gives other bits at a second run")
        if "layout" in self.laws:
            for make, what in ((_dense, "contiguous"), (_stepped, "strided")):
                again = _results(self._run(self.fn_a, _map(make, arguments)))
                for a, b, limit in zip(first, again, limits, strict=True):
                    x, y = a.detach().cpu().double(), b.detach().cpu().double()
                    same = (x == y) | (x.isnan() & y.isnan()) | ((x - y).abs() <= limit) | limit.isinf()
                    if not bool(same.all()):
                        wrong = int((~same).sum())
                        raise Disagreement(f"layout: fn_a gives something else for {what} inputs, in {wrong} elements")

    def _run(self, function: Callable[..., Any], arguments: Arguments) -> Any:
        before = {n: bits(v) for n, v in _items(arguments) if isinstance(v, torch.Tensor)}
        with torch.no_grad():
            result = _call(function, arguments)
        if "inputs_unchanged" in self.laws:
            for name, value in _items(arguments):
                if name in before and not torch.equal(bits(value), before[name]):
                    which = "fn_a" if function is self.fn_a else "fn_b"
                    raise Disagreement(f"inputs_unchanged: {which} changed its argument {name}")
        return result

    def _true(self, wide: Arguments) -> list[torch.Tensor]:
        with exact(), torch.no_grad():
            return [r.detach().cpu().double() for r in _results(_call(self.truth, wide))]


# --- arguments -------------------------------------------------------------------------------------------------------


def _ad_hoc(args: Mapping[str, Tensor | Scalar]) -> OpSpec:
    """A spec for drawing alone, from its arguments."""
    for name, arg in args.items():
        if not isinstance(arg, Tensor | Scalar):
            raise TypeError(f"assert_equivalent: inputs: {name}: wanted a Tensor or a Scalar, got {arg!r}")

    def reference(**values: Any) -> dict[str, torch.Tensor]:
        raise NotImplementedError  # nothing but its signature is read

    reference.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in args]
    )
    nothing = ErrorModel(lambda args, truth, dims: {})
    return OpSpec(reference, args, {}, nothing, lambda d, s: 0.0, (), name="function")


def _is_strategy(inputs: Any) -> bool:
    try:
        from hypothesis.strategies import SearchStrategy
    except ModuleNotFoundError:
        return False
    return isinstance(inputs, SearchStrategy)


def _with_hypothesis(inputs: Any, rule: _Rule, found: Equivalence, examples: int) -> None:
    import hypothesis

    @hypothesis.settings(max_examples=examples, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
    @hypothesis.given(inputs)
    def holds(arguments: Arguments) -> None:
        found.add(found.examples, rule.check(arguments, 0))

    holds()


def _items(arguments: Arguments) -> list[tuple[str, Any]]:
    return list(arguments.items()) if isinstance(arguments, dict) else [(str(i), v) for i, v in enumerate(arguments)]


def _map(change: Callable[[torch.Tensor], Any], arguments: Arguments) -> Arguments:
    changed = {n: change(v) if isinstance(v, torch.Tensor) else v for n, v in _items(arguments)}
    return changed if isinstance(arguments, dict) else tuple(changed.values())


def _call(function: Callable[..., Any], arguments: Arguments) -> Any:
    return function(**arguments) if isinstance(arguments, dict) else function(*arguments)


def _results(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, Mapping):
        result = result.values()
    return [r for r in result if r is not None]


def _moved(arguments: Any, device: str) -> Arguments:
    if isinstance(arguments, torch.Tensor):
        arguments = (arguments,)
    return _map(lambda v: v.to(device), tuple(arguments) if isinstance(arguments, list) else arguments)


def _wide(arguments: Arguments) -> Arguments:
    return _map(lambda v: v.detach().double() if v.is_floating_point() else v, arguments)


def _unit(arguments: Arguments) -> float:
    """The unit roundoff of the accumulator."""
    wide = any(isinstance(v, torch.Tensor) and v.dtype == torch.float64 for _, v in _items(arguments))
    return torch.finfo(torch.float64 if wide else torch.float32).eps / 2


def _nudged(wide: Arguments, unit: float, seed: int) -> list[Arguments]:
    """Every floating point input moved by a rounding of the accumulator, up or down; a few times."""
    random = Random(seed, 1)

    def nudge(value: torch.Tensor) -> torch.Tensor:
        if not value.is_floating_point():
            return value
        return value * (1 + unit * (2 * random.integers(0, 2, value.shape) - 1).to(value.device))

    return [_map(nudge, wide) for _ in range(NUDGES)]


def _dense(value: torch.Tensor) -> torch.Tensor:
    return value.detach().clone(memory_format=torch.contiguous_format)


def _stepped(value: torch.Tensor) -> torch.Tensor:
    """The same values at every second place of memory; between them NaN, or the integers' largest."""
    if value.ndim == 0:
        return value
    poison = math.nan if value.is_floating_point() else value.dtype == torch.bool or torch.iinfo(value.dtype).max
    buffer = torch.full((*value.shape[:-1], 2 * value.shape[-1]), poison, dtype=value.dtype, device=value.device)
    view = buffer[..., ::2]
    view.copy_(value.detach())
    return view


def _pull(function: Callable[..., Any], arguments: Arguments, upstream: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gradient of each floating point argument, zeros where none comes back."""
    leaves = {
        n: v.detach().clone().requires_grad_()
        for n, v in _items(arguments)
        if isinstance(v, torch.Tensor) and v.is_floating_point()
    }
    given = {n: leaves.get(n, v) for n, v in _items(arguments)}
    results = _results(_call(function, given if isinstance(arguments, dict) else tuple(given.values())))
    pairs = [(r, u.to(r.device, r.dtype)) for r, u in zip(results, upstream, strict=True) if r.requires_grad]
    if not pairs:
        return {n: torch.zeros_like(v) for n, v in leaves.items()}
    found = torch.autograd.grad([r for r, _ in pairs], list(leaves.values()), [u for _, u in pairs], allow_unused=True)
    return {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(leaves.items(), found, strict=True)}
