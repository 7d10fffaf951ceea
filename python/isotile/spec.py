"""The record that states everything about one operator, whatever the machine.

Each `ops/<op>.py` defines one `SPEC`. Readers: `library` (schema, fake kernel, autograd, autocast, vmap, the public
function), `dispatch` (validation, plans), `testing` (drawn inputs, error bounds, laws), `cost` and `bench` (flops,
bytes, cases), `__main__` (the README's table).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch

from . import shapes

FLOATS: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MASKS: tuple[torch.dtype, ...] = (torch.bool, *FLOATS)


@dataclasses.dataclass(frozen=True)
class Values:
    """How test and benchmark inputs are filled: normal with `scale`, or uniform in `[low, high]`, or integers.

    `codes` are the bounds `[low, high)` of an argument that has an integer dtype.
    """

    scale: float = 1.0
    low: float | None = None
    high: float | None = None
    codes: tuple[int, int] | None = None
    #: `make(random, dims, shape) -> tensor`, for arguments of a structure; random is a `testing.draws.Random`
    make: Callable[..., torch.Tensor] | None = None


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor argument.

    Attributes:
        dims: shape pattern, see `isotile.shapes`.
        dtypes: dtypes allowed.
        same_as: another argument whose dtype this one must have.
        optional: may be None.
        broadcast: any shape that broadcasts to `dims` is accepted.
        differentiable: has a gradient; otherwise an input that requires one is refused.
        autocast: whether autocast changes its dtype.
        values: the domain that tests and benchmarks draw from.
    """

    dims: str
    dtypes: tuple[torch.dtype, ...] = FLOATS
    same_as: str | None = None
    optional: bool = False
    broadcast: bool = False
    differentiable: bool = True
    autocast: bool = True
    values: Values = Values()

    @property
    def pattern(self) -> shapes.Pattern:
        return shapes.parse(self.dims)


@dataclasses.dataclass(frozen=True)
class Scalar:
    """An argument that is not a tensor.

    Attributes:
        type: its torch schema type, such as `float`, `float?`, `bool`, `int`, `str?`, `SymInt[]`, `ScalarType?`.
        choices: the values allowed, if they are few.
        check: the reason why a value is wrong, or None.
        samples: values that tests draw; `choices` if not given.
        star: the `*` group whose lengths this argument gives (`normalized_shape`).
    """

    type: str
    choices: tuple[Any, ...] | None = None
    check: Callable[[Any], str | None] | None = None
    samples: tuple[Any, ...] | None = None
    star: str | None = None


@dataclasses.dataclass(frozen=True)
class Result:
    """A result.

    Attributes:
        dims: its shape pattern.
        dtype: names tried in order: a tensor argument's dtype, or a `ScalarType?` argument that is given;
            `"accumulator"` is float64 if the first tensor is, else float32.
        when: the result exists only in the overload of this name. If an optional tensor argument has that name, the
            overload is the one where it is given.
        needs: name of a bool argument; without it the result is an empty tensor.
        differentiable: gradients flow through it.
    """

    dims: str
    dtype: tuple[str, ...]
    when: str | None = None
    needs: str | None = None
    differentiable: bool = True

    @property
    def pattern(self) -> shapes.Pattern:
        return shapes.parse(self.dims)


@dataclasses.dataclass(frozen=True)
class ErrorModel:
    """What a correct kernel may differ from the float64 truth by, elementwise.

    bound = ulps * ulp(truth in the result dtype) + u_acc * accumulated + u_in * operand

    `terms(args, truth, dims)` gives for each result `(accumulated, operand)`: float64 magnitudes that the units in
    the last place of the accumulator, and of the operands' dtype, multiply. `growth(n)` is the factor of a sum of n
    terms. A third item, a mask, tells where nothing at all is promised: infinity times what may be 0 or either sign.
    """

    terms: Callable[[SimpleNamespace, dict[str, torch.Tensor], shapes.Dims], dict[str, tuple[Any, ...]]]
    ulps: float = 1.0


def growth(n: int) -> float:
    """Factor of the unit roundoff in the error of a sum of `n` terms, times the sum of magnitudes.

    min(n, 6 sqrt(n)): the deterministic bound, or the probabilistic one at a failure probability near 1e-7
    (Higham and Mary, A New Approach to Probabilistic Rounding Error Analysis, SIAM J. Sci. Comput. 41(5), 2019).
    """
    return float(min(n, 6.0 * math.sqrt(n))) + 1.0


@dataclasses.dataclass(frozen=True)
class Case:
    """Named shapes of a real situation. `tags`: `smoke` (tests), `bench`, `tune`.

    `args` holds a shape for each tensor argument that is present, and scalars by name.
    """

    name: str
    tags: str
    args: Mapping[str, Any]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A call in kernel form: which kernel, its views by the kernel's own names in order, its scalars in order."""

    kernel: str
    tensors: dict[str, shapes.View | None]
    outs: dict[str, shapes.View | None]
    scalars: dict[str, float]


@dataclasses.dataclass(frozen=True)
class OpSpec:
    """One operator.

    Attributes:
        reference: plain PyTorch, the operator's meaning. Its signature is the operator's; its docstring the public one.
            Returns a dict from result name to tensor.
        args: each parameter of `reference` as `Tensor` or `Scalar`.
        results: in order; those with `when` belong to overloads.
        lower: views and scalars of a call to kernel form; by default names and order as declared. Returns
            `(kernel, tensors, outs, scalars)`, and as a fifth the number of loop dimensions if it is not the pattern's.
        requires: `(argument, sentence, predicate(dims, scalars))`, limits of the mathematics. The sentence says what
            was wanted; it may be a function of the same arguments.
        error: the error model.
        flops: useful floating point operations of a call, from its dims (and scalars).
        laws: promises beyond agreement, by name of a law in `isotile.testing.laws`.
        saves: which arguments and results the backward needs, for each overload.
        grad_overload: `(argument, overload)`: where a gradient is needed and that argument is given, run that
            overload instead of "default", since it saves more.
        backward: `formula(saved, grads, needs) -> dict argument -> gradient`; None: the reference is differentiated.
        autocast: "lower" casts to autocast's dtype, "float32" to float32, None leaves dtypes alone.
        batch: a core dimension whose entries are as independent as a loop dimension's (the rows of a matrix product).
        vmap_scalars: scalars to change when a leading loop dimension is added.
        door: the public function where it differs from the operator (other option names, fewer results).
        nonfinite: NaN and infinite inputs give NaN and infinity exactly where the reference does. False promises
            only that they do not spread where nothing reads them.
        internal: not exported from `isotile` (backward operators).
        complete: amends a drawn recipe by what follows from other choices (a packed size, a dtype, an absent part).
    """

    reference: Callable[..., dict[str, torch.Tensor]]
    args: Mapping[str, Tensor | Scalar]
    results: Mapping[str, Result]
    error: ErrorModel
    flops: Callable[[shapes.Dims, SimpleNamespace], float]
    cases: tuple[Case, ...]
    lower: Callable[[dict[str, Any], dict[str, Any], SimpleNamespace], tuple[Any, ...]] | None = None
    requires: tuple[
        tuple[str, str | Callable[[shapes.Dims, SimpleNamespace], str], Callable[[shapes.Dims, SimpleNamespace], bool]],
        ...,
    ] = ()
    laws: tuple[str, ...] = ()
    saves: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    backward: Callable[[SimpleNamespace, dict[str, Any], dict[str, bool]], dict[str, Any]] | None = None
    grad_overload: tuple[str, str] | None = None
    autocast: str | None = None
    batch: str | None = None
    vmap_scalars: Callable[[SimpleNamespace], dict[str, Any]] | None = None
    door: Callable[..., Any] | None = None
    nonfinite: bool = True
    internal: bool = False
    complete: Callable[[dict[str, Any]], None] | None = None
    name: str = ""  # set by the registry from the file's name

    @functools.cached_property
    def signature(self) -> inspect.Signature:
        return inspect.signature(self.reference)

    @functools.cached_property
    def tensors(self) -> dict[str, Tensor]:
        return {k: a for k in self.signature.parameters if isinstance(a := self.args[k], Tensor)}

    @functools.cached_property
    def scalars(self) -> dict[str, Scalar]:
        return {k: a for k in self.signature.parameters if isinstance(a := self.args[k], Scalar)}

    @functools.cached_property
    def overloads(self) -> tuple[str, ...]:
        """`"default"` first, then each `when`."""
        named = dict.fromkeys(r.when for r in self.results.values() if r.when)
        return ("default", *named)

    def parameters(self, overload: str) -> tuple[str, ...]:
        """The parameters of an overload's schema, in order: all positional, as register_autograd wants them.

        The tensor that an overload is for is required there, so it comes second.
        """
        switches = {o for o in self.overloads if o in self.args}
        names = [p for p in self.signature.parameters if p not in switches]
        if overload in switches:
            names.insert(1, overload)
        return tuple(names)

    def results_of(self, overload: str) -> dict[str, Result]:
        return {k: r for k, r in self.results.items() if r.when is None or r.when == overload}

    def schema(self, overload: str) -> str:
        """The torch schema of an overload, without the namespace."""
        words = []
        for name in self.parameters(overload):
            parameter = self.signature.parameters[name]
            arg = self.args[name]
            required = name == overload
            if isinstance(arg, Tensor):
                kind = "Tensor?" if arg.optional and not required else "Tensor"
            else:
                kind = arg.type
            word = f"{kind} {name}"
            if parameter.default is not inspect.Parameter.empty and not required:
                word += f"={_spell_default(parameter.default)}"
            words.append(word)
        outs = ["Tensor"] * len(self.results_of(overload))
        returns = outs[0] if len(outs) == 1 else f"({', '.join(outs)})"
        suffix = "" if overload == "default" else f".{overload}"
        return f"{self.name}{suffix}({', '.join(words)}) -> {returns}"


def _spell_default(value: Any) -> str:
    if isinstance(value, bool) or value is None or isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str):
        return f'"{value}"'
    raise TypeError(f"no schema spelling for default {value!r}")
