"""Layer normalisation, with an optional fused residual addition."""

from __future__ import annotations

from ..precision import stored
from ..spec import Case, ErrorModel, OpSpec, Result, Scalar, Tensor, Values
from . import _norm


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, *, residual=None):
    """Normalise each row of x to mean 0 and variance 1, then scale and shift.

    y = (s - mean(s)) / sqrt(var(s) + eps) * weight + bias, with s = x + residual rounded to x's dtype, and the biased
    variance. Statistics and arithmetic in float32 (float64 for float64), rounded once. Ba, Kiros and Hinton, Layer
    Normalization, 2016 (arXiv:1607.06450).

    Args:
        x: [..., *n], float32, bfloat16, float16 or float64.
        normalized_shape: the sizes *n of the last dimensions that one row spans, an int or a sequence.
        weight: [*n], any float dtype; 1 if None.
        bias: [*n], any float dtype; 0 if None.
        eps: added to the variance, at least 0.
        residual: [..., *n], x's dtype, added to x first.

    Returns:
        y: [..., *n] in x's dtype; with `residual` the pair (y, x + residual).

    Raises:
        ValueError: a shape that does not fit, or a negative eps.
        TypeError: a dtype or type that is not allowed.
    """
    summed = _norm.add_residual(x, residual)
    xhat, _ = _norm.centred(_norm.rows_of(summed, normalized_shape), eps)
    w, b = _norm.flat(weight, x), _norm.flat(bias, x)
    if w is not None:
        xhat = xhat * w
    if b is not None:
        xhat = xhat + b
    return {"y": stored(xhat.reshape(summed.shape), x.dtype), "sum": stored(summed, x.dtype)}


def _gradient(saved, grads, needs):
    from ..library import call

    grad_x, grad_weight, grad_bias = call(
        "layer_norm_backward",
        *_norm.upstream(saved, grads),
        saved.normalized_shape,
        saved.weight,
        saved.eps,
        grad_sum=grads.get("sum"),
        need_x=needs["x"] or needs.get("residual", False),
        need_weight=needs["weight"],
        need_bias=needs["bias"],
    )
    return {"x": grad_x, "residual": grad_x, "weight": grad_weight, "bias": grad_bias}


def _error(args, truth, dims):
    rows, n = _norm.exact_inputs(args)
    xhat, rstd = _norm.centred(rows, args.eps)
    error = _norm.xhat_error(rows, xhat, rstd, n, args.x.dtype)
    if args.weight is not None:
        error = error * args.weight.double().flatten().abs()
    if args.bias is not None:
        error = error + 2 * args.bias.double().flatten().abs()
    return {"y": (error.reshape(truth["y"].shape), 0.0), "sum": (0.0, 0.0)}


CASES = tuple(
    Case(name, tags, {"x": shape, "normalized_shape": shape[-1:], "weight": shape[-1:], "bias": shape[-1:]})
    for name, tags, shape in (
        ("tiny", "smoke bench", (16, 256)),
        ("odd_tail", "smoke", (7, 129)),
        ("bert_base_tokens", "bench tune", (4096, 768)),
        ("vit_large_tokens", "bench", (577, 1024)),
        ("llama3_8b_prefill", "bench tune", (2048, 4096)),
        ("llama3_8b_decode", "bench", (1, 4096)),
        ("deepseek_v3_prefill", "bench tune", (512, 7168)),
        ("gpt2_vocabulary", "bench tune", (64, 50257)),
    )
)

SPEC = OpSpec(
    reference=layer_norm,
    args={
        "x": Tensor("... *n"),
        "normalized_shape": Scalar("SymInt[]", star="n"),
        "weight": Tensor("*n", optional=True, values=Values(low=0.5, high=1.5)),
        "bias": Tensor("*n", optional=True),
        "eps": Scalar(
            "float", samples=(1e-5, 1e-6, 1e-3), check=lambda v: None if v >= 0 else "wanted a number of at least 0"
        ),
        "residual": Tensor("... *n", same_as="x", optional=True),
    },
    results={"y": Result("... *n", ("x",)), "sum": Result("... *n", ("x",), when="residual")},
    error=ErrorModel(_error),
    flops=lambda d, s: 8 * d.rows * d.n,
    laws=("row_independent", "deterministic"),
    saves={"default": ("x", "weight"), "residual": ("sum", "weight")},
    backward=_gradient,
    autocast="float32",
    cases=CASES,
)
