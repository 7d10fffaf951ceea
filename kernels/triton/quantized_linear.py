"""y = activation(x @ weight.T + bias) + residual with a quantised weight, and optionally the preactivation.

One kernel for all schemes. A program owns a BLOCK_N x BLOCK_M tile of the transposed result: the weight is the left
operand of the matrix instruction, so that its elements, unpacked and dequantised in registers, need not return to
shared memory (they may be read from registers on Hopper only as the left operand). A step takes CHUNK bytes of each
weight row: CHUNK elements of an eight-bit format, or two runs of CHUNK elements, 64 apart, of a four-bit one.

Where the scales are applied (`place`):
    "end"    one scale a row of the weight: on the finished sum.
    "late"   on the partial product of each group: exact elements go to the matrix units, and few rows of x make this
             cheaper than scaling every element.
    "early"  on the elements, which are then rounded to x's dtype; not to float16, which may not hold them.

Few rows of x: the weight's bytes are the cost, k is split over SPLIT_K programs, and a second kernel adds their
partial sums in order. Dynamic schemes quantise x first (one read of x, half its bytes written); integer sums are exact.
Many rows: the weight is dequantised once to x's dtype and multiplied by matmul.py's kernels, where that is modelled to
be faster.
"""

from dataclasses import dataclass

import torch

import triton
import triton.language as tl

from . import matmul as product_kernels
from ._launch import Launch, Scratch
from ._layout import (
    MAX_GRID,
    architecture,
    cheapest,
    dtype_name,
    loops,
    next_power,
    override,
    product,
    read_config,
    refuse_dtypes,
    refuse_loops,
    units,
)
from ._tiles import loop_offset, store_epilogue, tile_position


@triton.jit
def e4m3_value(code):
    """float32 of e4m3's bits (uint8), by integer steps, which every target has."""
    magnitude = (code & 127).to(tl.int32)
    normal = ((magnitude << 20) + (120 << 23)).to(tl.float32, bitcast=True)
    value = tl.where(magnitude < 8, magnitude.to(tl.float32) * 0.001953125, normal)
    value = tl.where(magnitude == 127, float("nan"), value)
    return tl.where(code >= 128, -value, value)


@triton.jit
def e4m3_code(v):
    """The bits (uint8) of the e4m3 number nearest to v, ties to even; |v| at most 448."""
    bits = v.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
    # multiples of 2**-9: adding 1.5 * 2**23 rounds to a whole number, which is then in the low bits
    small = (tl.abs(v) * 512.0 + 12582912.0).to(tl.int32, bitcast=True) & 15
    code = tl.where(magnitude < 0x3C800000, small, normal)
    return (code | ((bits >> 24) & 128)).to(tl.uint8)


@triton.jit
def scale_value(raw, SCALES: tl.constexpr):
    """float32 of a scale as stored: a float, e8m0's bits or e4m3's bits."""
    if SCALES == "e8m0":
        exponent = raw.to(tl.int32)
        value = tl.where(exponent == 0, 0x00400000, exponent << 23).to(tl.float32, bitcast=True)
        return tl.where(exponent == 255, float("nan"), value)
    if SCALES == "e4m3":
        return e4m3_value(raw)
    return raw.to(tl.float32)


@triton.jit
def element_value(code, ELEMENT: tl.constexpr, TYPE: tl.constexpr):
    """Stored elements (uint8, one each) as numbers of TYPE, exactly. e2m1 comes doubled, so that it is whole."""
    if ELEMENT == "e4m3":
        # as float16's bits it is the number over 256; float16 keeps it whole, subnormal or not
        half = (((code & 128).to(tl.int16) << 8) | ((code & 127).to(tl.int16) << 7)).to(tl.float16, bitcast=True)
        half = tl.where((code & 127) == 127, float("nan"), half * 256.0)
        return half.to(TYPE)
    if ELEMENT == "e2m1":
        # twice the magnitudes 0, 0.5, 1, 1.5, 2, 3, 4, 6 by code, four bits each
        twice = (tl.full(code.shape, 0xC8643210, tl.uint32) >> ((code & 7).to(tl.uint32) * 4)).to(tl.int8) & 15
        return tl.where((code & 8) != 0, -twice, twice).to(TYPE)
    return code.to(tl.int8, bitcast=True).to(TYPE)


@triton.jit
def weight_value(
    code,
    scales_at,
    zeros_at,
    group,
    groups,
    col_mask,
    ELEMENT: tl.constexpr,
    ZERO: tl.constexpr,
    SCALES: tl.constexpr,
    PLACE: tl.constexpr,
    PARTS: tl.constexpr,
    TYPE: tl.constexpr,
):
    """[BLOCK_N, CHUNK] elements of TYPE, and the scale [BLOCK_N] that remains to be applied ("late")."""
    BLOCK_N: tl.constexpr = code.shape[0]
    CHUNK: tl.constexpr = code.shape[1]
    scale = tl.full([BLOCK_N], 1.0, tl.float32)
    if PLACE != "end" and PARTS == 1:
        scale = scale_value(tl.load(scales_at + group, mask=col_mask, other=0), SCALES)
    value = element_value(code, ELEMENT, TYPE)
    if ZERO == "middle":
        value = value - tl.full([BLOCK_N, CHUNK], 8, TYPE)
    elif ZERO == "integer":
        value = value - tl.load(zeros_at + group, mask=col_mask, other=0).to(TYPE)[:, None]
    if PLACE == "early":
        wide = value.to(tl.float32)
        if PARTS == 1:
            wide = wide * scale[:, None]
        else:
            parts = group + tl.arange(0, PARTS)
            inside = col_mask[:, None] & (parts < groups)[None, :]
            scale_2d = scale_value(tl.load(scales_at[:, None] + parts[None, :], mask=inside, other=0), SCALES)
            shape: tl.constexpr = [BLOCK_N, PARTS, CHUNK // PARTS]
            wide = wide * tl.reshape(tl.broadcast_to(scale_2d[:, :, None], shape), (BLOCK_N, CHUNK))
        if ZERO == "float":
            wide = wide + tl.load(zeros_at + group, mask=col_mask, other=0.0).to(tl.float32)[:, None]
        value = wide.to(TYPE)
    return value, scale


@triton.jit
def x_tile(x_at, x_step, start, k, row_mask, CHUNK: tl.constexpr, EVEN_K: tl.constexpr, TYPE: tl.constexpr):
    """[CHUNK, BLOCK_M] of x from element `start` of its rows."""
    inner = start + tl.arange(0, CHUNK)
    at = x_at[None, :] + (inner * x_step)[:, None]
    mask = row_mask[None, :]
    if not EVEN_K:
        mask = mask & (inner < k)[:, None]
    x = tl.load(at, mask=mask, other=0.0)
    if x.dtype == tl.uint8:
        x = element_value(x, "e4m3", TYPE)
    return x.to(TYPE)


@triton.jit
def finish(acc, sums, scales_ptr, zeros_ptr, global_ptr, row_scales_ptr, cols, rows, n, m, groups, PLACE: tl.constexpr,
           SCALES: tl.constexpr, HALVED: tl.constexpr, FLOAT_ZERO: tl.constexpr):  # fmt: skip
    """The product [BLOCK_M, BLOCK_N] from the sum [BLOCK_N, BLOCK_M]: what is one number a column, a row, or all."""
    z = acc.to(tl.float32)
    if PLACE == "end":
        at = cols.to(tl.int64) * groups
        z = z * scale_value(tl.load(scales_ptr + at, mask=cols < n, other=0), SCALES)[:, None]
        if FLOAT_ZERO:
            zero = tl.load(zeros_ptr + at, mask=cols < n, other=0.0).to(tl.float32)
            z += zero[:, None] * sums.to(tl.float32)[None, :]
    if HALVED:
        z = z * 0.5
    if global_ptr is not None:
        z = z * tl.load(global_ptr)
    if row_scales_ptr is not None:
        z = z * tl.load(row_scales_ptr + rows, mask=rows < m, other=0.0)[None, :]
    return tl.trans(z)


@triton.jit
def quantized_linear_kernel(
    x_ptr,
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    global_ptr,
    row_scales_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    preactivation_ptr,
    partial_ptr,
    sums_ptr,
    x_strides,
    residual_strides,
    y_strides,
    preactivation_strides,
    bias_stride,
    sizes,
    m,
    n,
    k,
    row_bytes,
    groups,
    chunks,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    FOUR_BIT: tl.constexpr,
    ELEMENT: tl.constexpr,
    ZERO: tl.constexpr,
    SCALES: tl.constexpr,
    PLACE: tl.constexpr,
    GROUP: tl.constexpr,
    STORED: tl.constexpr,
    OPERAND: tl.constexpr,
    SUM: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """GROUP: elements of a group, 0 for whole rows. STORED: what the bytes of packed are read as; OPERAND: the dtype on
    the matrix units; SUM: that of their sums."""
    pid = tl.program_id(0)
    split = pid % SPLIT_K
    pid = pid // SPLIT_K
    tile_m, tile_n = tile_position(pid, tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row_mask = rows < m
    col_mask = cols < n
    x_at = x_ptr + loop_offset(rows, sizes, x_strides)
    x_step = tl.cast(x_strides[4], tl.int64) if WIDE else x_strides[4]
    code_at = packed_ptr.to(tl.pointer_type(STORED))
    code_at += (cols.to(tl.int64) * row_bytes)[:, None] + tl.arange(0, CHUNK)[None, :]
    scales_at = scales_ptr + cols.to(tl.int64) * groups
    zeros_at = scales_at
    if zeros_ptr is not None:
        zeros_at = zeros_ptr + cols.to(tl.int64) * groups
    TOTAL: tl.constexpr = SUM if PLACE == "end" else tl.float32
    FLOAT_ZERO: tl.constexpr = ZERO == "float" and PLACE != "early"
    PARTS: tl.constexpr = CHUNK // GROUP if GROUP > 0 and GROUP < CHUNK else 1
    RUNS: tl.constexpr = 2 if FOUR_BIT else 1
    # both runs of a step in one group
    JOINED: tl.constexpr = FOUR_BIT and (GROUP == 0 or GROUP >= 128)
    acc = tl.zeros([BLOCK_N, BLOCK_M], TOTAL)
    sums = tl.zeros([BLOCK_M], SUM)
    span = tl.cdiv(chunks, SPLIT_K)
    first = split * span
    for chunk in range(first, tl.minimum(chunks, first + span)):
        byte = chunk * CHUNK
        if FOUR_BIT:
            start = byte // 64 * 128 + byte % 64
            code = tl.load(code_at + byte, mask=col_mask[:, None], other=0)
        else:
            start = byte
            if EVEN_K:
                if EVEN_N:
                    code = tl.load(code_at + byte)
                else:
                    code = tl.load(code_at + byte, mask=col_mask[:, None], other=0.0)
            else:
                here = byte + tl.arange(0, CHUNK) < k
                code = tl.load(code_at + byte, mask=col_mask[:, None] & here[None, :], other=0.0)
        part = tl.zeros([BLOCK_N, BLOCK_M], SUM)
        part_sums = tl.zeros([BLOCK_M], SUM)
        for run in tl.static_range(RUNS):
            at = start + 64 * run
            x = x_tile(x_at, x_step, at, k, row_mask, CHUNK, EVEN_K, OPERAND)
            group = at // GROUP if GROUP > 0 else 0
            if code.dtype == OPERAND:
                value = code
                scale = tl.full([BLOCK_N], 1.0, tl.float32)
                if PLACE == "late":
                    scale = scale_value(tl.load(scales_at + group, mask=col_mask, other=0), SCALES)
            else:
                half = code
                if FOUR_BIT:
                    half = code >> 4 if run == 1 else code & 15
                inside = col_mask
                if GROUP > 0:
                    inside = col_mask & (group + tl.zeros_like(cols) < groups)
                value, scale = weight_value(
                    half, scales_at, zeros_at, group, groups, inside, ELEMENT, ZERO, SCALES, PLACE, PARTS, OPERAND
                )
            if PLACE == "late":
                part = tl.dot(value, x, part, input_precision=PRECISION, out_dtype=SUM)
                if FLOAT_ZERO:
                    part_sums += tl.sum(x.to(SUM), axis=0)
                if run == RUNS - 1 or not JOINED:
                    acc += part.to(tl.float32) * scale[:, None]
                    if FLOAT_ZERO:
                        zero = tl.load(zeros_at + group, mask=inside, other=0.0).to(tl.float32)
                        acc += zero[:, None] * part_sums.to(tl.float32)[None, :]
                        part_sums = tl.zeros([BLOCK_M], SUM)
                    part = tl.zeros([BLOCK_N, BLOCK_M], SUM)
            else:
                # Hopper sums e4m3 products to 14 bits or so within one instruction, and only that far here
                acc = tl.dot(
                    value,
                    x,
                    acc,
                    input_precision=PRECISION,
                    out_dtype=SUM,
                    max_num_imprecise_acc=CHUNK if value.dtype == tl.float8e4nv else None,
                )
                if FLOAT_ZERO:
                    sums += tl.sum(x.to(SUM), axis=0)
    if SPLIT_K == 1:
        z = finish(acc, sums, scales_ptr, zeros_ptr, global_ptr, row_scales_ptr, cols, rows, n, m, groups, PLACE,
                   SCALES, ELEMENT == "e2m1", FLOAT_ZERO)  # fmt: skip
        residual_base = residual_ptr
        preactivation_base = preactivation_ptr
        if residual_ptr is not None:
            residual_base = residual_ptr + loop_offset(rows, sizes, residual_strides)[:, None]
        if preactivation_ptr is not None:
            preactivation_base = preactivation_ptr + loop_offset(rows, sizes, preactivation_strides)[:, None]
        store_epilogue(
            z,
            bias_ptr,
            residual_base,
            y_ptr + loop_offset(rows, sizes, y_strides)[:, None],
            preactivation_base,
            residual_strides,
            y_strides,
            preactivation_strides,
            bias_stride,
            rows,
            cols,
            m,
            n,
            ACTIVATION,
            WIDE,
        )
    else:
        at = ((split.to(tl.int64) * m + rows) * n)[None, :] + cols[:, None]
        tl.store(partial_ptr + at, acc, mask=row_mask[None, :] & col_mask[:, None])
        if FLOAT_ZERO and tile_n == 0:
            tl.store(sums_ptr + split.to(tl.int64) * m + rows, sums, mask=row_mask)


@triton.jit
def quantized_linear_combine_kernel(
    partial_ptr,
    sums_ptr,
    scales_ptr,
    zeros_ptr,
    global_ptr,
    row_scales_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    preactivation_ptr,
    residual_strides,
    y_strides,
    preactivation_strides,
    bias_stride,
    sizes,
    m,
    n,
    groups,
    ACTIVATION: tl.constexpr,
    SCALES: tl.constexpr,
    PLACE: tl.constexpr,
    HALVED: tl.constexpr,
    FLOAT_ZERO: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the SPLIT_K partial sums in order, then what follows the sum."""
    tiles_n = tl.cdiv(n, BLOCK_N)
    rows = (tl.program_id(0) // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = (rows.to(tl.int64) * n)[None, :] + cols[:, None]
    mask = (rows < m)[None, :] & (cols < n)[:, None]
    step = tl.cast(m, tl.int64) * n
    acc = tl.zeros([BLOCK_N, BLOCK_M], partial_ptr.dtype.element_ty)
    sums = tl.zeros([BLOCK_M], sums_ptr.dtype.element_ty if FLOAT_ZERO else tl.float32)
    for part in range(SPLIT_K):
        acc += tl.load(partial_ptr + part * step + at, mask=mask, other=0)
        if FLOAT_ZERO:
            sums += tl.load(sums_ptr + tl.cast(part, tl.int64) * m + rows, mask=rows < m, other=0)
    z = finish(acc, sums, scales_ptr, zeros_ptr, global_ptr, row_scales_ptr, cols, rows, n, m, groups, PLACE, SCALES,
               HALVED, FLOAT_ZERO)  # fmt: skip
    residual_base = residual_ptr
    preactivation_base = preactivation_ptr
    if residual_ptr is not None:
        residual_base = residual_ptr + loop_offset(rows, sizes, residual_strides)[:, None]
    if preactivation_ptr is not None:
        preactivation_base = preactivation_ptr + loop_offset(rows, sizes, preactivation_strides)[:, None]
    store_epilogue(
        z,
        bias_ptr,
        residual_base,
        y_ptr + loop_offset(rows, sizes, y_strides)[:, None],
        preactivation_base,
        residual_strides,
        y_strides,
        preactivation_strides,
        bias_stride,
        rows,
        cols,
        m,
        n,
        ACTIVATION,
        WIDE,
    )


@triton.jit
def quantize_rows_kernel(
    x_ptr,
    q_ptr,
    row_scales_ptr,
    x_strides,
    sizes,
    m,
    k,
    q_stride,
    FLOATING: tl.constexpr,
    LEAST: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """q = x * (top / amax) to the nearest, row_scale = amax / top; each step the one IEEE operation of the contract.

    Rows with NaN or infinity: q = 0, scale NaN. q's rows are filled up to q_stride with 0.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    row_mask = rows < m
    at = x_ptr + loop_offset(rows, sizes, x_strides)[:, None]
    step = tl.cast(x_strides[4], tl.int64) if WIDE else x_strides[4]
    TOP: tl.constexpr = 448.0 if FLOATING else 127.0
    top = tl.full([BLOCK_R], TOP, tl.float32)
    most = tl.zeros([BLOCK_R], tl.int32)
    for start in range(0, k, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = tl.load(at + (inner * step)[None, :], mask=row_mask[:, None] & (inner < k)[None, :], other=0.0)
        # bits of magnitudes are ordered as the magnitudes, with NaN above all
        most = tl.maximum(most, tl.max(x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF, axis=1))
    finite = most < 0x7F800000
    amax = tl.maximum(tl.where(finite, most, 0x3F800000).to(tl.float32, bitcast=True), LEAST)
    factor = tl.div_rn(top, amax)
    tl.store(row_scales_ptr + rows, tl.where(finite, tl.div_rn(amax, top), float("nan")), mask=row_mask)
    for start in range(0, q_stride, BLOCK_K):
        inner = start + tl.arange(0, BLOCK_K)
        x = tl.load(at + (inner * step)[None, :], mask=row_mask[:, None] & (inner < k)[None, :], other=0.0)
        v = tl.where(finite[:, None], x.to(tl.float32), 0.0) * factor[:, None]
        # the clamp changes no value; it keeps the product from being fused with what follows, which would round once
        v = tl.minimum(tl.maximum(v, -TOP), TOP)
        if FLOATING:
            q = e4m3_code(v)
            if q_ptr.dtype.element_ty != tl.uint8:
                q = q.to(tl.float8e4nv, bitcast=True)
        else:
            # 1.5 * 2**23 leaves whole numbers, ties to even, in the low byte
            q = (v + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
        mask = row_mask[:, None] & (inner < q_stride)[None, :]
        tl.store(q_ptr + rows[:, None] * q_stride + inner[None, :], q, mask=mask)


@triton.jit
def dequantize_kernel(
    packed_ptr,
    scales_ptr,
    zeros_ptr,
    global_ptr,
    weight_ptr,
    n,
    k,
    row_bytes,
    groups,
    weight_stride,
    FOUR_BIT: tl.constexpr,
    ELEMENT: tl.constexpr,
    ZERO: tl.constexpr,
    SCALES: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """weight [n, k] in its pointer's dtype, each element rounded once."""
    chunks = tl.cdiv(row_bytes, CHUNK)
    cols = (tl.program_id(0) // chunks) * BLOCK_N + tl.arange(0, BLOCK_N)
    byte = (tl.program_id(0) % chunks) * CHUNK
    col_at = cols.to(tl.int64)
    col_mask = cols < n
    inner = byte + tl.arange(0, CHUNK)
    code = tl.load(
        packed_ptr + (col_at * row_bytes)[:, None] + inner[None, :],
        mask=col_mask[:, None] & (inner < row_bytes)[None, :],
        other=0,
    )
    zeros_at = scales_ptr + col_at * groups
    if zeros_ptr is not None:
        zeros_at = zeros_ptr + col_at * groups
    RUNS: tl.constexpr = 2 if FOUR_BIT else 1
    PARTS: tl.constexpr = CHUNK // GROUP if GROUP > 0 and GROUP < CHUNK else 1
    start = byte
    if FOUR_BIT:
        start = byte // 64 * 128 + byte % 64
    for run in tl.static_range(RUNS):
        at = start + 64 * run
        group = at // GROUP if GROUP > 0 else 0
        half = code
        if FOUR_BIT:
            half = code >> 4 if run == 1 else code & 15
        inside = col_mask
        if GROUP > 0:
            inside = col_mask & (group + tl.zeros_like(cols) < groups)
        value, _ = weight_value(
            half, scales_ptr + col_at * groups, zeros_at, group, groups, inside, ELEMENT, ZERO, SCALES, "early", PARTS,
            tl.float32,
        )  # fmt: skip
        if ELEMENT == "e2m1":
            value = value * 0.5
        if global_ptr is not None:
            value = value * tl.load(global_ptr)
        place = at + tl.arange(0, CHUNK)
        tl.store(
            weight_ptr + (col_at * weight_stride)[:, None] + place[None, :],
            value.to(weight_ptr.dtype.element_ty),
            mask=col_mask[:, None] & (place < k)[None, :],
        )


@dataclass(frozen=True)
class Format:
    """What a kernel needs to know of a scheme. `dynamic`: the dtype to which x is quantised, or None."""

    bits: int
    element: str
    dynamic: torch.dtype | None = None
    scales: str = "float"


#: By the scheme's index in the kernel form.
FORMATS = (
    Format(8, "int8"),
    Format(8, "int8", torch.int8),
    Format(4, "int4"),
    Format(4, "int4", torch.int8),
    Format(8, "e4m3", torch.float8_e4m3fn),
    Format(4, "e2m1", scales="e8m0"),
    Format(4, "e2m1", scales="e4m3"),
)
LEAST_AMAX = 2.0**-100
RUN = 128  # elements in 64 bytes of a four-bit row

# (BLOCK_M, BLOCK_N, warps, stages, share of peak that a full machine of such tiles reaches); the last is for few rows.
TILES = {
    "hopper": (
        (128, 128, 8, 3, 0.75),
        (64, 128, 4, 4, 0.6),
        (32, 64, 4, 4, 0.3),
        (16, 64, 4, 4, 0.15),
    ),
    "blackwell": (
        (128, 128, 8, 3, 0.6),
        (64, 128, 4, 4, 0.45),
        (32, 64, 4, 4, 0.2),
        (16, 64, 4, 4, 0.1),
    ),
    "ampere": ((128, 128, 8, 3, 0.8), (64, 64, 4, 3, 0.55), (32, 64, 4, 4, 0.35), (16, 64, 4, 4, 0.2)),
    "consumer": ((64, 128, 8, 2, 0.8), (64, 64, 4, 3, 0.65), (32, 64, 4, 3, 0.4), (16, 64, 4, 4, 0.25)),
    "cdna": ((128, 128, 8, 1, 0.8), (64, 128, 4, 1, 0.6), (32, 64, 4, 2, 0.35), (16, 64, 4, 2, 0.15)),
    "float32": ((64, 64, 8, 2, 1.0), (32, 64, 4, 2, 0.7), (16, 64, 4, 2, 0.4)),
    "interpreter": ((64, 64, 4, 1, 1.0), (16, 64, 4, 1, 0.2)),
}
#: Multiply-adds of 16-bit numbers that the matrix units do while memory moves one byte.
INTENSITY = {"hopper": 148, "blackwell": 140, "ampere": 80, "consumer": 82, "cdna": 123}


def modelled(m, n, k, depth, family, sms):
    """[(cycles, config), ...] of the family's tiles with k whole or split; `depth`: elements of k that a step takes."""
    found, steps = [], triton.cdiv(k, depth)
    for bm, bn, warps, stages, share in TILES[family]:
        if bm > 16 and bm >= 2 * next_power(m):
            continue
        grid = triton.cdiv(m, bm) * triton.cdiv(n, bn)
        for split in (1, 2, 4, 8, 16):
            if split > 1 and (grid * split > 4 * sms or steps // split < 4):
                break
            waves = triton.cdiv(grid * split, sms)
            # as in matmul.py: the matrix units at their share, each program's start and end, and for a split the launch
            # and the bytes of the second kernel
            time = waves * (bm * bn * depth * triton.cdiv(steps, split) / (2048 * share) + 2500)
            if split > 1:
                time += 5000 + 8.0 * m * n * split / min(sms, m * n // 2048 + 1) / 16
            found.append((time, _config(bm, bn, split, warps, stages)))
    return cheapest(found)


def _config(bm, bn, split, warps, stages):
    return {"BLOCK_M": bm, "BLOCK_N": bn, "GROUP_M": 8, "SPLIT_K": split, "num_warps": warps, "num_stages": stages}


def choose(m, n, k, depth, family, sms, invariant=False):
    """The configuration with the least modelled time."""
    if invariant:  # rows must not depend on how many there are: one tile, no split
        bm, bn, warps, stages, _ = TILES[family][0]
        return _config(bm, bn, 1, warps, stages)
    if m > 16 or family == "float32":
        return modelled(m, n, k, depth, family, sms)[0][1]
    # bandwidth: slices of k until all multiprocessors are busy, each long enough to stream
    bm, bn, warps, stages, _ = TILES[family][-1]
    split = 1
    while triton.cdiv(n, bn) * split < 1.5 * sms and triton.cdiv(k, depth) // (2 * split) >= 4:
        split *= 2
    return _config(bm, bn, split, warps, stages)


def step_bytes(how, group, itemsize):
    """Bytes of a weight row that a step takes; `itemsize`: of an element on the matrix units."""
    if how.bits == 4:
        return 32 if group == 32 else 64
    if how.dynamic is not None and group:
        return group  # a group's integers are summed before its scale
    return min(128 // itemsize, group or 128)


def format_constants(how, group, zeros, itemsize):
    """What all kernels must know of a weight; `itemsize`: of an element on the matrix units."""
    zero = "none"
    if how.element == "int4":
        zero = "middle" if zeros is None else "integer" if zeros.dtype == torch.uint8 else "float"
    return {
        "FOUR_BIT": how.bits == 4,
        "ELEMENT": how.element,
        "ZERO": zero,
        "SCALES": how.scales,
        "GROUP": group,
        "CHUNK": step_bytes(how, group, itemsize),
    }


def dequantize_launch(packed, scales, zeros, global_scale, weight, k, constants):
    """The weight [n, k] in the dtype and the rows of `weight`."""
    n, row_bytes = packed.shape
    return Launch(
        dequantize_kernel,
        (triton.cdiv(n, 32) * triton.cdiv(row_bytes, constants["CHUNK"]),),
        (packed, scales, zeros, global_scale, weight, n, k, row_bytes, scales.shape[1], weight.shape[1]),
        {**constants, "BLOCK_N": 32, "num_warps": 4},
    )


def problem(
    x, packed, scales, zeros=None, global_scale=None, bias=None, residual=None, y=None, preactivation=None, *,
    scheme, group_size, activation=0, allow_tf32=False,
):  # fmt: skip
    """What a tuned configuration depends on: words and truths must be equal, numbers near."""
    return {
        "dtype": dtype_name(x.dtype),
        "tf32": bool(allow_tf32),
        "scheme": f"{int(scheme)} in groups of {int(group_size)}",
        "zeros": "none" if zeros is None else dtype_name(zeros.dtype),
        "m": y.numel() // max(1, y.shape[-1]),
        "n": y.shape[-1],
        "k": x.shape[-1],
    }


def candidates(problem, device):
    """[(modelled cycles, config), ...] for `isotile tune`, least first."""
    m, n, k = (problem[name] for name in ("m", "n", "k"))
    scheme, group = (int(word) for word in problem["scheme"].split(" in groups of "))
    how, family, sms = FORMATS[scheme], product_kernels.family(), units(device)
    itemsize = getattr(torch, problem["dtype"]).itemsize if how.dynamic is None else how.dynamic.itemsize
    depth = step_bytes(how, max(0, group), itemsize) * (8 // how.bits)
    if problem["dtype"] == "float32" and not problem["tf32"] and how.dynamic is None:
        family = "float32"
    found = [
        # ties stay in the order of the family's own choice
        (time * (1.0 + 0.01 * (more != 0)), {**config, "num_stages": max(1, config["num_stages"] + more)})
        for time, config in modelled(m, n, k, depth, family, sms)
        for more in (0, 1, -1)
    ]
    if m <= 16:
        for bn, warps, stages in ((32, 2, 6), (32, 4, 4), (64, 4, 6), (128, 4, 4), (128, 8, 3)):
            for split in (1, 2, 4, 8, 16):
                if split == 1 or triton.cdiv(k, depth) // split >= 2:
                    waves = max(triton.cdiv(n, bn) * split / (2 * sms), 1.0)
                    time = waves * (bn * k / split / 16 + 2500) + 5000 * (split > 1)
                    found.append((time, _config(16, bn, split, warps, stages)))
    elif how.dynamic is None and problem["dtype"] == "bfloat16" and family in INTENSITY:
        product_cycles = product_kernels.candidates(
            {"dtype": "bfloat16", "tf32": False, "loaded": False, "batch": 1, "m": m, "n": n, "k": k}, device
        )[0][0]
        moved = n * k * (how.bits / 8 + 2) * INTENSITY[family] / (2048 * sms)
        found.append((product_cycles + moved + 5000, {"dense": True}))
    return cheapest(found)


def has_e4m3():
    """Whether the target's matrix units multiply e4m3 (the OCP format; gfx942 has another)."""
    kind, arch = architecture()
    return arch == "gfx950" if kind == "hip" else kind == "interpreter" or arch >= 89


def supports(
    x, packed, scales, zeros=None, global_scale=None, bias=None, residual=None, y=None, preactivation=None, *,
    scheme, group_size, activation=0, allow_tf32=False,
):  # fmt: skip
    views = {"x": x, "bias": bias, "residual": residual, "y": y, "preactivation": preactivation}
    return refuse_dtypes(views) or refuse_loops([x, residual, y, preactivation], [1] * 4)


def prepare(
    x, packed, scales, zeros=None, global_scale=None, bias=None, residual=None, y=None, preactivation=None, *,
    scheme, group_size, activation=0, allow_tf32=False, config=None,
):  # fmt: skip
    """config: numbers of the tile; "dense": True or False decides whether the weight is dequantised first;
    "e4m3": False multiplies fp8 as float16; "batch_invariant" asks for one tile shape and no split whatever the size.
    """
    if y.numel() == 0:
        return []
    how, group = FORMATS[int(scheme)], max(0, int(group_size))
    n, k = y.shape[-1], x.shape[-1]
    sizes, strides = loops([x, residual, y, preactivation], [1] * 4)
    # rows are one index over the loops: stride 0 where the tile helpers expect that of rows
    x_strides, *out_strides = (
        (*s, 0, v.strides[-1] if v is not None else 0)
        for s, v in zip(strides, (x, residual, y, preactivation), strict=True)
    )
    m = product(sizes)
    config, invariant = read_config(config)
    dense, native = config.pop("dense", None), config.pop("e4m3", has_e4m3())
    tf32 = bool(allow_tf32) and architecture()[0] == "cuda"
    family = product_kernels.family()
    # what a column of the weight is: dtype of x on the matrix units, zero points, steps along k
    if how.dynamic is None:
        operand = x.dtype
    else:
        operand = how.dynamic if how.element != "e4m3" or native else torch.float16
    common = format_constants(how, group, zeros, operand.itemsize)
    zero, chunk = common["ZERO"], common["CHUNK"]
    if dense is None:
        dense = (
            how.dynamic is None
            and not invariant
            and x.dtype == torch.bfloat16
            and family in INTENSITY
            and sizes[0] * sizes[1] == 1
            and m * (1 / TILES[family][0][-1] - 1) > INTENSITY[family] * (how.bits / 8 + 2)
        )
    row_bytes, groups = packed.shape[1], scales.shape[1]
    if dense and how.dynamic is None:
        return dense_launches(
            x, packed, scales, zeros, global_scale, bias, residual, y, preactivation, sizes, n, k,
            (x_strides, *out_strides), int(activation), tf32, invariant, common,
        )  # fmt: skip
    exact = operand == torch.float32 and not tf32
    depth = chunk * (8 // how.bits)
    meta = override(
        choose(m, n, k, depth, "float32" if exact and family != "interpreter" else family, units(x.device), invariant),
        config,
    )
    if group == 16:
        place = "early"  # exact in every dtype
    elif how.dynamic is not None or x.dtype == torch.float16:
        place = "late" if group else "end"  # float16 holds q - zero, but not what every scale makes of it
    elif zero == "float":
        place = "early"
    elif not group:
        place = "end"
    else:
        place = "late" if meta["BLOCK_M"] <= 32 else "early"
    launches, rows, row_scales = [], x, None
    if how.dynamic is not None:
        width = max(triton.cdiv(k, RUN), 1) * RUN
        rows = Scratch((m, width), torch.uint8 if operand == torch.float16 else operand)
        row_scales = Scratch((m,), torch.float32)
        block_k = min(next_power(width), 8192)
        block_r = max(1, 2048 // block_k)
        launches.append(
            Launch(
                quantize_rows_kernel,
                (triton.cdiv(m, block_r),),
                (x, rows, row_scales, x_strides, sizes, m, k, width),
                {
                    "FLOATING": how.element == "e4m3",
                    "LEAST": LEAST_AMAX,
                    "WIDE": (k + block_k) * x_strides[4] >= 2**31,
                    "BLOCK_R": block_r,
                    "BLOCK_K": block_k,
                    "num_warps": 4 if block_k * block_r <= 4096 else 8,
                },
            )
        )
        x_strides = (sizes[1] * sizes[2] * width, sizes[2] * width, width, 0, 1)
    split = meta["SPLIT_K"]
    float_zero = zero == "float" and place != "early"
    whole_sums = operand == torch.int8 and place == "end"
    partial = sums = None
    if split > 1:
        partial = Scratch((split, m, n), torch.int32 if whole_sums else torch.float32)
        sums = Scratch((split, m), torch.int32 if operand == torch.int8 else torch.float32) if float_zero else None
    bias_stride = bias.strides[0] if bias is not None else 0
    is_wide = any((size + 256) * s[4] >= 2**31 for size, s in ((k, x_strides), *((n, s) for s in out_strides)))
    is_wide = is_wide or (n + 256) * bias_stride >= 2**31
    tiles = triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"])
    if tiles * split > MAX_GRID:
        raise ValueError(f"{tiles * split} tiles exceed the grid")
    launches.append(
        Launch(
            quantized_linear_kernel,
            (tiles * split,),
            (
                rows, packed, scales, zeros, global_scale, row_scales, bias, residual, y, preactivation, partial, sums,
                x_strides, *out_strides, bias_stride, sizes, m, n, k, row_bytes, groups, triton.cdiv(row_bytes, chunk),
            ),
            {
                "ACTIVATION": int(activation),
                "PRECISION": "tf32" if tf32 and operand == torch.float32 else "ieee",
                "PLACE": place,
                "STORED": OPERANDS[operand] if how.bits == 8 and how.dynamic == operand else tl.uint8,
                "OPERAND": OPERANDS[operand],
                "SUM": tl.int32 if operand == torch.int8 else tl.float32,
                "EVEN_N": n % meta["BLOCK_N"] == 0,
                # the runs of a four-bit step lie 64 apart: the second may be beyond k though k is whole steps
                "EVEN_K": k % (RUN if how.bits == 4 else depth) == 0 or (how.dynamic is not None and how.bits == 4),
                "WIDE": is_wide,
                **common,
                **meta,
            },
        )
    )  # fmt: skip
    if split > 1:
        block_m, block_n = min(next_power(m), 16), 128
        launches.append(
            Launch(
                quantized_linear_combine_kernel,
                (triton.cdiv(m, block_m) * triton.cdiv(n, block_n),),
                (
                    partial, sums, scales, zeros, global_scale, row_scales, bias, residual, y, preactivation,
                    *out_strides, bias_stride, sizes, m, n, groups,
                ),
                {
                    "ACTIVATION": int(activation),
                    "SCALES": how.scales,
                    "PLACE": place,
                    "HALVED": how.element == "e2m1",
                    "FLOAT_ZERO": float_zero,
                    "SPLIT_K": split,
                    "WIDE": is_wide,
                    "BLOCK_M": block_m,
                    "BLOCK_N": block_n,
                    "num_warps": 4,
                },
            )
        )  # fmt: skip
    return launches


def dense_launches(
    x, packed, scales, zeros, global_scale, bias, residual, y, preactivation, sizes, n, k, strides,
    activation, tf32, invariant, common,
):  # fmt: skip
    """The weight in x's dtype, then matmul.py's kernels."""
    stride = triton.cdiv(max(k, 1), 8) * 8
    weight = Scratch((n, stride), x.dtype)
    unpack = dequantize_launch(packed, scales, zeros, global_scale, weight, k, common)
    # the innermost loop is m, the others are a batch that shares the weight
    shifted = [(0, *s[:3], s[4]) for s in strides]
    product_launches = product_kernels.folded_launches(
        x, weight, bias, residual, y, preactivation, (1, *sizes[:2]), sizes[2], n, k,
        [shifted[0], (0, 0, 0, 1, stride), *shifted[1:]], activation, tf32,
        {"batch_invariant": invariant},
    )  # fmt: skip
    return [unpack, *product_launches]


OPERANDS = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.float8_e4m3fn: tl.float8e4nv,
}
