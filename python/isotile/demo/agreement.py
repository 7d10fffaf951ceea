"""When do two float programs agree? Both are measured against the same float64 truth, in units of its rounding.

The rule, applied to every figure of the demo:

    isotile's error <= MARGIN * PyTorch's own error + roundings

PyTorch's error says what this model, on this input, costs any program that rounds where it must. Two sound programs
sum in different orders and fuse differently, so their largest errors differ by a small factor, not by orders of
magnitude: that is MARGIN. `roundings` is for the case that PyTorch happens to be exact: one unit for a result (half a
unit at the store, on either side), sqrt(steps) units for a loss after that many updates, each of which rounds the
weights once. A wrong mask, a missing bias or a bfloat16 accumulator misses the limit by far.
"""

from dataclasses import dataclass

import torch

MARGIN = 4.0


@dataclass(frozen=True)
class Agreement:
    """One measured figure: isotile's and PyTorch's distance from the truth, in units, and the limit derived from it."""

    what: str
    isotile: float
    torch: float
    roundings: float = 1.0

    @property
    def limit(self) -> float:
        return MARGIN * self.torch + self.roundings

    @property
    def holds(self) -> bool:
        # Written so that NaN on either side fails.
        return self.isotile <= self.limit

    def record(self) -> dict:
        return {
            "what": self.what,
            "isotile_ulps": self.isotile,
            "torch_ulps": self.torch,
            "limit_ulps": self.limit,
            "holds": self.holds,
        }


def max_ulps(values: torch.Tensor, truth: torch.Tensor, dtype: torch.dtype) -> float:
    """Largest error of `values` in units in the last place of `dtype` at the truth's scale.

    The scale of an element is its own magnitude or its row's root mean square, whichever is larger: a sum that
    cancels to almost nothing is not asked for more digits than its terms have.

    Args:
        values: [..., n], any float dtype.
        truth: [..., n], float64.
        dtype: whose unit to count in.
    """
    if values.shape != truth.shape:
        raise ValueError(f"max_ulps: values {tuple(values.shape)} and truth {tuple(truth.shape)} differ in shape")
    truth = truth.double().cpu()
    rms = truth.square().mean(-1, keepdim=True).sqrt()
    unit = torch.finfo(dtype).eps * torch.maximum(truth.abs(), rms).clamp_min(torch.finfo(dtype).tiny)
    error = (values.detach().double().cpu() - truth).abs() / unit
    if error.isnan().any():
        return float("nan")
    return error.max().item() if error.numel() else 0.0


def min_cosine(values: torch.Tensor, truth: torch.Tensor) -> float:
    """Smallest cosine similarity between rows of `values` and `truth`, both [rows, n]."""
    values, truth = values.detach().double().cpu(), truth.double().cpu()
    return torch.nn.functional.cosine_similarity(values, truth, dim=-1).min().item()
