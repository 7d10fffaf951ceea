"""Formats of quantised weights: their layout in memory, what the bytes mean, and how activations are quantised."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One way to store a weight.

    Attributes:
        bits: of one element.
        dynamic: the largest quantised activation, if activations are quantised row by row at run time.
        floating: elements are floating point numbers; otherwise integers.
        group_sizes: group sizes allowed; -1 is one scale for a whole row.
    """

    bits: int
    dynamic: float | None = None
    floating: bool = False
    group_sizes: tuple[int, ...] = (-1, 32, 64, 128)


#: The order is part of the kernel form: a kernel gets a scheme's index.
SCHEMES: dict[str, Scheme] = {
    "int8": Scheme(8),
    "int8_dynamic": Scheme(8, dynamic=127.0),
    "int4": Scheme(4),
    "int4_dynamic": Scheme(4, dynamic=127.0),
    "fp8": Scheme(8, dynamic=448.0, floating=True, group_sizes=(-1,)),
    "mxfp4": Scheme(4, floating=True, group_sizes=(32,)),
    "nvfp4": Scheme(4, floating=True, group_sizes=(16,)),
}
#: Elements of a row that share 64 bytes in a four-bit format: byte j holds element j in its low half, 64 + j above.
BLOCK = 128
#: The magnitudes of e2m1, by code; bit 3 is the sign.
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
#: Integer products of this many terms fit in 32 bits: 127 * 128 * 2**17 < 2**31.
MAX_TERMS = 1 << 17
#: Rows whose largest magnitude is less are quantised as if it were this: no scale is subnormal, none is 0.
LEAST_AMAX = 2.0**-100


def row_bytes(scheme, k):
    """Bytes of one packed row of k elements."""
    return k if SCHEMES[scheme].bits == 8 else (k + BLOCK - 1) // BLOCK * (BLOCK // 2)


def group_count(group_size, k):
    """Scales of a row of k elements."""
    return 1 if group_size == -1 else (k + group_size - 1) // group_size


def pack_nibbles(codes):
    """[n, k] codes from 0 to 15 to packed bytes [n, row_bytes], uint8; the end of the last block is 0."""
    n, k = codes.shape
    padded = torch.nn.functional.pad(codes.to(torch.uint8), (0, -k % BLOCK)).view(n, -1, 2, BLOCK // 2)
    return (padded[:, :, 0] | (padded[:, :, 1] << 4)).reshape(n, row_bytes("int4", k)).contiguous()


def unpack_nibbles(packed, k):
    """Packed bytes [n, row_bytes] to codes [n, k], uint8."""
    blocks = packed.unflatten(1, (packed.shape[1] // (BLOCK // 2), BLOCK // 2))
    return torch.stack((blocks & 15, blocks >> 4), dim=2).flatten(1)[:, :k]


def _per_element(groups, group_size, k):
    """[n, groups] to [n, k]."""
    if group_size == -1:
        return groups.expand(groups.shape[0], k)
    return groups.repeat_interleave(group_size, dim=1)[:, :k]


def scale_values(scales, scheme, wide):
    """The numbers that `scales` stand for: themselves, or codes of e8m0 (mxfp4) or e4m3 (nvfp4)."""
    if scales.dtype != torch.uint8:
        return scales.to(wide)
    if scheme == "nvfp4":
        return scales.view(torch.float8_e4m3fn).to(wide)
    powers = torch.ldexp(torch.ones_like(scales, dtype=wide), scales.to(torch.int32) - 127)
    return torch.where(scales == 255, torch.nan, powers)


def elements(packed, scheme, k, wide):
    """The stored elements [n, k] as numbers, before scale and zero point: 0 to 15 for int4."""
    if SCHEMES[scheme].bits == 4:
        codes = unpack_nibbles(packed, k)
        if not SCHEMES[scheme].floating:
            return codes.to(wide)
        table = torch.tensor((*E2M1, *(-v for v in E2M1)), dtype=wide, device=packed.device)
        return table[codes.to(torch.int64)]
    return packed.view(torch.float8_e4m3fn if SCHEMES[scheme].floating else torch.int8).to(wide)


def dequantized(packed, scales, zeros, global_scale, scheme, group_size, k, wide, magnitude=False):
    """The weight [n, k] in dtype `wide`, the meaning of every format:

        int8, fp8       q * scale
        int4            (q - zero) * scale   with an integer zero point, 8 where there is none
                        q * scale + zero     with a floating point zero
        mxfp4, nvfp4    q * scale, times the global scale where there is one

    With `magnitude`, the magnitude of what is summed: |q * scale| + |zero| in the third line.
    """
    q = elements(packed, scheme, k, wide)
    scale = _per_element(scale_values(scales, scheme, wide), group_size, k)
    if SCHEMES[scheme].bits == 4 and not SCHEMES[scheme].floating:
        if zeros is None:
            q = q - 8
        elif zeros.dtype == torch.uint8:
            q = q - _per_element(zeros.to(wide), group_size, k)
        else:
            zero = _per_element(zeros.to(wide), group_size, k)
            return (q * scale).abs() + zero.abs() if magnitude else q * scale + zero
    weight = q * scale
    if global_scale is not None:
        weight = weight * global_scale.to(wide)
    return weight.abs() if magnitude else weight


def quantize_rows(x, scheme):
    """Activations as a dynamic scheme sees them: (q, scale), q [..., k] float32 whole or e4m3 numbers, scale [..., 1].

    Each step is one IEEE float32 operation, so that every backend gets the same bits:

        amax  = max |x| of the row
        q     = round(x * (top / max(amax, 2**-100)))      top 127: to the nearest integer, ties to even;
                                                           top 448: to the nearest e4m3 number, ties to even
        scale = max(amax, 2**-100) / top

    |q| never exceeds top. A row that holds NaN or infinity has q = 0 and the scale NaN, so its result is NaN.
    """
    top = SCHEMES[scheme].dynamic
    assert top is not None
    x = x.to(torch.float32)
    if x.shape[-1] == 0:
        return x, x.new_full((*x.shape[:-1], 1), LEAST_AMAX / top)
    amax = x.abs().amax(-1, keepdim=True)
    finite = amax.isfinite()
    # A tensor, not a number: float32 arithmetic whatever the backend does with Python's floats.
    most = torch.full_like(amax, top)
    amax = torch.where(finite, amax, 1.0).clamp(min=LEAST_AMAX)
    q = torch.where(finite, x, 0.0) * (most / amax)
    q = q.to(torch.float8_e4m3fn).to(torch.float32) if SCHEMES[scheme].floating else q.round()
    return q, torch.where(finite, amax / most, torch.nan)


def integer_product(q, packed, scales, zeros, scheme, group_size, wide):
    """q [..., k] of whole numbers times the weight's integers, exact in each group; [..., n] in dtype `wide`.

    With one group a row the bits are every backend's: the sum rounded to `wide`, times the scale.
    """
    k = q.shape[-1]
    integers = elements(packed, scheme, k, torch.float64)  # sums below 2**53 are exact
    offsets = zeros if zeros is not None and zeros.dtype != torch.uint8 else None
    if SCHEMES[scheme].bits == 4 and offsets is None:
        integers = integers - (8 if zeros is None else _per_element(zeros.to(torch.float64), group_size, k))
    size = max(k, 1) if group_size == -1 else group_size
    total = None
    for g in range(scales.shape[1]):
        part = q[..., g * size : (g + 1) * size].to(torch.float64)
        term = torch.matmul(part, integers[:, g * size : (g + 1) * size].mT).to(wide) * scales[:, g].to(wide)
        if offsets is not None:
            term = term + part.sum(-1, keepdim=True).to(wide) * offsets[:, g].to(wide)
        total = term if total is None else total + term
    return q.new_zeros((*q.shape[:-1], packed.shape[0]), dtype=wide) if total is None else total
