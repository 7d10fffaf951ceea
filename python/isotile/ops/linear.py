"""The linear layer: matrix product with a weight stored as [out, in], and a fused epilogue."""

from __future__ import annotations

import torch

from ..spec import Case, ErrorModel, OpSpec, Result, Tensor
from . import matmul as product


def linear(x, weight, bias=None, *, activation=None, residual=None, out_dtype=None):
    """activation(x @ weight.T + bias) + residual, as `torch.nn.functional.linear` with an epilogue.

    Products are accumulated in float32 (float64 for float64); the epilogue runs in that precision and the result is
    rounded once.

    Args:
        x: [..., k]. float32, bfloat16, float16 or float64.
        weight: [n, k], of x's dtype.
        bias: [n], any float dtype.
        activation: None, "relu", "gelu" (exact), "gelu_tanh", "silu", "sigmoid" or "tanh".
        residual: any shape that broadcasts to the result's, any float dtype; added last.
        out_dtype: the result's dtype; x's if None.

    Returns:
        y: [..., n].

    Raises:
        ValueError: a shape or option that does not fit.
        TypeError: a dtype or type that is not allowed.
    """
    return product.matmul(x, weight.mT, bias=bias, activation=activation, residual=residual, out_dtype=out_dtype)


def _gradient(saved, grads, needs):
    from ..library import call

    x, weight = saved.x, saved.weight
    grad_z, found = product.epilogue_gradient(
        saved, grads, needs, lambda: call("linear", x, weight, saved.bias, out_dtype=saved.out_dtype)[0]
    )
    grad_z = grad_z.to(x.dtype)
    if needs["x"]:
        found["x"] = call("matmul", grad_z, weight)[0]
    if needs["weight"]:
        found["weight"] = call("matmul", _matrix(grad_z).mT, _matrix(x))[0]
    return found


def _matrix(x):
    """All leading dimensions as rows."""
    return x.unsqueeze(0) if x.ndim == 1 else x.flatten(0, -2)


def _lower(tensors, outs, scalars):
    """A matmul by the transposed view of the weight; the last leading dimension of x is its m."""
    loop = scalars.dims.loop
    lead = max(len(loop) - 1, 0)

    def matrix(view):
        return view if view is None or loop else view.unsqueeze(0)

    weight = tensors["weight"].transpose(0, 1)
    product_tensors = {
        "a": matrix(tensors["x"]),
        "b": weight.expand((*loop[:-1], *weight.shape)),
        "bias": tensors["bias"],
        "residual": matrix(tensors["residual"]),
    }
    return product.lower_product(product_tensors, {k: matrix(v) for k, v in outs.items()}, scalars.activation, lead)


def _error(args, truth, dims):
    return product.product_error(
        torch.matmul(args.x.double().abs(), args.weight.double().abs().mT), dims.k, args, truth
    )


SPEC = OpSpec(
    reference=linear,
    args={
        "x": Tensor("... k"),
        "weight": Tensor("n k", same_as="x"),
        **product.EPILOGUE,
        "residual": Tensor("... n", optional=True, broadcast=True),
    },
    results={
        "y": Result("... n", ("out_dtype", "x")),
        "preactivation": Result("... n", ("out_dtype", "x"), when="preactivation"),
    },
    lower=_lower,
    error=ErrorModel(_error),
    flops=lambda d, s: 2 * d.rows * d.n * d.k,
    laws=("exact_on_integers", "row_independent", "deterministic"),
    saves={"default": ("x", "weight", "bias"), "preactivation": ("x", "weight", "bias", "preactivation")},
    backward=_gradient,
    grad_overload=product.GRAD_OVERLOAD,
    autocast="lower",
    cases=tuple(
        Case(name, tags, {"x": (m, k), "weight": (n, k), "bias": (n,)}) for name, tags, m, k, n in product.SHAPES
    ),
)
