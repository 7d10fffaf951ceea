"""Quantised weights that other projects wrote, as `QuantizedWeight`s of the same numbers.

Nothing is quantised again: codes are moved to isotile's layout, scales and zero points kept as they are, so that
`dequantize()` gives what the project's own formula gives. What isotile's formats cannot hold exactly is refused.

    GPTQ                qweight, qzeros, scales (g_idx)                   4 and 8 bits; no act-order
    AWQ                 qweight, qzeros, scales                           4 bits
    compressed-tensors  weight_packed or weight, weight_scale, ...        int4, int8, float8 e4m3
    torchao             Int8Tensor, IntxUnpackedToInt8Tensor (int4 and int8)
    GGUF                Q4_0, Q8_0, Q4_K
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from .ops import _quantized
from .quantization import QuantizedWeight

__all__ = ["from_awq", "from_compressed_tensors", "from_gguf", "from_gptq", "from_torchao"]

GROUP_SIZES = (32, 64, 128)


class ImportRefused(ValueError):
    """A weight that isotile's formats cannot hold exactly; the message says what stands in the way."""


def _refuse(function: str, what: str, wanted: str, got: Any) -> None:
    raise ImportRefused(f"isotile.importers.{function}: {what}: wanted {wanted}, got {got}")


def _group_size(function: str, group_size: int | None, k: int) -> int:
    if group_size is None or group_size == -1 or group_size == k:
        return -1
    if group_size not in GROUP_SIZES:
        _refuse(function, "group_size", "32, 64, 128 or the whole row", group_size)
    return group_size


def _nibbles(words: torch.Tensor, dim: int) -> torch.Tensor:
    """int32 words along `dim` as eight times as many nibbles, low ones first."""
    shifts = torch.arange(0, 32, 4, dtype=torch.int32, device=words.device)
    spread = (words.movedim(dim, -1).unsqueeze(-1) >> shifts) & 15
    return spread.flatten(-2).movedim(-1, dim).to(torch.uint8)


def _bytes(words: torch.Tensor, dim: int) -> torch.Tensor:
    shifts = torch.arange(0, 32, 8, dtype=torch.int32, device=words.device)
    spread = (words.movedim(dim, -1).unsqueeze(-1) >> shifts) & 255
    return spread.flatten(-2).movedim(-1, dim).to(torch.uint8)


def _int4(
    codes: torch.Tensor, scales: torch.Tensor, zeros: torch.Tensor | None, group_size: int, dynamic: bool
) -> QuantizedWeight:
    """codes [n, k] from 0 to 15; scales and zeros [n, groups]; zero points that are all 8 need no room."""
    if zeros is not None and zeros.dtype == torch.uint8 and bool((zeros == 8).all()):
        zeros = None
    return QuantizedWeight(
        _quantized.pack_nibbles(codes),
        scales,
        zeros,
        scheme="int4_dynamic" if dynamic else "int4",
        group_size=group_size,
        shape=tuple(codes.shape),  # type: ignore[arg-type]
    )


def _int8(q: torch.Tensor, scales: torch.Tensor, group_size: int, dynamic: bool) -> QuantizedWeight:
    """q [n, k] signed; scales [n, groups]."""
    return QuantizedWeight(
        q.to(torch.int8).contiguous().view(torch.uint8),
        scales,
        scheme="int8_dynamic" if dynamic else "int8",
        group_size=group_size,
        shape=tuple(q.shape),  # type: ignore[arg-type]
    )


def from_gptq(
    qweight: torch.Tensor,
    qzeros: torch.Tensor,
    scales: torch.Tensor,
    g_idx: torch.Tensor | None = None,
    *,
    bits: int = 4,
    checkpoint_format: str = "gptq",
    dynamic: bool = False,
) -> QuantizedWeight:
    """A layer that GPTQModel or AutoGPTQ packed: (q - zero) * scale.

    Args:
        qweight: [k * bits / 32, n], int32, packed along k.
        qzeros: [groups, n * bits / 32], int32.
        scales: [groups, n].
        g_idx: [k], each input's group; must be in order.
        bits: 4 or 8.
        checkpoint_format: "gptq" stores zero points less one, "gptq_v2" as they are.
        dynamic: quantise activations at run time.

    Raises:
        ValueError: act-order, other bits or group sizes, 8 bits with zero points other than 128.
    """
    name = "from_gptq"
    if bits not in (4, 8):
        _refuse(name, "bits", "4 or 8", bits)
    if checkpoint_format not in ("gptq", "gptq_v2"):
        _refuse(name, "checkpoint_format", "'gptq' or 'gptq_v2'", repr(checkpoint_format))
    unpack = _nibbles if bits == 4 else _bytes
    codes = unpack(qweight, 0).mT
    n, k = codes.shape
    groups = scales.shape[0]
    given = k if groups == 1 else -(-k // groups)
    group_size = _group_size(name, given, k)
    if g_idx is not None and not torch.equal(g_idx.cpu().long(), torch.arange(k) // given):
        _refuse(name, "g_idx", "groups of consecutive inputs", "another order (act-order, desc_act=True)")
    # The packed zero plus one may be 16, which a byte holds.
    zeros = unpack(qzeros, 1).mT[:n].to(torch.int16) + (1 if checkpoint_format == "gptq" else 0)
    if bits == 4:
        return _int4(codes, scales.mT, zeros.to(torch.uint8), group_size, dynamic)
    if not bool((zeros == 128).all()):
        _refuse(name, "qzeros", "zero points of 128 at 8 bits", sorted(set(zeros.flatten().tolist()))[:4])
    return _int8(codes.to(torch.int16) - 128, scales.mT, group_size, dynamic)


#: AWQ's order of nibbles in a word: nibble i holds column `AWQ_ORDER[i]` of eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def from_awq(
    qweight: torch.Tensor, qzeros: torch.Tensor, scales: torch.Tensor, *, dynamic: bool = False
) -> QuantizedWeight:
    """A layer that AutoAWQ packed ("gemm" version): (q - zero) * scale.

    Args:
        qweight: [k, n / 8], int32, packed along n.
        qzeros: [groups, n / 8], int32, packed likewise.
        scales: [groups, n].
        dynamic: quantise activations at run time.

    Raises:
        ValueError: a group size that isotile has not.
    """
    inverse = torch.tensor(AWQ_ORDER, device=qweight.device).argsort()

    def unpack(words: torch.Tensor) -> torch.Tensor:
        return _nibbles(words, 1).unflatten(1, (-1, 8))[:, :, inverse].flatten(1)

    codes, zeros = unpack(qweight).mT, unpack(qzeros).mT
    k, groups = codes.shape[1], scales.shape[0]
    group_size = _group_size("from_awq", k if groups == 1 else -(-k // groups), k)
    return _int4(codes, scales.mT, zeros.contiguous(), group_size, dynamic)


def from_compressed_tensors(
    state: Mapping[str, torch.Tensor], prefix: str = "", *, bits: int | None = None, dynamic: bool = False
) -> QuantizedWeight:
    """A layer of llm-compressor and vLLM: its `weight_packed` or `weight`, `weight_scale`, and what else it has.

    Args:
        state: the checkpoint's tensors, or the layer's.
        prefix: what stands before `weight_packed`, such as `"model.layers.0.mlp.up_proj."`.
        bits: of `weight_packed` ("pack-quantized" format): 4 (if None) or 8.
        dynamic: quantise activations at run time ("int8", "int4"); "fp8" always does.

    Raises:
        KeyError: a tensor is missing.
        ValueError: act-order, odd groups, asymmetric int8, a dtype or strategy that isotile has not.
    """
    name = "from_compressed_tensors"
    scale = state[f"{prefix}weight_scale"]
    if state.get(f"{prefix}weight_g_idx") is not None:
        g_idx = state[f"{prefix}weight_g_idx"]
        if bool((g_idx[1:] < g_idx[:-1]).any()):
            _refuse(name, "weight_g_idx", "groups of consecutive inputs", "another order (actorder)")
    packed = state.get(f"{prefix}weight_packed")
    zero = state.get(f"{prefix}weight_zero_point")
    if packed is not None:
        n, k = (int(size) for size in state[f"{prefix}weight_shape"].tolist())
        unpack = _bytes if bits == 8 else _nibbles
        codes = unpack(packed, 1)[:, :k]
        group_size = _scale_groups(name, scale, n, k)
        if bits == 8:
            if zero is not None:
                _refuse(name, "weight_zero_point", "symmetric int8", "zero points")
            return _int8(codes.to(torch.int16) - 128, _spread(scale, n), group_size, dynamic)
        zeros = None
        if zero is not None:
            zeros = unpack(zero, 0)[:n] if zero.dtype == torch.int32 else (zero.to(torch.int16) + 8).to(torch.uint8)
        return _int4(codes, _spread(scale, n), zeros, group_size, dynamic)
    weight = state[f"{prefix}weight"]
    n, k = weight.shape
    group_size = _scale_groups(name, scale, n, k)
    scales = _spread(scale, n)
    if zero is not None and bool((zero != 0).any()):
        _refuse(name, "weight_zero_point", "symmetric weights at 8 bits", "zero points")
    if weight.dtype == torch.int8:
        return _int8(weight, scales, group_size, dynamic)
    if weight.dtype == torch.float8_e4m3fn:
        if group_size != -1:
            _refuse(name, "weight_scale", "one scale a row or for all", f"{list(scale.shape)}")
        return QuantizedWeight(weight.view(torch.uint8), scales, scheme="fp8", group_size=-1, shape=(n, k))
    _refuse(name, "weight", "int8 or float8_e4m3fn", weight.dtype)
    raise AssertionError


def _scale_groups(function: str, scale: torch.Tensor, n: int, k: int) -> int:
    if scale.ndim < 2 or scale.shape[1] == 1:
        return -1
    if scale.shape[0] != n:
        _refuse(function, "weight_scale", "scales for each row", f"blocks, {list(scale.shape)}")
    return _group_size(function, -(-k // scale.shape[1]), k)


def _spread(scale: torch.Tensor, n: int) -> torch.Tensor:
    """[n, groups] from that, [n], [1] or []."""
    return scale.reshape(-1, 1).expand(n, 1) if scale.ndim < 2 else scale.expand(n, scale.shape[1])


def from_torchao(tensor: Any, *, dynamic: bool = False) -> QuantizedWeight:
    """A torchao weight: an `Int8Tensor`, or an `IntxUnpackedToInt8Tensor` of four or eight bits.

    Args:
        tensor: the quantised weight [n, k] (`linear.weight` after `torchao.quantization.quantize_`).
        dynamic: quantise activations at run time.

    Raises:
        ValueError: another kind of tensor, odd groups, asymmetric int8, an activation scale.
    """
    name = "from_torchao"
    kind = type(tensor).__name__
    if kind not in ("Int8Tensor", "IntxUnpackedToInt8Tensor"):
        _refuse(name, "tensor", "an Int8Tensor or IntxUnpackedToInt8Tensor", kind)
    if getattr(tensor, "act_pre_scale", None) is not None:
        _refuse(name, "act_pre_scale", "None", "a tensor: multiply activations by it")
    n, k = tensor.shape
    block = list(tensor.block_size)
    if len(block) != 2 or block[0] not in (1, n):
        _refuse(name, "block_size", "groups within a row", block)
    group_size = _group_size(name, block[1], k)
    scales = tensor.scale.reshape(-1, -(-k // block[1])).expand(n, -1)
    zero = tensor.zero_point
    if kind == "IntxUnpackedToInt8Tensor" and "int4" in str(tensor.target_dtype):
        zeros = None if zero is None else (zero.reshape(scales.shape).to(torch.int16) + 8).to(torch.uint8)
        return _int4(tensor.qdata.to(torch.int16) + 8, scales, zeros, group_size, dynamic)
    if zero is not None and bool((zero != 0).any()):
        _refuse(name, "zero_point", "symmetric weights at 8 bits", "zero points")
    return _int8(tensor.qdata, scales, group_size, dynamic)


def from_gguf(
    data: torch.Tensor, kind: str, shape: Sequence[int] | None = None, *, dynamic: bool = False
) -> QuantizedWeight:
    """A GGUF tensor of rows of blocks.

    | kind | block | numbers |
    | --- | --- | --- |
    | `"Q4_0"` | 32: float16 d, 16 bytes | d * (q - 8) |
    | `"Q8_0"` | 32: float16 d, 32 int8 | d * q |
    | `"Q4_K"` | 256: float16 d, dmin, 6-bit scales and minimums of 8 groups, 128 bytes | d * scale * q - dmin * min |

    Q4_K's products of a float16 and six bits need float32 scales and offsets to be exact: 6 bits a weight, not 4.5.

    Args:
        data: the tensor's bytes, uint8, [n, row_bytes] or flat.
        kind: see the table.
        shape: [n, k] where data is flat (GGUF itself lists k first).
        dynamic: quantise activations at run time.

    Raises:
        ValueError: another kind of tensor, bytes that are not whole rows.
    """
    name = "from_gguf"
    sizes = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144)}
    if kind not in sizes:
        _refuse(name, "kind", ", ".join(map(repr, sizes)), repr(kind))
    elements, size = sizes[kind]
    if data.dtype != torch.uint8:
        _refuse(name, "data", "uint8", data.dtype)
    if shape is not None:
        data = data.reshape(int(shape[0]), -1)
    if data.ndim != 2 or data.shape[1] % size or (shape is not None and data.shape[1] // size * elements != shape[1]):
        _refuse(name, "data", f"rows of whole blocks of {size} bytes", f"{list(data.shape)} for shape {shape}")
    n = data.shape[0]
    blocks = data.reshape(n, -1, size)

    def halfs(start: int) -> torch.Tensor:
        return blocks[:, :, start : start + 2].contiguous().view(torch.float16).squeeze(-1)

    if kind == "Q8_0":
        return _int8(blocks[:, :, 2:].contiguous().view(torch.int8).flatten(1), halfs(0), 32, dynamic)
    if kind == "Q4_0":
        q = blocks[:, :, 2:]
        return _int4(torch.cat((q & 15, q >> 4), dim=-1).flatten(1), halfs(0), None, 32, dynamic)
    six = blocks[:, :, 4:16]
    low, mid, high = six[:, :, :4], six[:, :, 4:8], six[:, :, 8:]
    scale = torch.cat((low & 63, (high & 15) | ((low >> 6) << 4)), dim=-1)  # [n, blocks, 8]
    minimum = torch.cat((mid & 63, (high >> 4) | ((mid >> 6) << 4)), dim=-1)
    scales = halfs(0).float().unsqueeze(-1) * scale
    offsets = -(halfs(2).float().unsqueeze(-1) * minimum)
    q = blocks[:, :, 16:].reshape(n, -1, 4, 32)  # 32 bytes hold group 2 i low and group 2 i + 1 high
    codes = torch.stack((q & 15, q >> 4), dim=3).flatten(1)
    return _int4(codes, scales.flatten(1), offsets.flatten(1), 32, dynamic)
