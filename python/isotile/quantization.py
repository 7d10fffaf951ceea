"""Quantised weights: `quantize` makes them, `QuantizedWeight` holds them, `quantized_linear` multiplies by them.

The formats are defined in `isotile.ops._quantized`; section 3 of the design page has their layout in memory.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from . import huge_pages
from .ops import _quantized
from .ops._quantized import SCHEMES

#: Of the layout in memory; a reader refuses what it does not know.
FORMAT_VERSION = 1
#: Scales that "least_squares" tries: from the largest magnitude's down to this share less.
SEARCH_STEPS, SEARCH_RANGE = 16, 0.4
_PARTS = ("packed", "scales", "zeros", "global_scale")


class QuantizedWeight(torch.nn.Module):
    """A weight [n, k] in a quantised format, packed in one layout that every backend reads.

    It is a module that holds buffers, so `state_dict()`, `load_state_dict()` and `.to(device)` are PyTorch's own, and
    inside another module its parts travel with that module's. Changing the dtype of a model leaves it as it is. All
    parts are plain tensors of integers and floats: safetensors and `torch.save` keep them, on any machine, and
    `QuantizedWeight.from_state_dict` makes the weight again.

    Attributes:
        packed: [n, row_bytes], uint8; see `torch.ops.isotile.quantized_linear`'s reference for the layout.
        scales: [n, groups].
        zeros: [n, groups], or None.
        global_scale: [1], or None.
        scheme, group_size: as `quantize` was called; group_size is -1 for one scale a row.
        shape: torch.Size([n, k]).
    """

    def __init__(
        self,
        packed: torch.Tensor,
        scales: torch.Tensor,
        zeros: torch.Tensor | None = None,
        global_scale: torch.Tensor | None = None,
        *,
        scheme: str,
        group_size: int,
        shape: tuple[int, int],
    ) -> None:
        super().__init__()
        n, k = (int(size) for size in shape)
        _check_scheme("QuantizedWeight", scheme)
        if group_size not in SCHEMES[scheme].group_sizes:
            wanted = ", ".join(map(str, SCHEMES[scheme].group_sizes))
            raise ValueError(f"isotile.QuantizedWeight: group_size: wanted one of {wanted}, got {group_size!r}")
        groups = (n, _quantized.group_count(group_size, k))
        wanted_shapes = {
            "packed": (n, _quantized.row_bytes(scheme, k)), "scales": groups, "zeros": groups, "global_scale": (1,),
        }  # fmt: skip
        parts = {"packed": packed, "scales": scales, "zeros": zeros, "global_scale": global_scale}
        for name, part in parts.items():
            if part is not None and tuple(part.shape) != wanted_shapes[name]:
                raise ValueError(
                    f"isotile.QuantizedWeight: {name}: wanted shape {list(wanted_shapes[name])} for a {scheme} weight "
                    f"[{n}, {k}] in groups of {group_size}, got {list(part.shape)}"
                )
            self.register_buffer(name, None if part is None else part.detach().contiguous())
        about = (FORMAT_VERSION, tuple(SCHEMES).index(scheme), group_size, n, k)
        self.register_buffer("format", torch.tensor(about, dtype=torch.int64, device=packed.device))
        self.scheme = scheme
        self.group_size = group_size
        self.shape = torch.Size((n, k))

    packed: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    global_scale: torch.Tensor | None

    @classmethod
    def from_state_dict(cls, state: Mapping[str, torch.Tensor], prefix: str = "") -> QuantizedWeight:
        """The weight whose `state_dict` this is, or that `prefix` (such as `"layers.0.weight."`) names in a larger one.

        Raises:
            KeyError: a part is missing.
            ValueError: parts that do not fit together, or of a later version's format.
        """
        scheme, group_size, n, k = _read_format(state[f"{prefix}format"])
        parts = {name: state.get(prefix + name) for name in _PARTS[2:]}
        return cls(
            state[f"{prefix}packed"],
            state[f"{prefix}scales"],
            **parts,
            scheme=scheme,
            group_size=group_size,
            shape=(n, k),
        )

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """The weight's numbers [n, k], computed in float32 (float64 for float64) and rounded to `dtype`."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        parts = (self.packed, self.scales, self.zeros, self.global_scale, self.scheme, self.group_size)
        return _quantized.dequantized(*parts, k=self.shape[1], wide=wide).to(dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of all parts."""
        parts: list[torch.Tensor | None] = [self.packed, self.scales, self.zeros, self.global_scale]
        return sum(part.numel() * part.element_size() for part in parts if part is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., k]. Returns x @ weight.T [..., n]."""
        import isotile

        return isotile.quantized_linear(x, self)  # type: ignore[no-any-return, misc]

    def _apply(self, fn: Any, recurse: bool = True) -> QuantizedWeight:
        # Moves to a device pass; a change of dtype would change what the bytes mean.
        def moved(tensor: torch.Tensor) -> torch.Tensor:
            found = fn(tensor)
            return found if found.dtype == tensor.dtype else tensor.to(found.device)

        return super()._apply(moved, recurse)

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:
        given = state.get(f"{prefix}format")
        if given is not None:
            about = _read_format(given)
            mine = (self.scheme, self.group_size, *self.shape)
            if about != mine:
                args[4].append(  # error messages, in load_state_dict's own order
                    f"{prefix}: wanted a weight of scheme, group size and shape {mine}, got {about}"
                )
                return
        for name in _PARTS[2:]:  # parts that only some weights have
            found = state.get(prefix + name)
            mine_now = getattr(self, name)
            if found is not None and mine_now is None:
                setattr(self, name, torch.empty_like(found, device=self.packed.device))
            elif found is None and mine_now is not None and given is not None:
                setattr(self, name, None)
        for name in ("scales", "zeros"):  # their dtype is part of the format
            found, mine_now = state.get(prefix + name), getattr(self, name)
            if found is not None and mine_now is not None and found.dtype != mine_now.dtype:
                setattr(self, name, mine_now.to(found.dtype))
        super()._load_from_state_dict(state, prefix, *args)

    def extra_repr(self) -> str:
        bits = 8 * self.nbytes / max(1, self.shape.numel())
        zeros = "" if self.zeros is None else f", zeros={str(self.zeros.dtype).removeprefix('torch.')}"
        return (
            f"{list(self.shape)}, scheme={self.scheme!r}, group_size={self.group_size}{zeros}, {bits:.2f} bits/weight"
        )


def _read_format(given: torch.Tensor) -> tuple[str, int, int, int]:
    version, scheme, group_size, n, k = given.tolist()
    if version != FORMAT_VERSION or not 0 <= scheme < len(SCHEMES):
        raise ValueError(
            f"isotile.QuantizedWeight: format: wanted version {FORMAT_VERSION} with a scheme below {len(SCHEMES)}, "
            f"got version {version} with scheme {scheme}"
        )
    return tuple(SCHEMES)[scheme], group_size, n, k


def _check_scheme(function: str, scheme: Any) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"isotile.{function}: scheme: wanted one of {', '.join(map(repr, SCHEMES))}, got {scheme!r}")


def quantize(
    weight: torch.Tensor,
    scheme: str,
    *,
    group_size: int | None = 128,
    symmetric: bool | None = None,
    search: str | None = None,
) -> QuantizedWeight:
    """A linear layer's weight [n, k] in a quantised format, each element rounded to the nearest.

    | scheme | weight | activations | bits a weight |
    | --- | --- | --- | --- |
    | `"int8"` | int8, one scale a row | as they are | 8 |
    | `"int8_dynamic"` | int8, one scale a row | int8, one scale a row, at run time | 8 |
    | `"int4"` | int4 in groups | as they are | 4 + 16 / group_size |
    | `"int4_dynamic"` | int4 in groups | int8, one scale a row, at run time | 4 + 16 / group_size |
    | `"fp8"` | e4m3, one scale a row | e4m3, one scale a row, at run time | 8 |
    | `"mxfp4"` | e2m1 in groups of 32, scales powers of two (OCP Microscaling Formats 1.0, 2023) | as they are | 4.25 |
    | `"nvfp4"` | e2m1 in groups of 16, e4m3 scales and one float32 | as they are | 4.5 |

    Args:
        weight: [n, k], any float dtype, finite.
        scheme: see the table.
        group_size: consecutive elements of a row that share a scale, for "int4" and "int4_dynamic": 32, 64 or 128; -1
            or None is one scale a row. The other schemes have the one of the table.
        symmetric: False gives "int4" and "int4_dynamic" zero points (8 more bits a group). Every other scheme is
            symmetric.
        search: how the scales of the integer schemes are found. None: the largest magnitude of a group becomes the
            largest integer. "least_squares": the scale with the least squared error among clipped ones, each
            refined by least squares between the weights and their integers; zero points stay where they are.

    Returns:
        The `QuantizedWeight`, on the weight's device.

    Raises:
        ValueError: an unknown scheme or group size, zero points where there are none, a weight that is not finite.
        TypeError: not a float tensor.
    """
    _check_scheme("quantize", scheme)
    if not isinstance(weight, torch.Tensor) or not weight.is_floating_point():
        got = weight.dtype if isinstance(weight, torch.Tensor) else type(weight).__name__
        raise TypeError(f"isotile.quantize: weight: wanted a float tensor, got {got}")
    if weight.ndim != 2:
        raise ValueError(f"isotile.quantize: weight: wanted shape [n, k], got {list(weight.shape)}")
    integers4 = scheme in ("int4", "int4_dynamic")
    if symmetric is False and not integers4:
        raise ValueError(f"isotile.quantize: symmetric: wanted True or None under {scheme!r}, got False")
    group_size = -1 if group_size is None else group_size
    if not integers4:
        group_size = SCHEMES[scheme].group_sizes[0]
    elif group_size not in SCHEMES[scheme].group_sizes:
        wanted = ", ".join(map(str, SCHEMES[scheme].group_sizes))
        raise ValueError(f"isotile.quantize: group_size: wanted one of {wanted} or None, got {group_size!r}")
    if search not in (None, "least_squares"):
        raise ValueError(f"isotile.quantize: search: wanted None or 'least_squares', got {search!r}")
    if search is not None and SCHEMES[scheme].floating:
        raise ValueError(f"isotile.quantize: search: wanted None under {scheme!r}, got {search!r}")
    w = weight.detach().to(torch.float32)
    if not bool(w.isfinite().all()):
        raise ValueError("isotile.quantize: weight: wanted finite numbers, got NaN or infinity")
    n, k = w.shape
    grouped = _groups_of(w, group_size)  # [n, groups, elements], the end filled with 0
    parts: dict[str, torch.Tensor | None] = {}
    if SCHEMES[scheme].bits == 8:
        top = 448.0 if SCHEMES[scheme].floating else 127.0
        scales = _amax(grouped).clamp(min=_quantized.LEAST_AMAX) / top
        if search is not None:
            scales = _least_squares(grouped, scales, torch.zeros_like(scales), -127, 127, torch.float32)
        q = w / scales
        # e4m3 rounds to the nearest, ties to even; 448 is the largest, and no quotient is larger.
        q = q.to(torch.float8_e4m3fn) if SCHEMES[scheme].floating else q.round().clamp(-127, 127).to(torch.int8)
        parts = {"packed": q.view(torch.uint8), "scales": scales}
    elif integers4:
        # bfloat16: float32's range in 16 bits; elements are rounded against the scale as it is stored.
        dtype = torch.float32 if group_size == -1 else torch.bfloat16
        if symmetric is False:
            low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
            scales = _stored_scale((high - low) / 15, dtype)
            zeros = (-low / scales).round().clamp(0, 15)
            parts["zeros"] = zeros.to(torch.uint8)
        else:
            scales = _stored_scale(_amax(grouped) / 7, dtype)
            zeros = torch.full_like(scales, 8.0)
        if search is not None:
            scales = _least_squares(grouped, scales, zeros, 0, 15, dtype)
        codes = ((grouped / scales.unsqueeze(-1)).round() + zeros.unsqueeze(-1)).clamp(0, 15)
        parts = {"packed": _packed(codes, k), "scales": scales.to(dtype), **parts}
    elif scheme == "mxfp4":
        # The largest power of two of e2m1 is 4: floor(log2(amax)) - 2, section 6.3 of the specification.
        exponent = torch.frexp(_amax(grouped)).exponent - 1 - 2
        exponent = torch.where(_amax(grouped) == 0, -127, exponent).clamp(-127, 127)
        codes = _e2m1_codes(torch.ldexp(grouped, -exponent.unsqueeze(-1)))
        parts = {"packed": _packed(codes, k), "scales": (exponent + 127).to(torch.uint8)}
    else:
        whole = (w.abs().amax() if w.numel() else w.new_zeros(())).clamp(min=_quantized.LEAST_AMAX) / (448.0 * 6.0)
        scales = (_amax(grouped) / 6.0 / whole).to(torch.float8_e4m3fn)
        factor = (scales.to(torch.float32) * whole).unsqueeze(-1)
        codes = _e2m1_codes(torch.where(factor > 0, grouped / factor, 0.0))
        parts = {"packed": _packed(codes, k), "scales": scales.view(torch.uint8), "global_scale": whole.reshape(1)}
    parts["packed"] = huge_pages.moved(parts["packed"])  # type: ignore[arg-type]
    return QuantizedWeight(**parts, scheme=scheme, group_size=group_size, shape=(n, k))  # type: ignore[arg-type]


def quantize_model(
    model: torch.nn.Module,
    scheme: str,
    *,
    skip: Sequence[str] = (),
    group_size: int | None = 128,
    symmetric: bool | None = None,
    search: str | None = None,
) -> torch.nn.Module:
    """Replace a model's linear layers by `isotile.nn.QuantizedLinear`, in place.

    Args:
        model: its `torch.nn.Linear`s (and `isotile.nn.Linear`s), not subclasses of them, are replaced.
        scheme, group_size, symmetric, search: as `quantize`.
        skip: names of modules to leave as they are, as shell patterns: `"lm_head"`, `"*.router"`, `"layers.0.*"`.

    Returns:
        The model.

    Raises:
        ValueError: as `quantize`; a pattern of `skip` that matches no module.
    """
    from . import nn

    kinds = (torch.nn.Linear, nn.Linear)
    if type(model) in kinds:
        raise ValueError("isotile.quantize_model: model: wanted a module that holds linear layers, got one itself")
    modules = dict(model.named_modules())
    for pattern in skip:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in modules):
            raise ValueError(f"isotile.quantize_model: skip: wanted names of modules, got {pattern!r}, which none has")
    for name, module in modules.items():
        if type(module) in kinds and not any(fnmatch.fnmatchcase(name, p) for p in skip):
            parent, _, own = name.rpartition(".")
            quantized = nn.QuantizedLinear.from_linear(
                module, scheme, group_size=group_size, symmetric=symmetric, search=search
            )
            setattr(modules[parent], own, quantized)
    return model


def _groups_of(w: torch.Tensor, group_size: int) -> torch.Tensor:
    n, k = w.shape
    size = max(k, 1) if group_size == -1 else group_size
    padded = torch.nn.functional.pad(w, (0, -k % size if k else size if group_size == -1 else 0))
    return padded.view(n, padded.shape[1] // size, size)


def _amax(grouped: torch.Tensor) -> torch.Tensor:
    return grouped.abs().amax(-1)


def _stored_scale(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return scale.clamp(min=_quantized.LEAST_AMAX).to(dtype).to(torch.float32)


def _least_squares(
    grouped: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor, low: int, high: int, dtype: torch.dtype
) -> torch.Tensor:
    """The scales [n, groups] with the least squared error, among clipped ones and their least-squares refinements."""

    def integers(scale: torch.Tensor) -> torch.Tensor:
        q = (grouped / scale.unsqueeze(-1)).round() + zeros.unsqueeze(-1)
        return q.clamp(low, high) - zeros.unsqueeze(-1)

    def error(scale: torch.Tensor) -> torch.Tensor:
        return (integers(scale) * scale.unsqueeze(-1) - grouped).square().sum(-1)

    best, least = scales, error(scales)
    for step in range(SEARCH_STEPS):
        tried = _stored_scale(scales * (1 - step * SEARCH_RANGE / SEARCH_STEPS), dtype)
        q = integers(tried)
        refined = (q * grouped).sum(-1) / q.square().sum(-1).clamp(min=1)
        for scale in (tried, _stored_scale(refined, dtype)):
            found = error(scale)
            best = torch.where(found < least, scale, best)
            least = torch.minimum(found, least)
    return best


def _packed(codes: torch.Tensor, k: int) -> torch.Tensor:
    return _quantized.pack_nibbles(codes.flatten(1)[:, :k])


def _e2m1_codes(values: torch.Tensor) -> torch.Tensor:
    """The nearest e2m1 number's code, ties to the even one, beyond 6 to 6."""
    magnitude = values.abs().clamp(max=6.0)
    # Steps of 1/2 up to 2, of 1 up to 4, of 2 above: each a rounding to whole steps.
    code = torch.where(
        magnitude < 2,
        (magnitude * 2).round(),
        torch.where(magnitude < 4, magnitude.round() + 2, (magnitude / 2).round() + 4),
    )
    return code.to(torch.uint8) | (torch.signbit(values).to(torch.uint8) << 3)
