"""The activations of matmul's epilogue and their derivatives, in plain PyTorch."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

#: Kernels get an activation as its index here (docs/design.md, section 3).
ACTIVATIONS = (None, "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")


def apply(z: torch.Tensor, activation: str | None) -> torch.Tensor:
    match activation:
        case None:
            return z
        case "relu":
            return z.relu()
        case "gelu":
            return 0.5 * z * (1 + torch.erf(z / math.sqrt(2)))  # F.gelu(inf) is NaN in float32 and inf in float64
        case "gelu_tanh":
            return F.gelu(z, approximate="tanh")
        case "silu":
            return F.silu(z)
        case "sigmoid":
            return z.sigmoid()
        case "tanh":
            return z.tanh()
    raise ValueError(f"unknown activation {activation!r}")


def derivative(z: torch.Tensor, activation: str | None) -> torch.Tensor:
    """d activation(z) / dz. At z = 0 relu's is 0, as PyTorch's."""
    match activation:
        case None:
            return torch.ones_like(z)
        case "relu":
            return torch.where(z.isnan(), z, (z > 0).to(z.dtype))
        case "gelu":
            density = torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
            return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + torch.where(z.isinf(), 0.0, z) * density
        case "gelu_tanh":
            bounded = z.clamp(-20, 20)  # beyond, the derivative is 0 or 1 in every dtype
            inner = math.sqrt(2 / math.pi) * (bounded + 0.044715 * bounded**3)
            t = torch.tanh(inner)
            slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * bounded**2)
            return 0.5 * (1 + t) + 0.5 * bounded * (1 - t * t) * slope
        case "silu":
            s = z.sigmoid()
            return s * (1 + torch.where(z.isinf(), 0.0, z) * (1 - s))
        case "sigmoid":
            s = z.sigmoid()
            return s * (1 - s)
        case "tanh":
            return 1 - z.tanh().square()
    raise ValueError(f"unknown activation {activation!r}")
