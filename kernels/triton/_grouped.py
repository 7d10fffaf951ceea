"""Grouped products, shared by grouped_matmul and its backward.

Row groups end at offsets[g]; nobody on the host knows where. The grid is the most tiles that any offsets can need: each
program counts the tiles of the groups before it and finds its own. Rows past the last offset are one more group, of
zeros. A weight gradient is one program a tile and group, which walks the group's rows in order.
"""

import torch

import triton
import triton.language as tl

from ._launch import Descriptor, Launch
from ._layout import architecture, cheapest, dtype_name, next_power, override, read_config
from ._tiles import tile_position


@triton.jit
def _group_bounds(offsets_ptr, offsets_stride, groups, rows, BLOCK_G: tl.constexpr):
    """Start and end row of each group, the rest as one more group after the last."""
    index = tl.arange(0, BLOCK_G)
    end = tl.load(offsets_ptr + index * offsets_stride, mask=index < groups, other=0).to(tl.int32)
    end = tl.where(index < groups, tl.minimum(tl.maximum(end, 0), rows), rows)
    start = tl.load(offsets_ptr + (index - 1) * offsets_stride, mask=(index > 0) & (index <= groups), other=0).to(
        tl.int32
    )
    start = tl.where(index <= groups, tl.minimum(tl.maximum(start, 0), rows), rows)
    return index, start, tl.maximum(end, start)


@triton.jit
def grouped_rows_kernel(
    a_source,
    b_source,
    offsets_ptr,
    y_ptr,
    a_strides,
    b_strides,
    y_strides,
    offsets_stride,
    rows,
    groups,
    n,
    k,
    DESCRIPTORS: tl.constexpr,
    B_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    MIXED: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """y[rows of g] = a[rows of g] @ b[g]."""
    index, start, end = _group_bounds(offsets_ptr, offsets_stride, groups, rows, BLOCK_G)
    tiles = tl.cdiv(end - start, BLOCK_M)
    before = tl.cumsum(tiles, axis=0)
    tiles_n = tl.cdiv(n, BLOCK_N)
    tile_m, tile_n = tile_position(tl.program_id(0), tl.num_programs(0) // tiles_n, tiles_n, GROUP_M)
    group = tl.sum((before <= tile_m).to(tl.int32), axis=0)
    if group <= groups:
        mine = index == group
        first = tl.sum(tl.where(mine, start + (tile_m - before + tiles) * BLOCK_M, 0), axis=0)
        last = tl.sum(tl.where(mine, end, 0), axis=0)
        row = first + tl.arange(0, BLOCK_M)
        col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        row_at = row.to(tl.int64) if WIDE else row
        col_at = col.to(tl.int64) if WIDE else col
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        depth = tl.where(group < groups, k, 0)
        for begin in range(0, depth, BLOCK_K):
            if DESCRIPTORS:
                a = a_source.load([first, begin])
                if B_TRANSPOSED:
                    b = tl.reshape(b_source.load([group, tile_n * BLOCK_N, begin]), (BLOCK_N, BLOCK_K)).T
                else:
                    b = tl.reshape(b_source.load([group, begin, tile_n * BLOCK_N]), (BLOCK_K, BLOCK_N))
            else:
                inner = begin + tl.arange(0, BLOCK_K)
                inner_at = inner.to(tl.int64) if WIDE else inner
                a_at = a_source + row_at[:, None] * a_strides[0] + inner_at[None, :] * a_strides[1]
                b_at = (
                    b_source
                    + group.to(tl.int64) * b_strides[0]
                    + (inner_at[:, None] * b_strides[1] + col_at[None, :] * b_strides[2])
                )
                if EVEN_K:
                    a = tl.load(a_at, mask=(row < last)[:, None], other=0.0)
                    b = tl.load(b_at, mask=(col < n)[None, :], other=0.0)
                else:
                    a = tl.load(a_at, mask=(row < last)[:, None] & (inner < k)[None, :], other=0.0)
                    b = tl.load(b_at, mask=(inner < k)[:, None] & (col < n)[None, :], other=0.0)
            if MIXED:
                a, b = a.to(tl.float32), b.to(tl.float32)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
        tl.store(
            y_ptr + row_at[:, None] * y_strides[0] + col_at[None, :] * y_strides[1],
            acc.to(y_ptr.dtype.element_ty),
            mask=(row < last)[:, None] & (col < n)[None, :],
        )


@triton.jit
def grouped_weights_kernel(
    a_ptr,
    grad_ptr,
    offsets_ptr,
    grad_b_ptr,
    a_strides,
    grad_strides,
    grad_b_strides,
    offsets_stride,
    rows,
    groups,
    k,
    n,
    PRECISION: tl.constexpr,
    MIXED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """grad_b[g] = a[rows of g]^T @ grad[rows of g]; BLOCK_M over k, BLOCK_K over rows."""
    tiles_k, tiles_n = tl.cdiv(k, BLOCK_M), tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    group = pid // (tiles_k * tiles_n)
    tile_k, tile_n = tile_position(pid % (tiles_k * tiles_n), tiles_k, tiles_n, GROUP_M)
    end = tl.load(offsets_ptr + group * offsets_stride).to(tl.int32)
    start = tl.load(offsets_ptr + (group - 1) * offsets_stride, mask=group > 0, other=0).to(tl.int32)
    start = tl.minimum(tl.maximum(start, 0), rows)
    end = tl.minimum(end, rows)
    inner = tile_k * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inner_at = inner.to(tl.int64) if WIDE else inner
    col_at = col.to(tl.int64) if WIDE else col
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for begin in range(start, end, BLOCK_K):
        row = begin + tl.arange(0, BLOCK_K)
        row_at = row.to(tl.int64) if WIDE else row
        inside = row < end
        a = tl.load(
            a_ptr + inner_at[:, None] * a_strides[1] + row_at[None, :] * a_strides[0],
            mask=(inner < k)[:, None] & inside[None, :],
            other=0.0,
        )
        grad = tl.load(
            grad_ptr + row_at[:, None] * grad_strides[0] + col_at[None, :] * grad_strides[1],
            mask=inside[:, None] & (col < n)[None, :],
            other=0.0,
        )
        if MIXED:
            a, grad = a.to(tl.float32), grad.to(tl.float32)
        acc = tl.dot(a, grad, acc, input_precision=PRECISION)
    tl.store(
        grad_b_ptr
        + group.to(tl.int64) * grad_b_strides[0]
        + (inner_at[:, None] * grad_b_strides[1] + col_at[None, :] * grad_b_strides[2]),
        acc.to(grad_b_ptr.dtype.element_ty),
        mask=(inner < k)[:, None] & (col < n)[None, :],
    )


TILES = {  # BLOCK_M, BLOCK_N, BLOCK_K, warps, stages
    "hopper": (128, 128, 64, 8, 3),
    "ampere": (128, 128, 32, 8, 3),
    "consumer": (128, 64, 32, 4, 3),
    "cdna": (128, 128, 32, 4, 2),
    "float32": (64, 64, 16, 4, 2),
    "interpreter": (32, 64, 64, 4, 1),
}


def _family(*dtypes, tf32):
    kind, arch = architecture()
    if kind == "interpreter":
        return "interpreter"
    if len(set(dtypes)) > 1 or (dtypes[0] == torch.float32 and not tf32):
        return "float32"
    if kind == "hip":
        return "cdna"
    return {80: "ampere", 90: "hopper", 100: "hopper", 103: "hopper"}.get(arch, "consumer")


def _meta(config, a, b, tf32):
    bm, bn, bk, warps, stages = TILES[_family(a.dtype, b.dtype, tf32=tf32)]
    if a.dtype == torch.float32 and tf32:
        bk = max(bk // 2, 16)
    return override(
        {"BLOCK_M": bm, "BLOCK_N": bn, "BLOCK_K": bk, "GROUP_M": 8, "num_warps": warps, "num_stages": stages}, config
    )


def problem(rows, groups, n, k, dtype, allow_tf32):
    return {
        "dtype": dtype_name(dtype),
        "tf32": bool(allow_tf32),
        "rows": rows,
        "groups": groups,
        "n": n,
        "k": k,
    }


def candidates(problem, device):
    """[(modelled multiply-adds, config), ...]: what the last tile of each group wastes, over the tile's own speed."""
    dtype = getattr(torch, problem["dtype"])
    own = TILES[_family(dtype, tf32=problem["tf32"])]
    each = problem["rows"] / max(problem["groups"], 1)
    found = []
    for bm, bn, warps in ((128, 256, 8), (128, 128, 8), (128, 128, 4), (64, 256, 4), (64, 128, 4), (64, 64, 4)):
        speed = min(1.0, (bm * bn / (128 * 256)) ** 0.25)
        waste = (each + bm / 2) * (triton.cdiv(problem["n"], bn) * bn)
        for stages in (own[4], own[4] + 1):
            config = {"BLOCK_M": bm, "BLOCK_N": bn, "BLOCK_K": own[2], "num_warps": warps, "num_stages": stages}
            found.append((waste / speed, config))
    return cheapest(found)


def _wide(*views):
    return any(
        sum((size - 1) * abs(stride) for size, stride in zip(shape, strides, strict=True) if size) >= 2**31 - 2**24
        for shape, strides in views
    )


def rows_launch(a, b, b_strides, offsets, y, n, k, allow_tf32, config):
    """y = a @ b[g] by groups; `b_strides` (group, inner, column) may transpose b."""
    rows, groups = a.shape[0], offsets.shape[0]
    config, _ = read_config(config)
    forced = config.pop("descriptors", None)
    tf32 = bool(allow_tf32) and architecture()[0] == "cuda"
    meta = _meta(config, a, b, tf32)
    bm, bn, bk = meta["BLOCK_M"], meta["BLOCK_N"], meta["BLOCK_K"]
    mixed = a.dtype != b.dtype
    grid = (triton.cdiv(rows, bm) + groups + 1) * triton.cdiv(n, bn)
    constants = {
        "PRECISION": "tf32" if tf32 else "ieee",
        "MIXED": mixed,
        "EVEN_K": k % bk == 0,
        "WIDE": _wide((a.shape, a.strides), ((k, n), b_strides[1:]), (y.shape, y.strides)),
        "BLOCK_G": next_power(groups + 1, 16),
        **meta,
    }

    def launch(a_source, b_source, transposed, fallback=()):
        return Launch(
            grouped_rows_kernel,
            (grid,),
            (a_source, b_source, offsets, y, a.strides, b_strides, y.strides, offsets.strides[0], rows, groups, n, k),
            {**constants, "DESCRIPTORS": a_source is not a, "B_TRANSPOSED": transposed},
            fallback,
        )

    plain = launch(a, b, False)
    kind, arch = architecture()
    item = a.dtype.itemsize
    transposed = b_strides[2] != 1
    unit, step = (b_strides[1], b_strides[2]) if transposed else (b_strides[2], b_strides[1])
    fits = (
        ((kind == "cuda" and arch in (90, 100, 103)) or (forced and kind == "interpreter"))
        and forced is not False
        and not mixed
        and k > 0
        and groups > 0
        and a.strides[1] == 1
        and unit == 1
        and all(s > 0 and s * item % 16 == 0 for s in (a.strides[0], step, b_strides[0]))
        and (item < 4 or tf32 or forced)
    )
    if not fits:
        return plain
    a_desc = Descriptor(a, (rows, k), (a.strides[0], 1), (bm, bk))
    b_desc = Descriptor(
        b,
        (groups, n, k) if transposed else (groups, k, n),
        (b_strides[0], step, 1),
        (1, bn, bk) if transposed else (1, bk, bn),
    )
    return launch(a_desc, b_desc, transposed, (plain,))


def weights_launch(a, grad, offsets, grad_b, allow_tf32, config):
    groups, k, n = grad_b.shape
    config, _ = read_config(config)
    config.pop("descriptors", None)
    tf32 = bool(allow_tf32) and architecture()[0] == "cuda"
    meta = _meta(config, a, grad, tf32)
    grid = groups * triton.cdiv(k, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"])
    return Launch(
        grouped_weights_kernel,
        (grid,),
        (
            a,
            grad,
            offsets,
            grad_b,
            a.strides,
            grad.strides,
            grad_b.strides,
            offsets.strides[0],
            a.shape[0],
            groups,
            k,
            n,
        ),
        {
            "PRECISION": "tf32" if tf32 else "ieee",
            "MIXED": a.dtype != grad.dtype,
            "WIDE": _wide((a.shape, a.strides), (grad.shape, grad.strides), (grad_b.shape[1:], grad_b.strides[1:])),
            **meta,
        },
    )
