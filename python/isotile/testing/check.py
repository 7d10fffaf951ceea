"""Run a recipe on a backend and hold the result against everything that an operator promises."""

from __future__ import annotations

import json
import shlex
from typing import Any

import torch

from .. import dispatch, library
from ..spec import OpSpec
from ..state import use_backend
from .compare import Disagreement, bounds, compare
from .recipes import Call, build, lay_out_result


def repeat_line(recipe: dict[str, Any] | str, backend: str, device: str = "cpu", law: str | None = None) -> str:
    """The command that repeats one recipe: agreement with the truth, or one law.

    Args:
        recipe: itself, or the name of an example of `isotile verify`: seed/operator/dtype/index.
        backend, device: where it ran.
        law: of `isotile.testing.laws`.
    """
    words = ["python -m isotile.testing"]
    if backend == "triton" and device == "cpu":
        words.insert(0, "TRITON_INTERPRET=1")
    words += ["--device", device] if device != "cpu" else []
    words += ["--law", law] if law is not None else []
    spelled = recipe if isinstance(recipe, str) else json.dumps(recipe, sort_keys=True)
    return " ".join([*words, shlex.quote(backend), shlex.quote(spelled)])


def run_guarded(call: Call, backend: str, layout: str) -> dict[str, torch.Tensor]:
    """The results of a call, written into poisoned memory between guards.

    Raises:
        Disagreement: something outside the results was written, or an input was changed.
    """
    spec, values = call.spec, call.values
    operator = library.operator(spec.name)
    device = str(values[next(iter(spec.tensors))].device)
    dims = dispatch.bind_call(spec, values)
    wanted = dispatch.out_specs(spec, call.overload, values, dims)
    names = [n for n, o in zip(spec.results, wanted, strict=True) if o is not None]
    placed = [lay_out_result(o.shape, o.dtype, layout, device) for o in wanted if o is not None]
    outs = [view for view, _ in placed]
    before = {n: bits(v) for n, v in values.items() if isinstance(v, torch.Tensor)}
    guards = [bits(buffer) for _, buffer in placed]
    with use_backend(backend), torch.no_grad():
        operator.execute(call.overload, tuple(values[p] for p in operator.parameters), outs or None)
    for name, old in before.items():
        if not torch.equal(bits(values[name]), old):
            raise Disagreement(f"input {name} was changed")
    for name, (view, buffer), old in zip(names, placed, guards, strict=True):
        written = torch.zeros(buffer.shape, dtype=torch.bool)
        written.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        if not torch.equal(bits(buffer)[~written], old[~written]):
            raise Disagreement(f"{name}: memory outside the result was written")
    return dict(zip(names, outs, strict=True))


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's elements, on the CPU, for comparing NaNs too."""
    dense = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
    return dense if dense.dtype == torch.bool else dense.view(_INTEGERS[dense.element_size()])


_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def check_recipe(recipe: dict[str, Any], backend: str, device: str = "cpu") -> float:
    """Agreement with the float64 truth, guards, unchanged inputs, and exactness on integers.

    Returns:
        The largest error as a share of the bound.

    Raises:
        Disagreement: what is wrong, and the line that repeats it.
    """
    call = build(recipe, device)
    try:
        results = run_guarded(call, backend, recipe["out"])
        on_cpu = {n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in call.values.items()}
        worst = 0.0
        expected = bounds(call.spec, call.overload, on_cpu)
        for name, result in results.items():
            worst = max(worst, compare(name, result, expected[name]))
        if promises_integers(call.spec, recipe):
            for name, result in results.items():
                want = expected[name].truth.to(result.dtype)
                if not torch.equal(result.cpu(), want):
                    raise Disagreement(f"{name}: small integers must give the exact product")
    except Disagreement as error:
        raise Disagreement(f"{error}\n  repeat: {repeat_line(recipe, backend, device)}") from None
    return worst


def promises_integers(spec: OpSpec, recipe: dict[str, Any]) -> bool:
    """Whether a recipe's results must be exact: small integers through sums that the accumulator holds."""
    return (
        "exact_on_integers" in spec.laws
        and recipe["kind"] == "integers"
        and recipe["scalars"].get("activation") in (None, "relu")
    )
