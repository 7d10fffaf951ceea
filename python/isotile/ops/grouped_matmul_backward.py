"""The gradients of grouped_matmul."""

from __future__ import annotations

import torch

from ..precision import accumulator, stored
from ..spec import Case, ErrorModel, OpSpec, Result, Scalar, Tensor, Values, growth
from .grouped_matmul import SHAPES, draw_offsets, dtypes_of, groups_of


def grouped_matmul_backward(grad, a, b, offsets, *, need_a=True, need_b=True):
    """Gradients of `grouped_matmul`: grad_a = grad @ b[g].T for each group's rows, grad_b[g] = a_g.T @ grad_g.

    Args:
        grad: [total, n], the gradient of y, of a's dtype.
        a: [total, k].
        b: [groups, k, n].
        offsets: [groups], int32.
        need_a, need_b: which gradients are wanted; the other is returned empty.

    Returns:
        (grad_a, grad_b) in a's dtype. Rows past the last offset have gradient 0, and so has an empty group's matrix.
    """
    wide = accumulator(a.dtype)
    bounds = groups_of(offsets, a.shape[0])
    end = bounds[-1][1] if bounds else 0
    out = {}
    if need_a:
        rows = [grad[s:e].to(wide) @ b[g].to(wide).mT for g, (s, e) in enumerate(bounds)]
        rows.append(torch.zeros(a.shape[0] - end, a.shape[1], dtype=wide, device=a.device))
        out["grad_a"] = stored(torch.cat(rows), a.dtype)
    if need_b:
        each = [a[s:e].to(wide).mT @ grad[s:e].to(wide) for s, e in bounds]
        grad_b = torch.stack(each) if each else torch.zeros(b.shape, dtype=wide, device=a.device)
        out["grad_b"] = stored(grad_b, a.dtype)
    return out


def _error(args, truth, dims):
    magnitudes = grouped_matmul_backward(
        args.grad.double().abs(), args.a.double().abs(), args.b.double().abs(), args.offsets
    )
    lengths = {"grad_a": dims.n, "grad_b": dims.total}
    return {name: (magnitudes[name].double() * growth(n), 0.0) for name, n in lengths.items()}


SPEC = OpSpec(
    reference=grouped_matmul_backward,
    args={
        "grad": Tensor("total n", same_as="a"),
        "a": Tensor("total k"),
        "b": Tensor("groups k n", same_as="a"),
        "offsets": Tensor(
            "groups", dtypes=(torch.int32,), differentiable=False, autocast=False, values=Values(make=draw_offsets)
        ),
        "need_a": Scalar("bool"),
        "need_b": Scalar("bool"),
    },
    results={
        "grad_a": Result("total k", ("a",), needs="need_a"),
        "grad_b": Result("groups k n", ("a",), needs="need_b"),
    },
    lower=lambda tensors, outs, scalars: ("grouped_matmul_backward", tensors, outs, {}),
    error=ErrorModel(_error),
    flops=lambda d, s: 4 * d.total * d.n * d.k,
    laws=("exact_on_integers", "deterministic"),
    internal=True,
    cases=tuple(
        Case(
            name,
            tags,
            {"grad": (total, n), "a": (total, k), "b": (groups, k, n), "offsets": (groups,)},
            dtypes_of(name),
        )
        for name, tags, total, k, n, groups in SHAPES
    ),
)
