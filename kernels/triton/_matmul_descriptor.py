"""matmul through TMA descriptors with persistent programs, for Hopper and later; see matmul.py for the meaning.

Each of as many programs as multiprocessors walks tiles pid, pid + programs, ...; the loops are flattened so that the
loads of the next tile are in flight during this one's epilogue; the result leaves through a descriptor as well, which
stores in the background, where it is one matrix of such strides. A descriptor needs unit stride in one core dimension
and multiples of 16 bytes elsewhere; an operand that is not so is first copied to such scratch memory, if the
product is large enough to pay for it (a misaligned operand costs the pointer kernel several times its speed).
"""

import torch

import triton
import triton.language as tl

from ._launch import Descriptor, Launch, Scratch
from ._layout import architecture, units, wide
from ._tiles import epilogue, loop_offset, store_epilogue, tile_position


@triton.jit
def matmul_descriptor_kernel(
    a_desc,
    b_desc,
    y_desc,
    bias_ptr,
    residual_ptr,
    y_ptr,
    preactivation_ptr,
    residual_strides,
    y_strides,
    preactivation_strides,
    bias_stride,
    sizes,
    batch,
    m,
    n,
    k,
    a_rows,
    b_rows,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    WIDE: tl.constexpr,
    A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    PROGRAMS: tl.constexpr,
    HALVES: tl.constexpr,
):
    """a_rows, b_rows: rows of the stacked matrices that one matrix of the batch takes (0: shared)."""
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    each = tiles_m * tiles_n
    steps = tl.cdiv(k, BLOCK_K)
    for tile in tl.range(tl.program_id(0), each * batch, PROGRAMS, flatten=True):
        index = tile // each
        tile_m, tile_n = tile_position(tile % each, tiles_m, tiles_n, GROUP_M)
        a_top, b_top = index * a_rows, index * b_rows
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(steps):
            if A_TRANSPOSED:
                a = a_desc.load([a_top + step * BLOCK_K, tile_m * BLOCK_M]).T
            else:
                a = a_desc.load([a_top + tile_m * BLOCK_M, step * BLOCK_K])
            if B_TRANSPOSED:
                b = b_desc.load([b_top + tile_n * BLOCK_N, step * BLOCK_K]).T
            else:
                b = b_desc.load([b_top + step * BLOCK_K, tile_n * BLOCK_N])
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        residual_base = residual_ptr
        preactivation_base = preactivation_ptr
        if residual_ptr is not None:
            residual_base = residual_ptr + loop_offset(index, sizes, residual_strides)
        if preactivation_ptr is not None:
            preactivation_base = preactivation_ptr + loop_offset(index, sizes, preactivation_strides)
        PARTS: tl.constexpr = 2 if HALVES else 1
        if HALVES:
            # half of the columns at a time, so that the epilogue needs half of the registers
            parts = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
        else:
            parts = (acc,)
        for part in tl.static_range(PARTS):
            left = tile_n * BLOCK_N + part * (BLOCK_N // PARTS)
            cols = left + tl.arange(0, BLOCK_N // PARTS)
            if y_desc is not None:
                value = epilogue(
                    parts[part],
                    bias_ptr,
                    residual_base,
                    preactivation_base,
                    residual_strides,
                    preactivation_strides,
                    bias_stride,
                    rows,
                    cols,
                    m,
                    n,
                    ACTIVATION,
                    WIDE,
                )
                y_desc.store([tile_m * BLOCK_M, left], value.to(y_desc.dtype))
            else:
                store_epilogue(
                    parts[part],
                    bias_ptr,
                    residual_base,
                    y_ptr + loop_offset(index, sizes, y_strides),
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
def copy_rows_kernel(
    source_ptr,
    target_ptr,
    row_stride,
    col_stride,
    rows,
    cols,
    target_stride,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    WIDE: tl.constexpr,
):
    """target[r, c] = source[r, c], the target's rows padded to target_stride with zeros."""
    tiles = tl.cdiv(target_stride, BLOCK_C)
    r = (tl.program_id(0) // tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (tl.program_id(0) % tiles) * BLOCK_C + tl.arange(0, BLOCK_C)
    r_at = r.to(tl.int64) if WIDE else r
    c_at = c.to(tl.int64) if WIDE else c
    x = tl.load(
        source_ptr + r_at[:, None] * row_stride + c_at[None, :] * col_stride,
        mask=(r < rows)[:, None] & (c < cols)[None, :],
        other=0.0,
    )
    tl.store(
        target_ptr + r_at[:, None] * target_stride + c[None, :],
        x,
        mask=(r < rows)[:, None] & (c < target_stride)[None, :],
    )


def stacked(view, strides, sizes, rows, cols, shared):
    """How a descriptor can see the operand: (transposed, stride, stacked rows, rows a matrix) or None.

    `strides`: three loop strides, then row and column. Matrices of the batch stand below one another.
    """
    item = view.dtype.itemsize
    for transposed, r, c, step, unit in (
        (False, rows, cols, strides[3], strides[4]),
        (True, cols, rows, strides[4], strides[3]),
    ):
        if (c > 1 and unit != 1) or step * item % 16 or step < c:
            continue
        if shared:
            return transposed, step, r, 0
        if sizes[0] * sizes[1] == 1 and strides[2] == r * step:
            return transposed, step, r * sizes[2], r
    return None


def launches(
    a,
    b,
    bias,
    residual,
    y,
    preactivation,
    sizes,
    batch,
    m,
    n,
    k,
    strides,
    activation,
    tf32,
    meta,
    plain,
    forced,
    stored,
):
    """stored: whether the result leaves through a descriptor too, where that can serve (None: yes)."""
    kind, arch = architecture()
    hardware = kind == "cuda" and arch in (90, 100, 103, 120)
    if not (hardware or (forced and kind == "interpreter")) or k == 0:
        return None
    if a.dtype == torch.float32 and not tf32 and not forced:
        return None  # true float32 has no matrix instruction to feed
    if not forced and meta["BLOCK_M"] < 64:
        return None
    padded = []
    seen = []
    for view, s, rows, cols in ((a, strides[0], m, k), (b, strides[1], k, n)):
        shared = batch == 1 or not any(s[:3])
        how = stacked(view, s, sizes, rows, cols, shared)
        if how is None:
            if batch > 1 or (2 * m * n * k < 2**32 and not forced):
                return None
            # copy along the dimension that memory already favours
            transposed = s[3] == 1
            r, c = (cols, rows) if transposed else (rows, cols)
            step = triton.cdiv(c, 64) * 64
            scratch = Scratch((r, step), view.dtype)
            row_stride, col_stride = (s[4], s[3]) if transposed else (s[3], s[4])
            padded.append(
                Launch(
                    copy_rows_kernel,
                    (triton.cdiv(r, 16) * triton.cdiv(step, 256),),
                    (view, scratch, row_stride, col_stride, r, c, step),
                    {
                        "BLOCK_R": 16,
                        "BLOCK_C": 256,
                        "WIDE": wide((r, max(row_stride, step)), (c, col_stride)) or r * max(row_stride, step) >= 2**31,
                        "num_warps": 4,
                    },
                )
            )
            how, view = (transposed, step, r, 0), scratch
        if not how[0] and view is b and how[3] and k % meta["BLOCK_K"]:
            return None  # the tail of k would read the next matrix, times zeros that cannot hide NaN
        if how[0] and view is a and how[3] and k % meta["BLOCK_K"]:
            return None
        seen.append((view, how, rows, cols))
    (a_base, (a_t, a_step, a_rows, a_each), _, _), (b_base, (b_t, b_step, b_rows, b_each), _, _) = seen
    bm, bn, bk = meta["BLOCK_M"], meta["BLOCK_N"], meta["BLOCK_K"]
    a_desc = Descriptor(a_base, (a_rows, m if a_t else k), (a_step, 1), (bk, bm) if a_t else (bm, bk))
    b_desc = Descriptor(b_base, (b_rows, k if b_t else n), (b_step, 1), (bn, bk) if b_t else (bk, bn))
    halves = bm * bn >= 128 * 256
    y_desc = None
    if batch == 1 and stored is not False:
        how = stacked(y, strides[3], sizes, m, n, True)
        if how is not None and not how[0]:
            y_desc = Descriptor(y, (m, n), (how[1], 1), (bm, bn // 2 if halves else bn))
    tiles = batch * triton.cdiv(m, bm) * triton.cdiv(n, bn)
    programs = min(tiles, units(y.device))
    _, _, residual_strides, y_strides, preactivation_strides = strides
    is_wide = any((m - 1) * s[3] + (n - 1) * s[4] >= 2**31 - 2**20 for s in strides[2:])
    options = {name: meta[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "GROUP_M", "num_warps", "num_stages")}
    main = Launch(
        matmul_descriptor_kernel,
        (programs,),
        (
            a_desc,
            b_desc,
            y_desc,
            bias,
            residual,
            y,
            preactivation,
            residual_strides,
            y_strides,
            preactivation_strides,
            bias.strides[0] if bias is not None else 0,
            sizes,
            batch,
            m,
            n,
            k,
            a_each,
            b_each,
        ),
        {
            "ACTIVATION": activation,
            "PRECISION": "tf32" if tf32 else "ieee",
            "WIDE": is_wide,
            "A_TRANSPOSED": a_t,
            "B_TRANSPOSED": b_t,
            "PROGRAMS": programs,
            "HALVES": halves,
            **options,
        },
        fallback=tuple(plain),
    )
    return [*padded, main]
