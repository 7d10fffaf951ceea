"""Root-mean-square normalisation, with an optional fused residual addition."""

from __future__ import annotations

from ..precision import stored
from ..spec import Case, ErrorModel, OpSpec, Result, Scalar, Tensor, Values
from . import _norm, layer_norm


def rms_norm(x, normalized_shape, weight=None, eps=None, *, residual=None, weight_offset=0.0):
    """Scale each row of x to unit root mean square, then by weight.

    y = s / sqrt(mean(s^2) + eps) * (weight + weight_offset), with s = x + residual rounded to x's dtype. Statistics
    and arithmetic in float32 (float64 for float64), rounded once. Zhang and Sennrich, Root Mean Square Layer
    Normalization, 2019 (arXiv:1910.07467).

    Args:
        x: [..., *n], float32, bfloat16, float16 or float64.
        normalized_shape: the sizes *n of the last dimensions that one row spans, an int or a sequence.
        weight: [*n], any float dtype; 1 if None (without the offset).
        eps: added to the mean square, at least 0; float32's machine epsilon if None (float64's for float64).
        residual: [..., *n], x's dtype, added to x first.
        weight_offset: added to the weight; 1.0 is the zero-centred form.

    Returns:
        y: [..., *n] in x's dtype; with `residual` the pair (y, x + residual).

    Raises:
        ValueError: a shape that does not fit, or a negative eps.
        TypeError: a dtype or type that is not allowed.
    """
    summed = _norm.add_residual(x, residual)
    y, _ = _norm.scaled(_norm.rows_of(summed, normalized_shape), _norm.default_eps(eps, x.dtype))
    if weight is not None:
        y = y * (_norm.flat(weight, x) + weight_offset)
    return {"y": stored(y.reshape(summed.shape), x.dtype), "sum": stored(summed, x.dtype)}


def _gradient(saved, grads, needs):
    from ..library import call

    grad_x, grad_weight = call(
        "rms_norm_backward",
        *_norm.upstream(saved, grads),
        saved.normalized_shape,
        saved.weight,
        saved.eps,
        weight_offset=saved.weight_offset,
        grad_sum=grads.get("sum"),
        need_x=needs["x"] or needs.get("residual", False),
        need_weight=needs["weight"],
    )
    return {"x": grad_x, "residual": grad_x, "weight": grad_weight}


def _lower(tensors, outs, scalars):
    eps = _norm.default_eps(scalars.eps, tensors["x"].dtype)
    return "rms_norm", tensors, outs, {"eps": eps, "weight_offset": scalars.weight_offset}


def _error(args, truth, dims):
    rows, n = _norm.exact_inputs(args)
    xhat, _ = _norm.scaled(rows, _norm.default_eps(args.eps, args.x.dtype))
    error = xhat.abs() * (_norm.growth(n) + 6)
    if args.weight is not None:
        error = error * (args.weight.double().flatten().abs() + abs(args.weight_offset))
    return {"y": (error.reshape(truth["y"].shape), 0.0), "sum": (0.0, 0.0)}


SPEC = OpSpec(
    reference=rms_norm,
    args={
        "x": Tensor("... *n"),
        "normalized_shape": Scalar("SymInt[]", star="n"),
        "weight": Tensor("*n", optional=True, values=Values(low=0.5, high=1.5)),
        "eps": Scalar(
            "float?", samples=(None, 1e-6, 1e-3), check=lambda v: None if v >= 0 else "wanted a number of at least 0"
        ),
        "residual": Tensor("... *n", same_as="x", optional=True),
        "weight_offset": Scalar("float", samples=(0.0, 1.0)),
    },
    results={"y": Result("... *n", ("x",)), "sum": Result("... *n", ("x",), when="residual")},
    lower=_lower,
    error=ErrorModel(_error),
    flops=lambda d, s: 4 * d.rows * d.n,
    laws=("row_independent", "deterministic"),
    saves={"default": ("x", "weight"), "residual": ("sum", "weight")},
    backward=_gradient,
    autocast="float32",
    cases=tuple(Case(c.name, c.tags, {k: v for k, v in c.args.items() if k != "bias"}) for c in layer_norm.CASES),
)
