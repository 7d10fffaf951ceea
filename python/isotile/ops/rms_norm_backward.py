"""The gradients of root-mean-square normalisation."""

from __future__ import annotations

from ..precision import stored
from ..spec import Case, ErrorModel, OpSpec, Result, Scalar, Tensor, Values
from . import _norm, rms_norm
from .layer_norm_backward import norm_backward_error


def rms_norm_backward(
    grad, x, normalized_shape, weight=None, eps=None, *, weight_offset=0.0, grad_sum=None, need_x=True, need_weight=True
):
    """Gradients of `rms_norm` from the gradient of its result; statistics are taken again from x.

    With g = grad * (weight + weight_offset) and means over a row:
    grad_x = (g - xhat * mean(g * xhat)) * rstd + grad_sum,
    grad_weight = sum over rows of grad * xhat.

    Args:
        grad: [..., *n], the gradient of y.
        x: [..., *n], what was normalised (x + residual where there was one).
        normalized_shape: the sizes *n.
        weight: [*n] or None.
        eps, weight_offset: as in the forward pass.
        grad_sum: [..., *n], the gradient of the second result, added to grad_x.
        need_x: whether grad_x is wanted; likewise need_weight. What is not wanted is returned empty.

    Returns:
        (grad_x, grad_weight) in x's dtype and the weight's dtype.
    """
    xhat, rstd = _norm.scaled(_norm.rows_of(x, normalized_shape), _norm.default_eps(eps, x.dtype))
    upstream = _norm.rows_of(grad, normalized_shape)
    g = upstream if weight is None else upstream * (_norm.flat(weight, x) + weight_offset)
    out = {}
    if need_x:
        dx = (g - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd
        if grad_sum is not None:
            dx = dx + _norm.rows_of(grad_sum, normalized_shape)
        out["grad_x"] = stored(dx.reshape(x.shape), x.dtype)
    if need_weight:
        dtype = x.dtype if weight is None else weight.dtype
        n = xhat.shape[-1]
        rows = upstream.numel() // n if n else 0
        total = (upstream * xhat).reshape(rows, n).sum(0)
        out["grad_weight"] = stored(total.reshape(tuple(normalized_shape)), dtype)
    return out


def _error(args, truth, dims):
    rows, n = _norm.exact_inputs(args)
    xhat, rstd = _norm.scaled(rows, _norm.default_eps(args.eps, args.x.dtype))
    error = xhat.abs() * (_norm.growth(n) + 6)
    return norm_backward_error(args, truth, xhat, rstd, error, n, centred=False)


def _lower(tensors, outs, scalars):
    eps = _norm.default_eps(scalars.eps, tensors["x"].dtype)
    order = {k: tensors[k] for k in ("grad", "grad_sum", "x", "weight")}
    return "rms_norm_backward", order, outs, {"eps": eps, "weight_offset": scalars.weight_offset}


SPEC = OpSpec(
    reference=rms_norm_backward,
    args={
        "grad": Tensor("... *n", same_as="x"),
        "x": Tensor("... *n"),
        "normalized_shape": Scalar("SymInt[]", star="n"),
        "weight": Tensor("*n", optional=True, values=Values(low=0.5, high=1.5)),
        "eps": rms_norm.SPEC.args["eps"],
        "weight_offset": rms_norm.SPEC.args["weight_offset"],
        "grad_sum": Tensor("... *n", same_as="x", optional=True),
        "need_x": Scalar("bool"),
        "need_weight": Scalar("bool"),
    },
    results={
        "grad_x": Result("... *n", ("x",), needs="need_x"),
        "grad_weight": Result("*n", ("weight", "x"), needs="need_weight"),
    },
    lower=_lower,
    error=ErrorModel(_error),
    flops=lambda d, s: 10 * d.rows * d.n,
    laws=("deterministic",),
    internal=True,
    cases=tuple(Case(c.name, c.tags, {"grad": c.args["x"], **c.args}) for c in rms_norm.SPEC.cases),
)
