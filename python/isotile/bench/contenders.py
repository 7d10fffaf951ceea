"""Who runs a workload: isotile on each backend, and the rivals."""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

import isotile
import isotile.nn

from .. import library
from ..backends import BACKENDS
from ..spec import OpSpec
from ..state import use_backend
from . import rivals
from .workloads import Inputs, Workload

Call = Callable[[], Any]


class Unserved(Exception):
    """This contender does not take this workload; the message says why."""


class Contender:
    """One way to do a workload.

    Attributes:
        name: `"cpu"`, `"torch"`.
        ours: whether it is isotile, which must agree within the derived bound.
        modelled: whether its rows are modelled, not measured (see `modelled.py`).
    """

    ours = False
    modelled = False
    #: seconds to wait after a sample of it, where threads of its own go on for a while
    settle_s = 0.0

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def missing(cls) -> str | None:
        """Why this contender cannot be had here; None if it can."""
        return None

    def bind(self, spec: OpSpec, values: dict[str, Any]) -> Call:
        """The forward call on these tensors: a function of no arguments.

        Raises:
            Unserved: it does not take this workload.
        """
        raise NotImplementedError

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def settings(self) -> dict[str, Any]:
        return {}


class Ours(Contender):
    """isotile's public function on one backend.

    Attributes:
        constant_weights: whether `linear`, where nothing needs a gradient, is a layer that keeps its weight packed, as
            some rivals do.
    """

    ours = True

    def __init__(self, name: str, constant_weights: bool = False) -> None:
        super().__init__(name)
        self.constant_weights = constant_weights

    def bind(self, spec: OpSpec, values: dict[str, Any]) -> Call:
        tensors = [v for v in values.values() if isinstance(v, torch.Tensor)]
        if self.constant_weights and spec.name == "linear" and not any(t.requires_grad for t in tensors):
            return _constant_linear(values)
        return _public_call(spec, values)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        return use_backend(self.name)

    def settings(self) -> dict[str, Any]:
        return BACKENDS[self.name].info()


def quantized_weight(values: dict[str, Any]) -> isotile.QuantizedWeight:
    """The parts of a weight taken out of a call's arguments, as one."""
    parts = {n: values.pop(n, None) for n in ("packed", "scales", "zeros", "global_scale")}
    scheme, group_size = values.pop("scheme", "int8"), values.pop("group_size", -1)
    shape = (parts["packed"].shape[0], values["x"].shape[-1])
    return isotile.QuantizedWeight(**parts, scheme=scheme, group_size=group_size, shape=shape)


def _constant_linear(values: dict[str, Any]) -> Call:
    if values["out_dtype"] is not None:
        raise Unserved("isotile.nn.Linear has no out_dtype")
    weight, bias = values["weight"], values["bias"]
    layer = torch.nn.utils.skip_init(
        isotile.nn.Linear, weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype,
        activation=values["activation"], constant_weight=True,
    )  # fmt: skip
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else torch.nn.Parameter(bias, requires_grad=False)
    return functools.partial(layer, values["x"], residual=values["residual"])


def _public_call(spec: OpSpec, values: dict[str, Any]) -> Call:
    if spec.internal:
        return functools.partial(library.call, spec.name, **values)
    door = getattr(isotile, spec.name)
    names = set(inspect.signature(door).parameters)
    given = {n: v for n, v in values.items() if v is not spec.signature.parameters[n].default}
    if spec.name == "quantized_linear":
        given["weight"] = quantized_weight(given)
    if spec.name == "attention":
        left, right = given.pop("window_left", None), given.pop("window_right", None)
        if left is not None or right is not None:
            given["window"] = (left, right)
        if given["query"].shape[-3] != given["key"].shape[-3]:
            given["enable_gqa"] = True
        given.pop("dropout_seed", None)  # the public function draws its own
        if given.get("dropout_p"):
            raise Unserved("dropout draws its own seed, so its result cannot be checked against a fixed truth")
    unknown = set(given) - names
    if unknown:
        raise Unserved(f"isotile.{spec.name} has no argument {', '.join(sorted(unknown))}")
    bound = inspect.signature(door).bind(**given)
    return functools.partial(door, *bound.args, **bound.kwargs)


class Torch(Contender):
    """What a PyTorch user writes, eagerly."""

    def bind(self, spec: OpSpec, values: dict[str, Any]) -> Call:
        expression = rivals.torch_expression(spec.name, values)
        if isinstance(expression, str):
            raise Unserved(expression)
        function, operands = expression
        return functools.partial(function, *operands)

    def settings(self) -> dict[str, Any]:
        return {"torch": torch.__version__, "float32_matmul_precision": torch.get_float32_matmul_precision()}


class Compiled(Torch):
    """The same under torch.compile."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self._functions: dict[Any, Callable[..., Any]] = {}

    def bind(self, spec: OpSpec, values: dict[str, Any]) -> Call:
        expression = rivals.torch_expression(spec.name, values)
        if isinstance(expression, str):
            raise Unserved(expression)
        function, operands = expression
        if function not in self._functions:
            # torch.compile leaves functions of torch itself alone, so there must be one around them.
            self._functions[function] = torch.compile(lambda *a: function(*a), fullgraph=True, dynamic=False)
        return functools.partial(self._functions[function], *operands)

    def context(self) -> contextlib.AbstractContextManager[Any]:
        # The backward pass is repeated on one graph, so it must not reuse what the forward saved.
        return torch._functorch.config.patch(donated_buffer=False)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "fullgraph": True, "dynamic": False, "mode": "default"}

    def forget(self) -> None:
        """Drop compiled code: a workload has shapes of its own, and there is a limit of recompilations."""
        self._functions.clear()
        torch.compiler.reset()


def as_tuple(result: Any) -> tuple[torch.Tensor, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


class Prepared:
    """A contender with its calls on every set of inputs, ready to be timed."""

    def __init__(self, contender: Contender, workload: Workload, inputs: Inputs) -> None:
        self.contender = contender
        self.wanted = inputs.differentiable()
        self.forwards = [contender.bind(workload.spec, values) for values in inputs.sets]
        self.calls: list[Call] = self.forwards
        self.gradients: list[torch.Tensor] = []
        self.backward = workload.direction == "backward"

    def first(self) -> tuple[torch.Tensor, ...]:
        """The first forward call's results."""
        return as_tuple(self.forwards[0]())

    def prepare_backward(self, inputs: Inputs, upstream: list[torch.Tensor]) -> tuple[torch.Tensor | None, ...]:
        """Run every forward, make the backward calls, and return the gradients of the first set."""
        calls: list[Call] = []
        for forward, values in zip(self.forwards, inputs.sets, strict=True):
            outs = [r for r in as_tuple(forward()) if r.requires_grad]
            leaves = [values[n] for n in self.wanted]
            grads = upstream[: len(outs)]
            calls.append(functools.partial(torch.autograd.grad, outs, leaves, grads, True, allow_unused=True))
        self.calls = calls
        return calls[0]()
