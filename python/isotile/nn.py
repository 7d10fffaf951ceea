"""`torch.nn`'s modules on isotile's operators: same constructors, same parameter names, so state_dicts load both ways.

Each is a subclass of its namesake with another `forward`, so `isinstance`, initialisation, `repr` and `state_dict`
are PyTorch's own. What isotile fuses is an argument: an activation of `Linear`, a residual of any call.
"""

from __future__ import annotations

import torch

import isotile

__all__ = ["LayerNorm", "Linear", "QuantizedLinear", "RMSNorm", "Softmax"]


class Linear(torch.nn.Linear):
    """activation(x @ weight.T + bias) + residual, see `isotile.linear`.

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`.
        activation: None, "relu", "gelu", "gelu_tanh", "silu", "sigmoid" or "tanh".
    """

    def __init__(self, in_features, out_features, bias=True, device=None, dtype=None, *, activation=None):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation

    def forward(self, x: torch.Tensor, *, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x: [..., in_features]; residual: [..., out_features] or None. Returns [..., out_features]."""
        return isotile.linear(x, self.weight, self.bias, activation=self.activation, residual=residual)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")


class QuantizedLinear(torch.nn.Module):
    """activation(x @ weight.T + bias) + residual with a quantised weight, see `isotile.quantized_linear`.

    Its `state_dict` holds the weight's parts under `weight.`, and `bias`. The weight takes no gradient; x and bias do.

    Args:
        weight: an `isotile.QuantizedWeight` [out_features, in_features].
        bias: [out_features], or None.
        activation: None, "relu", "gelu", "gelu_tanh", "silu", "sigmoid" or "tanh".
    """

    def __init__(
        self, weight: isotile.QuantizedWeight, bias: torch.Tensor | None = None, *, activation: str | None = None
    ):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = weight
        if bias is None or isinstance(bias, torch.nn.Parameter):
            self.register_parameter("bias", bias)
        else:
            self.bias = torch.nn.Parameter(bias)
        self.activation = activation

    @classmethod
    def from_linear(cls, linear: torch.nn.Linear, scheme: str, *, group_size=128, symmetric=None, search=None):
        """A layer with the quantised weight of `linear`, and its bias itself; the options are `isotile.quantize`'s."""
        weight = isotile.quantize(linear.weight, scheme, group_size=group_size, symmetric=symmetric, search=search)
        return cls(weight, linear.bias, activation=getattr(linear, "activation", None))

    def forward(self, x: torch.Tensor, *, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x: [..., in_features]; residual: [..., out_features] or None. Returns [..., out_features]."""
        return isotile.quantized_linear(x, self.weight, self.bias, activation=self.activation, residual=residual)

    def extra_repr(self) -> str:
        shown = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return shown + (f", activation={self.activation!r}" if self.activation else "")


class LayerNorm(torch.nn.LayerNorm):
    """Layer normalisation over the last dimensions, see `isotile.layer_norm`."""

    def forward(self, x: torch.Tensor, *, residual: torch.Tensor | None = None):
        """x, residual: [..., *normalized_shape]. Returns y of that shape, or with a residual (y, x + residual)."""
        return isotile.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, residual=residual)


class RMSNorm(torch.nn.RMSNorm):
    """Root mean square normalisation, see `isotile.rms_norm`.

    Args:
        normalized_shape, eps, elementwise_affine, device, dtype: as `torch.nn.RMSNorm`.
        weight_offset: added to the weight. With 1.0, the zero-centred form, the weight starts at 0 instead of 1.
    """

    def __init__(
        self, normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None, *, weight_offset=0.0
    ):
        self.weight_offset = float(weight_offset)  # before super().__init__, which calls reset_parameters
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)

    def reset_parameters(self) -> None:
        if self.elementwise_affine:
            torch.nn.init.constant_(self.weight, 1.0 - self.weight_offset)

    def forward(self, x: torch.Tensor, *, residual: torch.Tensor | None = None):
        """x, residual: [..., *normalized_shape]. Returns y of that shape, or with a residual (y, x + residual)."""
        return isotile.rms_norm(
            x, self.normalized_shape, self.weight, self.eps, residual=residual, weight_offset=self.weight_offset
        )

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", weight_offset={self.weight_offset}" if self.weight_offset else "")


class Softmax(torch.nn.Softmax):
    """Softmax along `dim`, see `isotile.softmax`. Unlike PyTorch's, `dim` is -1 unless given."""

    def __init__(self, dim: int = -1):
        super().__init__(dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: any shape. Returns the same shape and dtype."""
        return isotile.softmax(x, self.dim)
