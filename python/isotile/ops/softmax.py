"""Softmax over one dimension."""

from __future__ import annotations

from ..precision import accumulator, stored
from ..spec import FLOATS, Case, ErrorModel, OpSpec, Result, Scalar, Tensor, Values, growth


def softmax(x, dim=-1, *, dtype=None):
    """exp(x - max(x)) / sum(exp(x - max(x))) over one dimension.

    Computed in float32 (float64 for float64) and rounded once. A row with an infinite or NaN element gives NaN
    exactly where PyTorch's does.

    Args:
        x: [...], float32, bfloat16, float16 or float64.
        dim: the dimension, negative from the end.
        dtype: of the result; x's if None. The input is not rounded to it first.

    Returns:
        y: x's shape.

    Raises:
        ValueError: dim out of range.
        TypeError: a dtype or type that is not allowed.
    """
    return {"y": stored(x.to(accumulator(x.dtype)).softmax(dim), dtype or x.dtype)}


def _gradient(saved, grads, needs):
    from ..library import call

    return {"x": call("softmax_backward", grads["y"], saved.y, saved.dim)[0]}


def lower_rows(kernel):
    """Move `dim` last: the kernel sees `[B.., n]`."""

    def lower(tensors, outs, scalars):
        def move(view):
            if view is None:
                return None
            return view.unsqueeze(0) if view.ndim == 0 else view.move_last(scalars.dim)

        moved = {k: move(v) for k, v in tensors.items()}
        rank = max(len(scalars.dims.loop) - 1, 0)
        return kernel, moved, {k: move(v) for k, v in outs.items()}, {}, rank

    return lower


def has_dim(dims, scalars):
    rank = max(len(dims.loop), 1)
    return -rank <= scalars.dim < rank


def which_dim(name):
    def sentence(dims, scalars):
        rank = max(len(dims.loop), 1)
        return f"a dimension of {name}, from {-rank} to {rank - 1}"

    return sentence


def row_length(dims, scalars):
    return dims.loop[scalars.dim] if dims.loop else 1


def add_loop(scalars):
    """`dim` of a call with one more leading dimension."""
    return {"dim": scalars.dim if scalars.dim < 0 else scalars.dim + 1}


def _error(args, truth, dims):
    x = args.x.double()
    if x.ndim == 0:
        x = x.reshape(1)
    distance = x.amax(args.dim, keepdim=True) - x if x.numel() else x
    y = truth["y"].reshape(x.shape)
    relative = distance + growth(row_length(dims, args)) + 8
    error = (y * relative).masked_fill(y == 0, 0.0)
    return {"y": (error.reshape(truth["y"].shape), 0.0)}


ROWS = (
    ("tiny", "smoke bench", (16, 256)),
    ("odd_tail", "smoke", (7, 129)),
    ("bert_base_scores", "bench tune", (4096, 768)),
    ("llama3_8b_scores", "bench tune", (2048, 4096)),
    ("llama3_8b_decode_scores", "bench", (1, 4096)),
    ("mixtral_8x7b_router", "bench", (4096, 8)),
    ("deepseek_v3_router", "bench tune", (4096, 256)),
    ("gpt2_vocabulary", "bench tune", (64, 50257)),
)

SPEC = OpSpec(
    reference=softmax,
    args={
        "x": Tensor("...", values=Values(scale=3.0)),
        "dim": Scalar("int"),
        "dtype": Scalar("ScalarType?", choices=FLOATS, samples=(None, *FLOATS[:3])),
    },
    results={"y": Result("...", ("dtype", "x"))},
    requires=(("dim", which_dim("x"), has_dim),),
    lower=lower_rows("softmax"),
    error=ErrorModel(_error),
    flops=lambda d, s: 8 * d.rows,
    laws=("deterministic",),
    saves={"default": ("y",)},
    backward=_gradient,
    autocast="float32",
    vmap_scalars=add_loop,
    cases=tuple(Case(name, tags, {"x": shape, "dim": -1}) for name, tags, shape in ROWS),
)
