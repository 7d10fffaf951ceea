"""`torch.nn`'s modules on isotile's operators: same constructors, same parameter names, so state_dicts load both ways.

Each is a subclass of its namesake with another `forward`, so `isinstance`, initialisation, `repr` and `state_dict`
are PyTorch's own. What isotile fuses is an argument: an activation of `Linear`, a residual of any call.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import isotile

from . import fast_path, huge_pages
from .backends.cpu import panel_step
from .fast_path import PLAIN
from .library import call
from .ops import packed_linear
from .state import CURRENT

__all__ = ["LayerNorm", "Linear", "QuantizedLinear", "RMSNorm", "Softmax"]


class Linear(torch.nn.Linear):
    """activation(x @ weight.T + bias) + residual, see `isotile.linear`.

    With `constant_weight` the layer keeps a second copy of the weight: in panels, as the CPU kernels read it, and on
    huge pages. Few rows of x, where reading the weight is the work, gain most; many are spared the packing of each
    call. The price is that copy's memory: as much again as the weight, in every layer. It is made at the first call
    that uses it, and has no part in `state_dict`, in buffers, in pickles and in deep copies. The result has the same
    bits.

    The copy is used where all of this holds; every other call uses the weight itself:

    * x and the weight are plain tensors, and the weight is on the CPU, but neither an inference tensor (it has no
      version counter) nor in memory shared with other processes;
    * the weight is not of 16 bits on a CPU with matrix tiles (AMX), which take it as it is;
    * the weight needs no gradient: the call is under `torch.no_grad()` or `torch.inference_mode()`, or the weight is
      frozen and has no forward-mode tangent;
    * nothing is traced or transformed: no torch.compile, torch.export or torch.jit.trace, no FakeTensor or other mode,
      no torch.func transform, no autocast;
    * no backend but "cpu" is chosen.

    A changed weight is copied anew: "constant" is a hint for speed. Operations in place, `out=`, optimizers' steps,
    `load_state_dict`, `.to` and another parameter are all noticed. Unnoticed, as in autograd, are only writes that
    PyTorch's version counter does not see: through `weight.data` (`layer.weight.data.add_(1)`), through NumPy, or by
    foreign kernels. After one of those set `layer.constant_weight = True` again, which drops the copy.

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`.
        activation: None, "relu", "gelu", "gelu_tanh", "silu", "sigmoid" or "tanh".
        constant_weight: whether to keep the copy; also an attribute that can be set at any time.
    """

    _constant_weight = False  # of a layer unpickled from before there was one
    _packed: _PackedWeight | None = None

    def __init__(
        self,
        in_features,
        out_features,
        bias=True,
        device=None,
        dtype=None,
        *,
        activation=None,
        constant_weight: bool = False,
    ):
        super().__init__(in_features, out_features, bias, device, dtype)
        self.activation = activation
        self.constant_weight = constant_weight

    @property
    def constant_weight(self) -> bool:
        """Whether the layer keeps a copy of its weight for the CPU. Setting it drops the copy that there is."""
        return self._constant_weight

    @constant_weight.setter
    def constant_weight(self, value: bool) -> None:
        self._constant_weight = bool(value)
        self._packed = None

    def forward(self, x: torch.Tensor, *, residual: torch.Tensor | None = None) -> torch.Tensor:
        """x: [..., in_features]; residual: [..., out_features] or None. Returns [..., out_features]."""
        weight = self.weight
        if self._constant_weight and not torch.compiler.is_compiling():
            panels = self._panels(x, weight)
            if panels is not None:
                return call("packed_linear", x, weight, panels, self.bias, self.activation, residual)[0]
        return isotile.linear(x, weight, self.bias, activation=self.activation, residual=residual)

    def _panels(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor | None:
        """The weight in panels, where this call may use them."""
        if (
            type(x) not in PLAIN
            or (weight.requires_grad and torch.is_grad_enabled())
            or CURRENT.get().backend not in (None, "cpu")
            or (signature := fast_path.signature(weight)) is None  # a mode is in force, or the weight is not plain
            or weight.is_inference()
        ):
            return None
        # Read before the copy is made: a write meanwhile makes it a stale one, never one that is taken for fresh.
        state = (weight.data_ptr(), weight._version, _latest_step, signature)
        packed = self._packed
        if packed is not None and packed.weight is weight and packed.state == state:
            return packed.panels
        if packed is not None:
            self._packed = packed = None  # of an earlier weight, and freed before the next copy takes memory
        if (
            not weight.is_cpu
            or weight.ndim != 2
            or panel_step(weight.dtype) is None
            or weight.is_shared()
            or torch.autograd.forward_ad.unpack_dual(weight).tangent is not None
        ):
            return None
        _watch_optimizers()
        packed = self._packed = _PackedWeight(weight, state)  # at once, as other threads may be here too
        return packed.panels

    def _apply(self, fn, recurse=True):
        self._packed = None  # whatever moves the weight leaves no copy of the old one behind
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        shown = super().extra_repr() + (f", activation={self.activation!r}" if self.activation else "")
        return shown + (", constant_weight=True" if self._constant_weight else "")


class _PackedWeight:
    """A copy of a weight in panels, and the state of the weight that it was made from.

    Address and version say nothing once the weight is gone: the next one may have both. So the weight is kept, and its
    storage too, which an assignment to `weight.data` would free.
    """

    __slots__ = ("panels", "state", "storage", "weight")

    def __init__(self, weight: torch.Tensor, state: Hashable) -> None:
        self.weight, self.storage, self.state = weight, weight.untyped_storage(), state
        with torch.inference_mode(False), torch.no_grad():  # a normal tensor: autograd may save it later
            step = panel_step(weight.dtype)
            assert step is not None
            n, k = weight.shape
            panels = huge_pages.empty(packed_linear.panel_shape(n, k, step), weight.dtype)
            self.panels = packed_linear.pack(weight.detach(), step, panels)

    def __reduce__(self):
        return type(None), ()  # pickled and deep copied as None


#: Another object after every optimizer's step: fused ones write weights and leave the version counters as they are.
_latest_step = object()


def _stepped(*_: Any) -> None:
    global _latest_step
    _latest_step = object()


@functools.cache
def _watch_optimizers() -> None:
    register_optimizer_step_pre_hook(_stepped)  # before too: a step that is interrupted has written some weights
    register_optimizer_step_post_hook(_stepped)


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
