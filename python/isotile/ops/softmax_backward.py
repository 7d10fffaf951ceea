"""The gradient of softmax."""

from __future__ import annotations

from ..precision import accumulator, stored
from ..spec import Case, ErrorModel, OpSpec, Result, Scalar, Tensor, Values, growth
from . import softmax as forward


def softmax_backward(grad, y, dim=-1):
    """The gradient of `softmax` from its result: y * (grad - sum(grad * y)).

    Args:
        grad: [...], the gradient of y.
        y: [...], softmax's result.
        dim: the dimension it was taken over.

    Returns:
        grad_x: y's shape and dtype.
    """
    wide = accumulator(y.dtype)
    g, p = grad.to(wide), y.to(wide)
    return {"grad_x": stored(p * (g - (g * p).sum(dim, keepdim=True)), y.dtype)}


def _error(args, truth, dims):
    g, p = args.grad.double().abs(), args.y.double().abs()
    if g.ndim == 0:
        g, p = g.reshape(1), p.reshape(1)
    error = p * (2 * g + (g * p).sum(args.dim, keepdim=True) * (growth(forward.row_length(dims, args)) + 2))
    return {"grad_x": (error.reshape(truth["grad_x"].shape), 0.0)}


SPEC = OpSpec(
    reference=softmax_backward,
    args={
        "grad": Tensor("...", same_as="y"),
        "y": Tensor("...", values=Values(low=0.0, high=0.1)),
        "dim": Scalar("int"),
    },
    results={"grad_x": Result("...", ("y",))},
    requires=(("dim", forward.which_dim("y"), forward.has_dim),),
    lower=forward.lower_rows("softmax_backward"),
    error=ErrorModel(_error),
    flops=lambda d, s: 4 * d.rows,
    laws=("deterministic",),
    vmap_scalars=forward.add_loop,
    internal=True,
    cases=tuple(Case(name, tags, {"grad": shape, "y": shape, "dim": -1}) for name, tags, shape in forward.ROWS),
)
