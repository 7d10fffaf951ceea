"""The gradient of quantized_linear with respect to its activations."""

from __future__ import annotations

import torch

from ..precision import accumulator, stored
from ..spec import Case, ErrorModel, OpSpec, Result, Tensor, growth
from . import _quantized
from . import quantized_linear as forward


def quantized_linear_backward(grad, x, packed, scales, zeros=None, global_scale=None, scheme="int8", group_size=-1):
    """grad @ weight, the weight's dequantised numbers.

    Args:
        grad: [..., n], the gradient of x @ weight.T. float32, bfloat16, float16 or float64.
        x: [..., k], of grad's dtype; only its shape counts.
        packed, scales, zeros, global_scale, scheme, group_size: as `quantized_linear`.

    Returns:
        grad_x: [..., k] in grad's dtype.
    """
    wide = accumulator(grad.dtype)
    weight = _quantized.dequantized(packed, scales, zeros, global_scale, scheme, group_size, x.shape[-1], wide)
    return {"grad_x": stored(torch.matmul(grad.to(wide), weight), grad.dtype)}


def _lower(tensors, outs, scalars):
    """x is left out: only k is its."""
    parts, numbers = forward.lower_weight(tensors, scalars)
    numbers["k"] = scalars.dims.k
    return "quantized_linear_backward", {"grad": tensors["grad"], **parts}, outs, numbers


def _error(args, truth, dims):
    weight = _quantized.dequantized(
        args.packed, args.scales, args.zeros, args.global_scale, args.scheme, args.group_size, dims.k,
        torch.float64, magnitude=True,
    )  # fmt: skip
    magnitude = torch.matmul(args.grad.double().abs(), weight)
    # As in the forward product: each weight is rounded at most three times on its way, and perhaps to grad's dtype.
    return {"grad_x": (magnitude * (growth(dims.n) + 3.0), magnitude)}


SPEC = OpSpec(
    reference=quantized_linear_backward,
    args={
        "grad": Tensor("... n"),
        "x": Tensor("... k", same_as="grad"),
        **forward.PARTS,
        **forward.FORMAT,
    },
    results={"grad_x": Result("... k", ("grad",))},
    requires=forward.REQUIRES,
    lower=_lower,
    error=ErrorModel(_error),
    flops=lambda d, s: 2 * d.rows * d.n * d.k,
    laws=("row_independent", "deterministic"),
    internal=True,
    complete=forward.complete,
    cases=tuple(
        Case(
            case.name,
            case.tags,
            {"grad": (case.args["x"][0], case.args["packed"][0]), **case.args},
            case.dtypes,
        )
        for case in forward.SPEC.cases
    ),
)
