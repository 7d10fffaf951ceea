"""Matrix product with a fused epilogue."""

from __future__ import annotations

import torch

from ..precision import accumulator, stored
from ..shapes import flatten_group
from ..spec import FLOATS, Case, ErrorModel, OpSpec, Result, Scalar, Tensor, growth
from . import _activation


def matmul(a, b, *, bias=None, activation=None, residual=None, out_dtype=None):
    """activation(a @ b + bias) + residual, with `torch.matmul`'s shapes and broadcasting.

    Products are accumulated in float32 (float64 for float64); the epilogue runs in that precision and the result is
    rounded once.

    Args:
        a: [..., m, k], or [k]. float32, bfloat16, float16 or float64.
        b: [..., k, n], or [k], of a's dtype.
        bias: [n], any float dtype. Needs a b of two or more dimensions.
        activation: None, "relu", "gelu" (exact), "gelu_tanh", "silu", "sigmoid" or "tanh".
        residual: any shape that broadcasts to the result's, any float dtype; added last.
        out_dtype: the result's dtype; a's if None.

    Returns:
        y: [..., m, n], without m or n where an operand is 1-D.

    Raises:
        ValueError: a shape or option that does not fit.
        TypeError: a dtype or type that is not allowed.
    """
    wide = accumulator(a.dtype)
    z = torch.matmul(a.to(wide), b.to(wide))
    if bias is not None:
        z = z + bias.to(wide)
    y = _activation.apply(z, activation)
    if residual is not None:
        y = y + residual.to(wide)
    dtype = out_dtype or a.dtype
    return {"y": stored(y, dtype), "preactivation": stored(z, dtype)}


def epilogue_gradient(saved, grads, needs, recompute):
    """The gradient of the preactivation, and those of bias and residual.

    `recompute()` gives the preactivation where the forward pass did not save it.
    """
    from ..library import call

    grad, direct = grads["y"], grads.get("preactivation")  # the latter only while differentiating twice
    if saved.activation is None or grad is None:
        grad_z = grad
    else:
        z = saved.preactivation if saved.overload == "preactivation" else recompute()
        grad_z = call("matmul_epilogue_backward", grad, z, saved.activation)[0]
    if direct is not None:
        grad_z = direct if grad_z is None else grad_z + direct
    found = {"residual": grad}
    if needs["bias"]:
        wide = torch.float64 if grad_z.dtype == torch.float64 else torch.float32
        found["bias"] = grad_z.flatten(0, -2).sum(0, dtype=wide) if grad_z.ndim > 1 else grad_z.to(wide)
    return grad_z, found


def _gradient(saved, grads, needs):
    from ..library import call

    a, b = saved.a, saved.b
    grad_z, found = epilogue_gradient(
        saved, grads, needs, lambda: call("matmul", a, b, bias=saved.bias, out_dtype=saved.out_dtype)[0]
    )
    grad_z = grad_z.to(a.dtype)
    rows, columns = a.unsqueeze(0) if a.ndim == 1 else a, b.unsqueeze(1) if b.ndim == 1 else b
    if b.ndim == 1:
        grad_z = grad_z.unsqueeze(-1)
    if a.ndim == 1:
        grad_z = grad_z.unsqueeze(-2)
    if needs["a"]:
        grad_a = call("matmul", grad_z, columns.mT)[0]
        found["a"] = grad_a.flatten(0, -2).sum(0) if a.ndim == 1 else grad_a
    if needs["b"]:
        if columns.ndim == 2 and rows.ndim > 2:
            grad_b = call("matmul", rows.flatten(0, -2).mT, grad_z.flatten(0, -2))[0]
        else:
            grad_b = call("matmul", rows.mT, grad_z)[0]
        found["b"] = (
            grad_b.flatten(0, -3).sum(0).squeeze(-1)
            if b.ndim == 1 and grad_b.ndim > 2
            else (grad_b.squeeze(-1) if b.ndim == 1 else grad_b)
        )
    return found


def lower_product(tensors, outs, activation, lead):
    """Kernel form of a product with `lead` loop dimensions: one tall matrix where b is the same for all of them."""
    code = {"activation": _activation.ACTIVATIONS.index(activation)}
    b = tensors["b"]
    if lead and all(stride == 0 or size == 1 for stride, size in zip(b.strides[:lead], b.shape[:lead], strict=True)):
        tall = {
            name: view if view is None or name == "bias" else flatten_group(view, 0, lead + 1)
            for name, view in {**tensors, **outs, "b": None}.items()
        }
        if all(
            tall[name] is not None for name, view in {**tensors, **outs}.items() if view is not None and name != "b"
        ):
            tall["b"] = b.with_dims(b.shape[lead:], b.strides[lead:])
            return "matmul", {n: tall[n] for n in tensors}, {n: tall[n] for n in outs}, code, 0
    return "matmul", tensors, outs, code, lead


def _lower(tensors, outs, scalars):
    return lower_product(tensors, outs, scalars.activation, len(scalars.dims.loop))


def product_error(magnitude, k, args, truth, extra=0.0):
    """Error terms of an epilogue on a product whose sum of magnitudes is `magnitude`, of k terms.

    extra: roundings of each term besides those of the sum.
    """
    z = magnitude * (growth(k) + extra)
    if args.bias is not None:
        z = z + 2 * args.bias.double().abs()
    y = z
    if args.activation is not None:
        # Every activation has slope at most 1.13, and a kernel's own evaluation errs by a few units of |z|.
        y = 1.13 * z + 8 * (magnitude + (0 if args.bias is None else args.bias.double().abs())).clamp(min=0)
    if args.activation == "sigmoid":  # not 0 at 0: its exponential, sum and quotient err by units of a value up to 1
        y = y + 4
    if args.residual is not None:
        y = y + 2 * args.residual.double().abs() + truth["y"].abs()
    return {"y": (y, 0.0), "preactivation": (z, 0.0)}


def _error(args, truth, dims):
    return product_error(torch.matmul(args.a.double().abs(), args.b.double().abs()), dims.k, args, truth)


EPILOGUE: dict[str, Tensor | Scalar] = {
    "bias": Tensor("n", optional=True),
    "activation": Scalar("str?", choices=_activation.ACTIVATIONS[1:], samples=_activation.ACTIVATIONS),
    "out_dtype": Scalar("ScalarType?", choices=FLOATS, samples=(None, *FLOATS[:3])),
}


GRAD_OVERLOAD = ("activation", "preactivation")

SHAPES = (
    ("tiny", "smoke bench", 16, 64, 64),
    ("odd_tails", "smoke bench", 127, 131, 129),
    ("one_row_512", "bench", 1, 512, 512),
    ("bert_base_ffn", "bench tune", 512, 768, 3072),
    ("vit_base_qkv", "bench", 1576, 768, 2304),
    ("llama3_8b_qkv_decode", "bench tune", 1, 4096, 4096),
    ("llama3_8b_qkv_decode_16", "bench tune", 16, 4096, 4096),
    ("llama3_8b_qkv_prefill", "bench tune", 512, 4096, 4096),
    ("llama3_8b_ffn_decode", "bench tune", 1, 4096, 14336),
    ("deepseek_v3_kv_down", "bench tune", 512, 7168, 576),
    ("gpt2_vocabulary_decode", "bench", 1, 768, 50257),
    ("odd_1000", "bench", 1000, 999, 1001),
)

SPEC = OpSpec(
    reference=matmul,
    args={
        "a": Tensor("... m? k"),
        "b": Tensor("... k n?", same_as="a"),
        **EPILOGUE,
        "residual": Tensor("... m? n?", optional=True, broadcast=True),
    },
    results={
        "y": Result("... m? n?", ("out_dtype", "a")),
        "preactivation": Result("... m? n?", ("out_dtype", "a"), when="preactivation"),
    },
    requires=(("bias", "None, since b is 1-D", lambda d, s: "n" not in d.absent or s.bias is None),),
    lower=_lower,
    error=ErrorModel(_error),
    flops=lambda d, s: 2 * d.rows * d.m * d.n * d.k,
    laws=("exact_on_integers", "deterministic"),
    saves={"default": ("a", "b", "bias"), "preactivation": ("a", "b", "bias", "preactivation")},
    backward=_gradient,
    grad_overload=GRAD_OVERLOAD,
    batch="m",
    autocast="lower",
    cases=tuple(Case(name, tags, {"a": (m, k), "b": (k, n)}) for name, tags, m, k, n in SHAPES),
)
