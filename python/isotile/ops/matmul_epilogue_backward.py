"""The gradient through an epilogue's activation."""

from __future__ import annotations

from ..precision import accumulator, stored
from ..spec import Case, ErrorModel, OpSpec, Result, Scalar, Tensor
from . import _activation


def matmul_epilogue_backward(grad, preactivation, activation):
    """grad * activation'(preactivation), elementwise.

    Args:
        grad: [...], the gradient of activation(z).
        preactivation: [...], z, of grad's dtype.
        activation: its name.

    Returns:
        grad_z: the inputs' shape and dtype.
    """
    wide = accumulator(grad.dtype)
    slope = _activation.derivative(preactivation.to(wide), activation)
    return {"grad_z": stored(grad.to(wide) * slope, grad.dtype)}


def _lower(tensors, outs, scalars):
    """The last dimension is the kernel's n."""

    def rows(view):
        return view.unsqueeze(0) if view.ndim == 0 else view

    code = {"activation": _activation.ACTIVATIONS.index(scalars.activation)}
    rank = max(len(scalars.dims.loop) - 1, 0)
    return (
        "matmul_epilogue_backward",
        {k: rows(v) for k, v in tensors.items()},
        {k: rows(v) for k, v in outs.items()},
        code,
        rank,
    )


def _error(args, truth, dims):
    grad, z = args.grad.double().abs(), args.preactivation.double().abs()
    # gelu_tanh's 1 - tanh^2 cancels, times z * (1 + 3 * 0.0447 z^2), until tanh is 1 near |z| = 9.
    amplified = z.clamp(max=10) ** 3 if args.activation == "gelu_tanh" else z.clamp(max=10)
    return {"grad_z": (grad * (8 + 2 * amplified), 0.0)}


SPEC = OpSpec(
    reference=matmul_epilogue_backward,
    args={
        "grad": Tensor("..."),
        "preactivation": Tensor("...", same_as="grad"),
        "activation": Scalar("str", choices=_activation.ACTIVATIONS[1:]),
    },
    results={"grad_z": Result("...", ("grad",))},
    lower=_lower,
    error=ErrorModel(_error),
    flops=lambda d, s: 10 * d.rows,
    laws=("deterministic",),
    internal=True,
    cases=tuple(
        Case(name, tags, {"grad": shape, "preactivation": shape, "activation": "gelu"})
        for name, tags, shape in (("tiny", "smoke bench", (16, 256)), ("bert_base_ffn", "bench tune", (512, 3072)))
    ),
)
