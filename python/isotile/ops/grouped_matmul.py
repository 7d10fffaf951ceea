"""Matrix products of consecutive groups of rows, each with its own matrix (mixture of experts)."""

from __future__ import annotations

import torch

from ..precision import accumulator, stored
from ..spec import FLOATS, Case, ErrorModel, OpSpec, Result, Scalar, Tensor, Values, growth


def groups_of(offsets, total):
    """(start, end) of each group: ends are cumulative; a decreasing or too large end gives an empty or cut group."""
    bounds, start = [], 0
    for end in offsets.tolist():
        end = min(max(end, start), total)
        bounds.append((start, end))
        start = end
    return bounds


def draw_offsets(random, dims, shape):
    """Cumulative ends: groups of random sizes, some empty, possibly with rows left over."""
    cuts = random.integers(0, dims.total + 1, shape)
    return cuts.sort().values.to(torch.int32)


def grouped_matmul(a, b, offsets, *, out_dtype=None):
    """Rows of a, split by offsets, each group times its own matrix, as `torch._grouped_mm`.

    y[offsets[g-1]:offsets[g]] = a[offsets[g-1]:offsets[g]] @ b[g], accumulated in float32 (float64 for float64),
    rounded once. Groups may be empty; rows past the last offset give 0.

    Args:
        a: [total, k]. float32, bfloat16, float16 or float64.
        b: [groups, k, n], of a's dtype.
        offsets: [groups], int32, the cumulative ends of the groups, not decreasing. Read on the device.
        out_dtype: the result's dtype; a's if None.

    Returns:
        y: [total, n].

    Raises:
        ValueError: a shape that does not fit.
        TypeError: a dtype or type that is not allowed.
    """
    wide = accumulator(a.dtype)
    y = torch.zeros(a.shape[0], b.shape[2], dtype=wide, device=a.device)
    pieces = [y[:0]]
    end = 0
    for g, (start, end) in enumerate(groups_of(offsets, a.shape[0])):
        pieces.append(a[start:end].to(wide) @ b[g].to(wide))
    return {"y": stored(torch.cat([*pieces, y[end:]]), out_dtype or a.dtype)}


def _gradient(saved, grads, needs):
    from ..library import call

    grad_a, grad_b = call(
        "grouped_matmul_backward",
        grads["y"].to(saved.a.dtype),
        saved.a,
        saved.b,
        saved.offsets,
        need_a=needs["a"],
        need_b=needs["b"],
    )
    return {"a": grad_a, "b": grad_b}


def _error(args, truth, dims):
    total = grouped_matmul(args.a.double().abs(), args.b.double().abs(), args.offsets)["y"].double()
    return {"y": (total * growth(dims.k), 0.0)}


SHAPES = (
    ("tiny", "smoke bench", 64, 32, 48, 4),
    ("odd_tails", "smoke", 131, 37, 41, 5),
    ("eight_experts", "bench tune", 1024, 1024, 1024, 8),
    ("deepseek_v2_lite_up", "bench tune", 1536, 2048, 1408, 64),
    ("mixtral_8x7b_up", "bench tune", 256, 4096, 14336, 8),
)
#: real experts are large: measured in 16 bits only
REAL = ("deepseek_v2_lite_up", "mixtral_8x7b_up")


def dtypes_of(case: str) -> tuple[torch.dtype, ...]:
    return (torch.bfloat16,) if case in REAL else (torch.float32, torch.bfloat16, torch.float16)


SPEC = OpSpec(
    reference=grouped_matmul,
    args={
        "a": Tensor("total k"),
        "b": Tensor("groups k n", same_as="a"),
        "offsets": Tensor(
            "groups", dtypes=(torch.int32,), differentiable=False, autocast=False, values=Values(make=draw_offsets)
        ),
        "out_dtype": Scalar("ScalarType?", choices=FLOATS, samples=(None, *FLOATS[:3])),
    },
    results={"y": Result("total n", ("out_dtype", "a"))},
    lower=lambda tensors, outs, scalars: ("grouped_matmul", tensors, outs, {}),
    error=ErrorModel(_error),
    flops=lambda d, s: 2 * d.total * d.n * d.k,
    laws=("exact_on_integers", "deterministic"),
    saves={"default": ("a", "b", "offsets")},
    backward=_gradient,
    autocast="lower",
    cases=tuple(
        Case(name, tags, {"a": (total, k), "b": (groups, k, n), "offsets": (groups,)}, dtypes_of(name))
        for name, tags, total, k, n, groups in SHAPES
    ),
)
