"""The linear layer of a constant weight, which the CPU kernels read in a layout of their own."""

from __future__ import annotations

import dataclasses

import torch

from ..dispatch import NeedsCopy
from ..shapes import contiguous_strides
from ..spec import Case, Tensor
from . import _activation
from . import linear as layer
from . import matmul as product

PANEL_COLUMNS = 64  # csrc/ops/_gemm.h


def packed_linear(x, weight, panels, bias=None, *, activation=None, residual=None, out_dtype=None):
    """`isotile.linear`, with the weight in two layouts.

    Args:
        x: [..., k].
        weight: [n, k], for its shape and for the backward pass.
        panels: `pack(weight, step)`. With any other contents the result is undefined.
        bias, activation, residual, out_dtype: as for `isotile.linear`.

    Returns:
        y: [..., n], with the bits of `isotile.linear` where the instruction set packs its weights with this step (see
            `isotile.backends.cpu.panel_step`).
    """
    return layer.linear(x, weight, bias, activation=activation, residual=residual, out_dtype=out_dtype)


def panel_shape(n: int, k: int, step: int) -> tuple[int, int, int]:
    """The shape of `pack(weight [n, k], step)`."""
    return -(-n // PANEL_COLUMNS), -(-k // step), PANEL_COLUMNS * step


def pack(weight: torch.Tensor, step: int, out: torch.Tensor | None = None) -> torch.Tensor:
    """weight [n, k] as panels of 64 rows of it, in which `step` elements of k lie together and rows beside each other.

    Args:
        weight: [n, k].
        step: 1, or 2 for bfloat16.
        out: where to, contiguous.

    Returns:
        panels: [ceil(n / 64), ceil(k / step), 64 * step]; zeros stand for rows and elements that there are not.
    """
    n, k = weight.shape
    panels = weight.new_empty(panel_shape(n, k, step)) if out is None else out
    blocks, steps, _ = panels.shape
    if n % PANEL_COLUMNS or k % step:
        weight = torch.nn.functional.pad(weight, (0, steps * step - k, 0, blocks * PANEL_COLUMNS - n))
    placed = weight.unflatten(1, (steps, step)).unflatten(0, (blocks, PANEL_COLUMNS)).transpose(1, 2)
    panels.view(placed.shape).copy_(placed)
    return panels


def complete(recipe):
    """A drawn call's panels: their step, and what follows from it."""
    sizes = recipe["sizes"]
    step = 1 + (recipe["dtype"] == "bfloat16" and recipe["seed"] % 4 != 0)
    sizes["blocks"], sizes["steps"], sizes["width"] = panel_shape(sizes["n"], sizes["k"], step)
    recipe["tensors"]["panels"]["layout"] = "contiguous"


def _lower(tensors, outs, scalars):
    """Rows of x by panels."""
    panels = tensors["panels"]
    if panels.strides != contiguous_strides(panels.shape):
        raise NeedsCopy("panels")
    kernel = {name: tensors[name] for name in ("x", "panels", "bias", "residual")}
    return "packed_linear", kernel, outs, {"activation": _activation.ACTIVATIONS.index(scalars.activation)}


def _case(name, tags, m, k, n):
    shapes = {"x": (m, k), "weight": (n, k), "panels": panel_shape(n, k, 1), "bias": (n,)}
    return Case(name, tags, shapes)


SPEC = dataclasses.replace(
    layer.SPEC,
    reference=packed_linear,
    args={
        **layer.SPEC.args,
        "panels": Tensor("blocks steps width", same_as="x", differentiable=False),
    },
    requires=(
        (
            "panels",
            lambda d, s: f"shape {list(panel_shape(d.n, d.k, 1))}"
            + (f" or {list(panel_shape(d.n, d.k, 2))}" if s.panels.dtype == torch.bfloat16 else ""),
            lambda d, s: (d.blocks, d.steps, d.width)
            in [panel_shape(d.n, d.k, step) for step in (1, 2)[: 1 + (s.panels.dtype == torch.bfloat16)]],
        ),
    ),
    lower=_lower,
    autocast=None,
    internal=True,
    complete=complete,
    cases=tuple(_case(*shape) for shape in product.SHAPES if "smoke" in shape[1]),
)
