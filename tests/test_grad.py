"""Gradients: every backward operator's reference is the derivative of its forward's; every backend agrees with it."""

from __future__ import annotations

import hypothesis
import pytest
import torch

import isotile
from isotile import library, registry
from isotile.precision import exact
from isotile.testing import build, recipes
from isotile.testing.recipes import dtype_name as name_of

FORWARD = [n for n, s in registry.specs().items() if s.backward is not None]


@pytest.mark.parametrize("op", FORWARD)
def test_the_formula_is_the_derivative_of_the_reference(op):
    """In float64, on drawn calls with every option: autograd through the operator against autograd of the reference."""
    spec = registry.spec(op)
    operator = library.operator(op)

    @hypothesis.settings(max_examples=60)
    @hypothesis.given(recipes(spec, torch.float64, kinds=("normal",)))
    def agrees(recipe):
        if recipe["scalars"].get("activation") == "relu":
            return
        for name, described in recipe["tensors"].items():
            if described["layout"] == "expanded":
                described["layout"] = "contiguous"
            if described["dtype"] in ("float32", "bfloat16", "float16") and "float64" in map(
                name_of, spec.tensors[name].dtypes
            ):
                described["dtype"] = "float64"
        if recipe["scalars"].get("out_dtype") or recipe["scalars"].get("dtype"):
            recipe["scalars"].update(dict.fromkeys({"out_dtype", "dtype"} & recipe["scalars"].keys()))
        call = build(recipe)
        leaves = {
            n: v.requires_grad_()
            for n, v in call.values.items()
            if isinstance(v, torch.Tensor) and spec.tensors[n].differentiable and v.is_floating_point()
        }
        with isotile.use_backend("reference"):
            got = operator.route(call.overload, tuple(call.values[p] for p in operator.parameters))
        want = spec.reference(**call.values)
        names = list(spec.results_of(call.overload))
        generator = torch.Generator().manual_seed(recipe["seed"])
        total_got = total_want = 0.0
        for name, result in zip(names, got, strict=True):
            finite = want[name].isfinite()
            weight = torch.randn(result.shape, generator=generator, dtype=torch.float64)
            total_got = total_got + (torch.where(finite, result, 0.0) * weight).sum()
            total_want = total_want + (torch.where(finite, want[name], 0.0) * weight).sum()
        if not getattr(total_want, "requires_grad", False):
            return  # no groups, or nothing finite: the result is a constant
        found = torch.autograd.grad(total_got, list(leaves.values()), allow_unused=True)
        true = torch.autograd.grad(total_want, list(leaves.values()), allow_unused=True)
        for name, f, t in zip(leaves, found, true, strict=True):
            f = torch.zeros_like(leaves[name]) if f is None else f
            t = torch.zeros_like(leaves[name]) if t is None else t
            t = t.nan_to_num(0.0) if "lse" in names else t  # autograd of where(-inf) rows; ours are exactly 0
            torch.testing.assert_close(
                f, t, rtol=1e-9, atol=1e-9 * max(1.0, float(t.abs().max()) if t.numel() else 1.0)
            )

    agrees()


def test_gradients_run_under_the_state_of_the_forward_call():
    x = torch.randn(3, 8, requires_grad=True)
    seen = []
    spec = registry.spec("softmax_backward")
    with isotile.use_backend("reference"):
        y = isotile.softmax(x)
    operator = library.operator(spec.name)
    operator.plans.clear()
    y.sum().backward()
    seen = [plan.backend for plan in operator.plans.values()]
    assert seen == ["reference"]


def test_alibi_slopes_with_a_gradient_are_refused():
    q = torch.randn(1, 2, 4, 8, requires_grad=True)
    with pytest.raises(ValueError, match="alibi_slopes"):
        isotile.attention(q, q, q, alibi_slopes=torch.ones(2, requires_grad=True))


def test_exact_does_not_round():
    spec = registry.spec("softmax")
    with exact():
        assert spec.reference(torch.randn(4, dtype=torch.bfloat16))["y"].dtype == torch.float64
