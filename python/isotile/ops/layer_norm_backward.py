"""The gradients of layer normalisation."""

from __future__ import annotations

from ..precision import stored
from ..spec import Case, ErrorModel, OpSpec, Result, Scalar, Tensor, Values, growth
from . import _norm, layer_norm


def layer_norm_backward(
    grad, x, normalized_shape, weight=None, eps=1e-5, *, grad_sum=None, need_x=True, need_weight=True, need_bias=True
):
    """Gradients of `layer_norm` from the gradient of its result; statistics are taken again from x.

    With g = grad * weight and means over a row: grad_x = (g - mean(g) - xhat * mean(g * xhat)) * rstd + grad_sum,
    grad_weight = sum over rows of grad * xhat, grad_bias = sum over rows of grad.

    Args:
        grad: [..., *n], the gradient of y.
        x: [..., *n], what was normalised (x + residual where there was one).
        normalized_shape: the sizes *n.
        weight: [*n] or None.
        eps: as in the forward pass.
        grad_sum: [..., *n], the gradient of the second result, added to grad_x.
        need_x: whether grad_x is wanted; likewise need_weight, need_bias. What is not wanted is returned empty.

    Returns:
        (grad_x, grad_weight, grad_bias) in x's dtype, the weight's dtype (x's if None) likewise for the bias.
    """
    xhat, rstd = _norm.centred(_norm.rows_of(x, normalized_shape), eps)
    upstream = _norm.rows_of(grad, normalized_shape)
    w = _norm.flat(weight, x)
    g = upstream if w is None else upstream * w
    out = {}
    if need_x:
        dx = (g - g.mean(-1, keepdim=True) - xhat * (g * xhat).mean(-1, keepdim=True)) * rstd
        if grad_sum is not None:
            dx = dx + _norm.rows_of(grad_sum, normalized_shape)
        out["grad_x"] = stored(dx.reshape(x.shape), x.dtype)
    dtype = x.dtype if weight is None else weight.dtype
    shape = tuple(normalized_shape)
    n = xhat.shape[-1]
    rows = upstream.numel() // n if n else 0
    if need_weight:
        out["grad_weight"] = stored((upstream * xhat).reshape(rows, n).sum(0).reshape(shape), dtype)
    if need_bias:
        out["grad_bias"] = stored(upstream.reshape(rows, n).sum(0).reshape(shape), dtype)
    return out


def _error(args, truth, dims):
    rows, n = _norm.exact_inputs(args)
    xhat, rstd = _norm.centred(rows, args.eps)
    error = _norm.xhat_error(rows, xhat, rstd, n, args.x.dtype)
    return norm_backward_error(args, truth, xhat, rstd, error, n, centred=True)


def norm_backward_error(args, truth, xhat, rstd, xhat_error, n, centred):
    """Error terms of both norms' gradients, given the error of xhat."""
    upstream = args.grad.double().reshape(xhat.shape)
    scale = 1.0 if args.weight is None else args.weight.double().flatten()
    if not centred:
        scale = scale + args.weight_offset
    g = (upstream * scale).abs()
    grow = growth(n)
    projected = (g * xhat.abs()).mean(-1, keepdim=True)
    inner = 2 * g + xhat.abs() * projected * (grow + 2)
    inner = inner + xhat_error * projected + xhat.abs() * (g * xhat_error).mean(-1, keepdim=True)
    if centred:
        inner = inner + g.mean(-1, keepdim=True) * grow
    rows = upstream.numel() // n if n else 0
    rows_grow = growth(rows)
    # Equal numbers are normalised to 0, or to a rounding error of either sign: infinity times that may be anything.
    noise = upstream.isinf() & (xhat.abs() < _norm.unit(args.x.dtype) * xhat_error)
    out: dict[str, tuple] = {}
    if "grad_x" in truth:
        dx = truth["grad_x"].double().reshape(xhat.shape)
        error = inner * rstd + dx.abs() * (grow + 6)
        if args.grad_sum is not None:
            error = error + 2 * args.grad_sum.double().reshape(xhat.shape).abs() * (grow + 6)
        undecided = noise.any(-1, keepdim=True).expand_as(error)
        shape = truth["grad_x"].shape
        out["grad_x"] = (error.reshape(shape), 0.0, undecided.reshape(shape))
    if "grad_weight" in truth:
        total = upstream.abs() * (xhat.abs() * rows_grow + xhat_error)
        shape = truth["grad_weight"].shape
        undecided = noise.reshape(rows, n).any(0).reshape(shape)
        out["grad_weight"] = (total.reshape(rows, n).sum(0).reshape(shape), 0.0, undecided)
    if "grad_bias" in truth:
        out["grad_bias"] = (upstream.abs().reshape(rows, n).sum(0).reshape(truth["grad_bias"].shape) * rows_grow, 0.0)
    return out


SPEC = OpSpec(
    reference=layer_norm_backward,
    args={
        "grad": Tensor("... *n", same_as="x"),
        "x": Tensor("... *n"),
        "normalized_shape": Scalar("SymInt[]", star="n"),
        "weight": Tensor("*n", optional=True, values=Values(low=0.5, high=1.5)),
        "eps": layer_norm.SPEC.args["eps"],
        "grad_sum": Tensor("... *n", same_as="x", optional=True),
        "need_x": Scalar("bool"),
        "need_weight": Scalar("bool"),
        "need_bias": Scalar("bool"),
    },
    results={
        "grad_x": Result("... *n", ("x",), needs="need_x"),
        "grad_weight": Result("*n", ("weight", "x"), needs="need_weight"),
        "grad_bias": Result("*n", ("weight", "x"), needs="need_bias"),
    },
    lower=lambda tensors, outs, scalars: (
        "layer_norm_backward",
        {k: tensors[k] for k in ("grad", "grad_sum", "x", "weight")},
        outs,
        {"eps": scalars.eps},
    ),
    error=ErrorModel(_error),
    flops=lambda d, s: 14 * d.rows * d.n,
    laws=("deterministic",),
    internal=True,
    cases=tuple(
        Case(c.name, c.tags, {"grad": c.args["x"], **{k: v for k, v in c.args.items() if k != "bias"}})
        for c in layer_norm.CASES
    ),
)
