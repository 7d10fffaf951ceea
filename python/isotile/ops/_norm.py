"""What the layer_norm and rms_norm families share: the residual's rounded sum, statistics, and error terms."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from ..precision import accumulator
from ..spec import growth

UNIT = {torch.float64: 2.0**-53}


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff of the accumulator of `dtype`."""
    return UNIT.get(dtype, 2.0**-24)


def add_residual(x: torch.Tensor, residual: torch.Tensor | None) -> torch.Tensor:
    """x + residual, added in the accumulator's precision and rounded to x's dtype."""
    if residual is None:
        return x
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (x.to(wide) + residual.to(wide)).to(x.dtype)


def rows_of(x: torch.Tensor, normalized_shape) -> torch.Tensor:
    """x as `[..., n]` in the accumulator's dtype."""
    group = len(normalized_shape)
    return x.to(accumulator(x.dtype)).flatten(x.ndim - group)


def flat(weight: torch.Tensor | None, x: torch.Tensor) -> torch.Tensor | None:
    return None if weight is None else weight.to(accumulator(x.dtype)).flatten()


def centred(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(x - mean) * rstd and rstd over the last dimension."""
    centre = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(centre.square().mean(-1, keepdim=True) + eps)
    return centre * rstd, rstd


def scaled(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x * rstd and rstd = 1 / sqrt(mean(x^2) + eps) over the last dimension."""
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def xhat_error(x: torch.Tensor, xhat: torch.Tensor, rstd: torch.Tensor, n: int, dtype: torch.dtype) -> torch.Tensor:
    """Error of (x - mean) * rstd in units of the accumulator: from the mean, the variance and rsqrt."""
    g = growth(n)
    mean_error = g * x.abs().mean(-1, keepdim=True) * rstd
    return xhat.abs() * (g + 6 + unit(dtype) * mean_error.square()) + mean_error


def exact_inputs(args: SimpleNamespace) -> tuple[torch.Tensor, int]:
    """The float64 rows that a norm is taken of, and n."""
    x = add_residual(args.x, getattr(args, "residual", None))
    rows = x.double().flatten(x.ndim - len(args.normalized_shape))
    return rows, rows.shape[-1]


def default_eps(eps: float | None, dtype: torch.dtype) -> float:
    """rms_norm's eps: as `torch.nn.functional.rms_norm`, the machine epsilon of the accumulator if not given."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return torch.finfo(wide).eps if eps is None else eps


def upstream(saved: SimpleNamespace, grads: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradient of y (zeros where only the sum was used), and what was normalised."""
    x = saved.sum if saved.overload == "residual" else saved.x
    return torch.zeros_like(x) if grads["y"] is None else grads["y"], x
