"""The laws that every operator keeps beyond agreement with the truth, as checks of one recipe on one backend.

A check returns a figure (its law's; None where it has none) or raises `Disagreement`. It raises `Inapplicable` where
the recipe has nothing that the law speaks of, and `BackendError` where the backend refuses the call.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from .. import library
from ..spec import OpSpec
from ..state import determinism, use_backend
from .check import bits, run_guarded
from .compare import Bound, Disagreement, bounds, compare
from .draws import Random
from .recipes import Call, build


class Inapplicable(Exception):
    """A recipe that a law says nothing about; the message says why."""


@dataclasses.dataclass
class Subject:
    """One recipe on one backend: its tensors, the truth, and how to run it.

    `expected` may be given where the truth has been computed already.
    """

    recipe: dict[str, Any]
    backend: str
    device: str = "cpu"
    expected: dict[str, Bound] | None = None

    @functools.cached_property
    def call(self) -> Call:
        return build(self.recipe, self.device)

    @property
    def spec(self) -> OpSpec:
        return self.call.spec

    def bounds(self) -> dict[str, Bound]:
        if self.expected is None:
            self.expected = bounds(self.spec, self.call.overload, on_cpu(self.call.values))
        return self.expected

    def run(self, values: dict[str, Any] | None = None) -> dict[str, torch.Tensor]:
        """The results that are not empty by choice, on fresh contiguous memory."""
        values = values or self.call.values
        operator = library.operator(self.spec.name)
        with use_backend(self.backend), torch.no_grad():
            results = operator.execute(self.call.overload, tuple(values[p] for p in operator.parameters))
        names = self.spec.results_of(self.call.overload)
        wanted = {n: r for n, r in self.spec.results.items() if n in names}
        return {
            n: result
            for (n, r), result in zip(wanted.items(), results, strict=True)
            if r.needs is None or values[r.needs]
        }

    def guarded(self) -> dict[str, torch.Tensor]:
        return run_guarded(self.call, self.backend, self.recipe["out"])


def on_cpu(values: dict[str, Any]) -> dict[str, Any]:
    return {n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in values.items()}


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(bits(a), bits(b))


def difference(name: str, got: torch.Tensor, other: torch.Tensor, bound: Bound) -> float:
    """Two results of one call against each other, as a share of the sum of both bounds.

    Raises:
        Disagreement: they are further apart than that, or one is finite where the other must be too.
    """
    wanted = dataclasses.replace(bound, truth=other.detach().cpu().double(), allowed=2 * bound.allowed)
    # Where the truth overflows the dtype, either may have.
    edge = bound.truth.abs() + bound.allowed > torch.finfo(bound.dtype).max
    wanted.allowed = torch.where(edge & bound.truth.isfinite(), math.inf, wanted.allowed)
    wanted.truth = torch.where(edge & bound.truth.isfinite(), got.detach().cpu().double(), wanted.truth)
    return compare(name, got, wanted)


# --- the laws --------------------------------------------------------------------------------------------------------


def layout_does_not_matter(subject: Subject) -> float:
    """Strided, transposed, expanded and offset inputs give what contiguous copies give, within both bounds.

    Returns the largest difference as a share of that.
    """
    if all(t["layout"] == "contiguous" for t in subject.recipe["tensors"].values()):
        raise Inapplicable("all inputs are contiguous")
    dense = {
        n: v.clone(memory_format=torch.contiguous_format) if isinstance(v, torch.Tensor) else v
        for n, v in subject.call.values.items()
    }
    strided, plain = subject.run(), subject.run(dense)
    return max((difference(n, strided[n], plain[n], b) for n, b in subject.bounds().items()), default=0.0)


def deterministic(subject: Subject) -> None:
    """The same bits again, inside `isotile.determinism()`."""
    with determinism():
        _same_results(subject.run(), subject.run(), "a second run")


def thread_invariant(subject: Subject) -> None:
    """The same bits on another number of threads, inside `isotile.determinism()`. A promise of the cpu backend's."""
    with determinism():
        first = subject.run()
        with threads(1 if torch.get_num_threads() > 1 else 2):
            other = subject.run()
    _same_results(first, other, "another number of threads")


def _same_results(first: dict[str, torch.Tensor], again: dict[str, torch.Tensor], what: str) -> None:
    for name, result in again.items():
        if not same_bits(result, first[name]):
            raise Disagreement(f"{name}: {what} gave other bits; {_where_bits_differ(result, first[name])}")


def batch_invariant(subject: Subject) -> None:
    """Entry i of a batch has the bits of that entry alone, inside `isotile.determinism(batch_invariant=True)`.

    The batch is one of the loop dimensions, or the spec's `batch` dimension (the rows of a matrix product).
    """
    spec, call, recipe = subject.spec, subject.call, subject.recipe
    if recipe["scalars"].get("dropout_p"):
        raise Inapplicable("dropout draws its mask by the position in the batch")
    loop = call.dims.loop
    along = [i for i, size in enumerate(loop) if size > 1]
    if "dim" in spec.scalars and loop:
        along = [i for i in along if i != recipe["scalars"]["dim"] % len(loop)]
    choices: list[int | str] = list(along)
    if spec.batch is not None and not call.dims.absent and call.dims.sizes[spec.batch] > 1:
        choices.append(spec.batch)
    results = [n for n, r in spec.results_of(call.overload).items() if r.pattern.loop]
    if not choices or not results:
        raise Inapplicable("there is no batch of two")
    random = Random(recipe["seed"], 1)
    batch = choices[random.integer(0, len(choices))]
    size = loop[batch] if isinstance(batch, int) else call.dims.sizes[batch]
    entry = random.integer(0, size)

    def alone(tensor: torch.Tensor, pattern: Any, rank: int) -> torch.Tensor:
        """`tensor`, whose rank is `rank` less than that of the whole pattern, at the one entry."""
        if isinstance(batch, str):
            names = [t for t in pattern.core if t.rstrip("?") == batch]
            axis = pattern.core.index(names[0]) - len(pattern.core) + tensor.ndim if names else -1
        else:
            axis = batch - rank if pattern.loop else -1
        return tensor.narrow(axis, entry, 1) if axis >= 0 and tensor.shape[axis] > 1 else tensor

    def missing(name: str) -> int:
        arg = spec.tensors[name]
        if arg.broadcast:
            return len(call.dims.shape(arg.pattern)) - call.values[name].ndim
        return len(loop) - len(recipe["tensors"][name]["loop"])

    values = {
        n: alone(v, spec.tensors[n].pattern, missing(n)) if isinstance(v, torch.Tensor) else v
        for n, v in call.values.items()
    }
    with determinism(batch_invariant=True):
        whole, one = subject.run(), subject.run(values)
    for name in results:
        if name not in whole:
            continue
        want = alone(whole[name], spec.results[name].pattern, 0)
        if not same_bits(one[name], want):
            which = f"loop dimension {batch}" if isinstance(batch, int) else f"dimension {batch}"
            raise Disagreement(
                f"{name}: entry {entry} of {which} has other bits alone; {_where_bits_differ(one[name], want)}"
            )


def hidden_keys_do_not_matter(subject: Subject) -> None:
    """Keys and values that no query may see change no bit of the result when they are NaN."""
    from ..ops.attention import visibility

    call = subject.call
    query, key = call.values["query"], call.values["key"]
    if key.numel() == 0 or query.numel() == 0 or key.shape[:-3] != query.shape[:-3]:
        raise Inapplicable("query and key differ in their loop dimensions, or are empty")
    visible, _ = visibility(SimpleNamespace(**call.values))
    groups = query.shape[-3] // key.shape[-3]
    full = visible.expand(torch.broadcast_shapes(visible.shape, (*query.shape[:-1], key.shape[-2])))
    seen = full.reshape(*full.shape[:-3], key.shape[-3], groups, *full.shape[-2:]).any(-3).any(-2)
    if bool(seen.all()):
        raise Inapplicable("every key is seen")
    values = dict(call.values)
    for name in ("key", "value"):
        own = values[name].shape[:-1]
        counts = seen.expand(torch.broadcast_shapes(seen.shape, own)).long().sum_to_size(own)
        values[name] = values[name].clone(memory_format=torch.contiguous_format)
        values[name][counts == 0] = math.nan
    clean = {n: values[n] if n not in ("key", "value") else call.values[n].contiguous() for n in values}
    before, after = subject.run(clean), subject.run(values)
    for name, result in after.items():
        if not same_bits(result, before[name]):
            raise Disagreement(f"{name}: what no query may see changed it; {_where_bits_differ(result, before[name])}")


def dropout_mask(subject: Subject) -> torch.Tensor:
    """What attention drops is what Philox says, bit for bit.

    With queries of zeros every key weighs the same, and with rows of the unit matrix as values each weight comes
    back by itself: an element is 0 where its weight was dropped. Returns the mask.
    """
    from ..ops import _philox

    random = Random(subject.recipe["seed"], 2)
    batch, heads, queries, keys = 2, 2, random.integer(1, 9), random.integer(1, 49)
    seed = random.integers(-(2**63), 2**63 - 1, (1,)).to(subject.device)
    p = (0.1, 0.3, 0.5, 0.9)[random.integer(0, 4)]
    dtype = subject.call.values["query"].dtype
    unit = torch.eye(keys, dtype=dtype, device=subject.device).expand(batch, heads, keys, keys)
    query = torch.zeros(batch, heads, queries, 8, dtype=dtype, device=subject.device)
    key = torch.zeros(batch, heads, keys, 8, dtype=dtype, device=subject.device)
    operator = library.operator("attention")
    values = operator.bind((query, key, unit), {"dropout_p": p, "dropout_seed": seed})
    with use_backend(subject.backend), torch.no_grad():
        out = operator.execute("default", values)[0]
    got = (out != 0).cpu().reshape(batch * heads, queries, keys)
    want = _philox.keep_mask(seed.cpu(), batch * heads, queries, keys, p)
    if not torch.equal(got, want):
        raise Disagreement(f"out: {int((got != want).sum())} of {want.numel()} dropped or kept against the seed")
    return got


class Recorder(TorchDispatchMode):
    """Keeps every isotile operator that runs through PyTorch's dispatcher: (spec, overload, values, results)."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[OpSpec, str, dict[str, Any], tuple[torch.Tensor, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == library.NAMESPACE:
            op = library.operator(func._opname)
            overload = func._overloadname
            given = dict(zip(op.spec.parameters(overload), args, strict=False))
            values = {**dict.fromkeys(op.parameters), **op.defaults, **given, **(kwargs or {})}
            self.calls.append((op.spec, overload, values, result if isinstance(result, tuple) else (result,)))
        return result


def gradients(subject: Subject) -> float:
    """Every kernel that the backward pass runs keeps its own bound on the inputs that it got.

    That the backward pass is the derivative of the operator's meaning is `gradient_formula`. Returns the largest
    error as a share of a bound.
    """
    spec, call = subject.spec, subject.call
    if subject.recipe["kind"] == "specials":
        raise Inapplicable("what gradients promise for infinite inputs is for the backward operators to say")
    leaves = _leaves(spec, call.values)
    if not leaves:
        raise Inapplicable("no input that a gradient flows to")
    operator = library.operator(spec.name)
    values = {**call.values, **leaves}
    with use_backend(subject.backend):
        results = operator.route(call.overload, tuple(values[p] for p in operator.parameters))
        names = list(spec.results_of(call.overload))
        outs = [r for n, r in zip(names, results, strict=True) if r.requires_grad and spec.results[n].differentiable]
        if not outs:
            raise Inapplicable("the result is a constant")
        random = Random(subject.recipe["seed"], 3)
        upstream = [random.normal(o.shape).float().to(o.dtype).to(o.device) for o in outs]
        recorder = Recorder()
        with recorder:
            torch.autograd.grad(outs, list(leaves.values()), upstream, allow_unused=True)
    worst = 0.0
    for kernel, overload, given, made in recorder.calls:
        expected = bounds(kernel, overload, on_cpu(given))
        for name, result in zip(kernel.results_of(overload), made, strict=True):
            if name in expected:
                try:
                    worst = max(worst, compare(name, result, expected[name]))
                except Disagreement as error:
                    raise Disagreement(f"in the backward pass {kernel.name} gave {error}") from None
    if not recorder.calls:
        raise Inapplicable("the reference is differentiated")
    return worst


def gradient_formula(subject: Subject) -> None:
    """In float64 the operator's backward pass is the derivative of its reference, to nine digits.

    PyTorch differentiates the reference on its own; the reference's own gradient is checked against finite
    differences in the tests (`gradcheck`).
    """
    spec, recipe = subject.spec, subject.recipe
    if recipe["kind"] != "normal":
        raise Inapplicable("the formula is checked on normal values")
    if recipe["scalars"].get("activation") == "relu":
        raise Inapplicable("relu has no derivative at 0")
    wide = {**recipe, "tensors": {}, "scalars": dict(recipe["scalars"])}
    for name in ("out_dtype", "dtype"):
        if wide["scalars"].get(name):
            wide["scalars"][name] = None
    for name, described in recipe["tensors"].items():
        widens = getattr(torch, described["dtype"]).is_floating_point and torch.float64 in spec.tensors[name].dtypes
        own = "float64" if widens else described["dtype"]
        wide["tensors"][name] = {**described, "dtype": own, "layout": "contiguous"}
    call = build(wide, subject.device)
    leaves = _leaves(spec, call.values)
    values = {**call.values, **leaves}
    operator = library.operator(spec.name)
    with use_backend(subject.backend):
        got = operator.route(call.overload, tuple(values[p] for p in operator.parameters))
    want = spec.reference(**values)
    names = list(spec.results_of(call.overload))
    random = Random(recipe["seed"], 4)
    total_got: Any = 0.0
    total_want: Any = 0.0
    for name, result in zip(names, got, strict=True):
        finite = want[name].isfinite()
        weight = random.normal(result.shape).to(result.device)
        total_got = total_got + (torch.where(finite, result, 0.0) * weight).sum()
        total_want = total_want + (torch.where(finite, want[name], 0.0) * weight).sum()
    if not getattr(total_want, "requires_grad", False):
        raise Inapplicable("the result is a constant")
    found = torch.autograd.grad(total_got, list(leaves.values()), allow_unused=True)
    true = torch.autograd.grad(total_want, list(leaves.values()), allow_unused=True)
    for name, f, t in zip(leaves, found, true, strict=True):
        f = torch.zeros_like(leaves[name]) if f is None else f
        t = torch.zeros_like(leaves[name]) if t is None else t
        t = t.nan_to_num(0.0) if "lse" in names else t  # autograd of where(-inf) rows; ours are exactly 0
        scale = max(1.0, float(t.abs().max())) if t.numel() else 1.0
        if not torch.allclose(f, t, rtol=1e-9, atol=1e-9 * scale, equal_nan=True):
            distance = float((f - t).abs().max()) / scale
            raise Disagreement(f"gradient of {name}: {distance:.2g} from the derivative of the reference")


def _leaves(spec: OpSpec, values: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        n: values[n].detach().requires_grad_()
        for n, arg in spec.tensors.items()
        if isinstance(values[n], torch.Tensor) and arg.differentiable and values[n].is_floating_point()
    }


def _where_bits_differ(a: torch.Tensor, b: torch.Tensor) -> str:
    differs = (bits(a) != bits(b)).flatten()
    first = int(differs.nonzero()[0])
    return (
        f"{int(differs.sum())} of {differs.numel()} elements, the first {a.flatten()[first].item()!r} "
        f"and {b.flatten()[first].item()!r}"
    )


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclasses.dataclass(frozen=True)
class Law:
    """One law: its check, which specs it is about, and on which backends and dtypes."""

    check: Callable[[Subject], Any]
    applies: Callable[[OpSpec], bool]
    where: Callable[[str, str], bool] = lambda backend, dtype: True


LAWS: dict[str, Law] = {
    "layout": Law(layout_does_not_matter, lambda s: True),
    "deterministic": Law(deterministic, lambda s: "deterministic" in s.laws),
    "thread_invariant": Law(
        thread_invariant, lambda s: "deterministic" in s.laws, lambda backend, _: backend.startswith("cpu")
    ),
    "batch_invariant": Law(batch_invariant, lambda s: any(r.pattern.loop for r in s.results.values())),
    "hidden_keys": Law(hidden_keys_do_not_matter, lambda s: "hidden_keys_do_not_matter" in s.laws),
    "dropout_mask": Law(dropout_mask, lambda s: "dropout_p" in s.scalars and not s.internal),
    "gradients": Law(gradients, lambda s: s.backward is not None),
    "gradient_formula": Law(gradient_formula, lambda s: s.backward is not None, lambda _, dtype: dtype == "float64"),
}
