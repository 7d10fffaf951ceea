"""Derived error bounds and the comparison with the truth."""

from __future__ import annotations

import dataclasses
import math
from types import SimpleNamespace
from typing import Any

import torch

from .. import dispatch
from ..precision import exact
from ..shapes import Dims
from ..spec import OpSpec


class Disagreement(AssertionError):
    """A result that no correct kernel may give."""


@dataclasses.dataclass
class Bound:
    """The truth of one result, and how far from it each element may be."""

    truth: torch.Tensor  # float64
    allowed: torch.Tensor  # float64; inf where nothing is promised of what is finite, NaN where nothing at all
    dtype: torch.dtype


def ulp(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbouring numbers of `dtype` at float64 `value`, subnormals included."""
    info = torch.finfo(dtype)
    magnitude = value.abs().nan_to_num(0.0, 0.0, 0.0).clamp(info.smallest_normal, info.max)
    mantissa, _ = torch.frexp(magnitude)  # in [0.5, 1), so that the quotient is a power of two exactly
    return magnitude / (2 * mantissa) * info.eps


def truth_of(spec: OpSpec, values: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The results in float64 of the operator's meaning on the same, already rounded inputs."""
    with exact(), torch.no_grad():
        return {n: t.double() for n, t in spec.reference(**values).items()}


def bounds(spec: OpSpec, overload: str, values: dict[str, Any], dims: Dims | None = None) -> dict[str, Bound]:
    """Truth and bound of every result of a call: ulps of the result, plus the spec's error terms.

    Args:
        spec: the operator.
        overload: which of its overloads.
        values: all arguments by name, on the CPU.
    """
    dims = dims or dispatch.bind_call(spec, values)
    bound_dims = dispatch.bind_call(spec, values)
    outs = dispatch.out_specs(spec, overload, values, bound_dims)
    truth = truth_of(spec, values)
    first = values[next(iter(spec.tensors))].dtype
    wide = torch.float64 if first == torch.float64 else torch.float32
    unit, operand_unit = torch.finfo(wide).eps / 2, torch.finfo(first).eps / 2
    if wide == torch.float64:
        unit *= 2  # the truth is computed in the same precision, and errs as much
    floor = torch.finfo(wide).smallest_normal
    with exact(), torch.no_grad():
        terms = spec.error.terms(SimpleNamespace(**values), truth, bound_dims)
    found = {}
    for (name, _), out in zip(spec.results.items(), outs, strict=True):
        if out is None:
            continue
        accumulated, operand, *undecided = terms[name]
        exact_value = truth[name]
        allowed = spec.error.ulps * ulp(exact_value, out.dtype)
        allowed = allowed + unit * accumulated + operand_unit * operand + 64 * floor
        if wide == torch.float32:
            # An intermediate that overflows float32 makes anything possible.
            huge = torch.as_tensor(accumulated, dtype=torch.float64) > torch.finfo(wide).max / 16
            allowed = torch.where(huge, math.inf, allowed)
        allowed = torch.where(torch.as_tensor(allowed).isnan(), math.inf, allowed).expand(exact_value.shape)
        for places in undecided:
            allowed = torch.where(places, math.nan, allowed)
        found[name] = Bound(exact_value, allowed, out.dtype)
    return found


def compare(name: str, result: torch.Tensor, bound: Bound) -> float:
    """Check one result; returns the largest error as a share of what is allowed.

    Raises:
        Disagreement: naming the worst element, what it is and what it should be.
    """
    got = result.detach().cpu().double()
    want, allowed = bound.truth, bound.allowed
    if tuple(got.shape) != tuple(want.shape):
        raise Disagreement(f"{name}: shape {list(got.shape)}, wanted {list(want.shape)}")
    if result.dtype != bound.dtype:
        raise Disagreement(f"{name}: dtype {result.dtype}, wanted {bound.dtype}")
    if got.numel() == 0:
        return 0.0
    limit = torch.finfo(bound.dtype).max
    overflows = want.abs() + allowed > limit
    same = (
        (got == want) | (got.isnan() & want.isnan()) | (overflows & (got.abs() >= limit) & (got.sign() == want.sign()))
    )
    unpromised = allowed.isnan() | (allowed.isinf() & want.isfinite())
    error = torch.where(same | unpromised, 0.0, (got - want).abs() / allowed)
    error = error.nan_to_num(math.inf, math.inf)
    worst = int(error.argmax())
    share = float(error.flatten()[worst])
    if share > 1:
        at = [int(i) for i in torch.unravel_index(torch.tensor(worst), want.shape)] if want.ndim else []
        raise Disagreement(
            f"{name}{at}: got {got.flatten()[worst].item()!r}, wanted {want.flatten()[worst].item()!r} within "
            f"{allowed.flatten()[worst].item():.3g} (error {share:.3g} times that); "
            f"{int((error > 1).sum())} of {error.numel()} elements are wrong"
        )
    return share
