"""y = activation(a @ b + bias) + residual, and optionally the preactivation a @ b + bias.

A program owns a BLOCK_M x BLOCK_N tile of one matrix of the batch and walks k; tiles are ordered in groups of GROUP_M
rows so that neighbours share b in the cache. When b is shared by the whole batch, the batch is folded into m. Products
accumulate in float32; everything after k happens on the accumulator, so the result is rounded once.

Few tiles (small m): k is split over SPLIT_K programs that write float32 partial products, and a second kernel adds
them in order and applies the epilogue. No atomics, so results repeat.

On Hopper and later, operands that a TMA descriptor can describe go through _matmul_descriptor.py.
"""

import torch

import triton
import triton.language as tl

from . import _matmul_descriptor
from ._launch import Launch, Scratch
from ._layout import (
    MAX_GRID,
    architecture,
    cheapest,
    dtype_name,
    loops,
    merge_loops,
    next_power,
    override,
    product,
    read_config,
    refuse_dtypes,
    refuse_loops,
    units,
    wide,
)
from ._tiles import loop_offset, store_epilogue, tile_position


@triton.jit
def matmul_kernel(
    a_ptr,
    b_ptr,
    bias_ptr,
    residual_ptr,
    y_ptr,
    preactivation_ptr,
    partial_ptr,
    a_strides,
    b_strides,
    residual_strides,
    y_strides,
    preactivation_strides,
    bias_stride,
    sizes,
    batch,
    m,
    n,
    k,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    EVEN_M: tl.constexpr,
    EVEN_N: tl.constexpr,
    EVEN_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    pid = tl.program_id(0)
    split = pid % SPLIT_K
    pid = pid // SPLIT_K
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    index = pid // (tiles_m * tiles_n)
    tile_m, tile_n = tile_position(pid % (tiles_m * tiles_n), tiles_m, tiles_n, GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    span = tl.cdiv(tl.cdiv(k, BLOCK_K), SPLIT_K) * BLOCK_K
    first = split * span
    last = tl.minimum(k, first + span)
    inner = first + tl.arange(0, BLOCK_K)
    row_at = rows.to(tl.int64) if WIDE else rows
    col_at = cols.to(tl.int64) if WIDE else cols
    inner_at = inner.to(tl.int64) if WIDE else inner
    a_at = (
        a_ptr
        + loop_offset(index, sizes, a_strides)
        + (row_at[:, None] * a_strides[3] + inner_at[None, :] * a_strides[4])
    )
    b_at = (
        b_ptr
        + loop_offset(index, sizes, b_strides)
        + (inner_at[:, None] * b_strides[3] + col_at[None, :] * b_strides[4])
    )
    a_step = BLOCK_K * tl.cast(a_strides[4], tl.int64) if WIDE else BLOCK_K * a_strides[4]
    b_step = BLOCK_K * tl.cast(b_strides[3], tl.int64) if WIDE else BLOCK_K * b_strides[3]
    a_mask = (rows < m)[:, None]
    b_mask = (cols < n)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(first, last, BLOCK_K):
        if EVEN_K:
            if EVEN_M:
                a = tl.load(a_at)
            else:
                a = tl.load(a_at, mask=a_mask, other=0.0)
            if EVEN_N:
                b = tl.load(b_at)
            else:
                b = tl.load(b_at, mask=b_mask, other=0.0)
        else:
            here = tl.arange(0, BLOCK_K) < last - start
            a = tl.load(a_at, mask=a_mask & here[None, :], other=0.0)
            b = tl.load(b_at, mask=here[:, None] & b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
        a_at += a_step
        b_at += b_step
    if SPLIT_K == 1:
        residual_base = residual_ptr
        preactivation_base = preactivation_ptr
        if residual_ptr is not None:
            residual_base = residual_ptr + loop_offset(index, sizes, residual_strides)
        if preactivation_ptr is not None:
            preactivation_base = preactivation_ptr + loop_offset(index, sizes, preactivation_strides)
        store_epilogue(
            acc,
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
    else:
        matrix = (split.to(tl.int64) * batch + index) * m
        at = (matrix + rows)[:, None] * n + cols[None, :]
        tl.store(partial_ptr + at, acc, mask=(rows < m)[:, None] & (cols < n)[None, :])


@triton.jit
def matmul_combine_kernel(
    partial_ptr,
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
    ACTIVATION: tl.constexpr,
    SPLIT_K: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Adds the SPLIT_K partial products in order, then the epilogue."""
    pid = tl.program_id(0)
    tiles_m, tiles_n = tl.cdiv(m, BLOCK_M), tl.cdiv(n, BLOCK_N)
    index = pid // (tiles_m * tiles_n)
    pid = pid % (tiles_m * tiles_n)
    rows = (pid // tiles_n) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    at = (index.to(tl.int64) * m + rows)[:, None] * n + cols[None, :]
    step = tl.cast(batch, tl.int64) * m * n
    for part in range(SPLIT_K):
        acc += tl.load(partial_ptr + part * step + at, mask=mask, other=0.0)
    residual_base = residual_ptr
    preactivation_base = preactivation_ptr
    if residual_ptr is not None:
        residual_base = residual_ptr + loop_offset(index, sizes, residual_strides)
    if preactivation_ptr is not None:
        preactivation_base = preactivation_ptr + loop_offset(index, sizes, preactivation_strides)
    store_epilogue(
        acc,
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


# (BLOCK_M, BLOCK_N, BLOCK_K, warps, stages, share of peak that a full machine of such tiles reaches) for each family.
TILES = {
    "hopper": (
        (128, 256, 64, 8, 3, 1.0),
        (128, 128, 64, 8, 4, 0.88),
        (64, 256, 64, 4, 4, 0.8),
        (128, 64, 64, 4, 4, 0.68),
        (64, 128, 64, 4, 4, 0.68),
        (64, 64, 64, 4, 5, 0.45),
        (16, 64, 128, 4, 4, 0.12),
    ),
    "blackwell": (
        (128, 256, 64, 8, 3, 1.0),
        (128, 128, 64, 8, 4, 0.8),
        (128, 64, 64, 4, 4, 0.6),
        (64, 64, 64, 4, 5, 0.4),
        (16, 64, 128, 4, 4, 0.1),
    ),
    "ampere": (
        (128, 256, 32, 8, 3, 1.0),
        (128, 128, 32, 4, 4, 0.95),
        (128, 64, 32, 4, 4, 0.75),
        (64, 64, 64, 4, 4, 0.55),
        (32, 64, 64, 4, 4, 0.35),
        (16, 64, 128, 4, 4, 0.2),
    ),
    "consumer": (
        (128, 128, 32, 4, 3, 1.0),
        (128, 64, 32, 4, 4, 0.85),
        (64, 64, 64, 4, 3, 0.65),
        (32, 64, 64, 4, 4, 0.4),
        (16, 64, 128, 4, 3, 0.25),
    ),
    "cdna": (
        (256, 128, 32, 8, 2, 1.0),
        (128, 128, 64, 4, 2, 0.9),
        (128, 64, 64, 4, 2, 0.7),
        (64, 64, 64, 4, 2, 0.5),
        (16, 64, 128, 4, 2, 0.15),
    ),
    "float32": ((128, 64, 16, 8, 3, 1.0), (64, 64, 16, 4, 3, 0.9), (32, 64, 32, 4, 3, 0.6), (16, 64, 64, 4, 3, 0.35)),
    "interpreter": ((128, 128, 64, 4, 1, 1.0), (64, 64, 64, 4, 1, 0.9), (16, 64, 128, 4, 1, 0.2)),
}


def family():
    kind, arch = architecture()
    if kind == "interpreter":
        return "interpreter"
    if kind == "hip":
        return "cdna"
    return {80: "ampere", 90: "hopper", 100: "blackwell", 103: "blackwell"}.get(arch, "consumer")


def splits_worth(batch, m, n, k, bm, bn, bk, sms):
    grid = batch * triton.cdiv(m, bm) * triton.cdiv(n, bn)
    depth = triton.cdiv(k, bk)
    return [s for s in (1, 2, 4, 8, 16) if s == 1 or (grid * s <= 2 * sms and depth // s >= 8)]


def cycles(batch, m, n, k, bm, bn, bk, split, share, sms):
    """Modelled time: 2048 multiply-adds a cycle on the matrix units of each of sms, a start and end of each tile, and
    for a split the launch and the bytes (16 a cycle) of the second kernel."""
    waves = triton.cdiv(batch * triton.cdiv(m, bm) * triton.cdiv(n, bn) * split, sms)
    time = waves * (bm * bn * bk * triton.cdiv(triton.cdiv(k, bk), split) / (2048 * share) + 2500)
    if split > 1:
        time += 5000 + 8.0 * batch * m * n * split / min(sms, batch * m * n // 2048 + 1) / 16
    return time


def choose(batch, m, n, k, dtype, tf32, sms, invariant=False, loaded=False):
    """The configuration with the least modelled time: waves of tiles, or waves of k slices where tiles are few.

    `loaded`: the epilogue holds more than a bias.
    """
    exact = dtype == torch.float32 and not tf32
    tiles = TILES["float32" if exact and family() != "interpreter" else family()]
    if dtype == torch.float32 and not exact:
        # twice the bytes in shared memory; half the depth keeps the same stages
        tiles = tuple((bm, bn, max(bk // 2, 16), w, s, e) for bm, bn, bk, w, s, e in tiles)
    if invariant:
        # rows must not depend on how many there are: one tile, no split
        bm, bn, bk, warps, stages, _ = tiles[1]
        return {
            "BLOCK_M": bm,
            "BLOCK_N": bn,
            "BLOCK_K": bk,
            "GROUP_M": 8,
            "SPLIT_K": 1,
            "num_warps": warps,
            "num_stages": stages,
        }
    if m <= 32 and not exact:
        # bandwidth: narrow tiles of b, each k slice long enough to stream, all multiprocessors twice busy
        bm, bn, bk, warps, stages, _ = tiles[-1]
        bm = max(bm, next_power(m))
        grid, depth, split = batch * triton.cdiv(n, bn), triton.cdiv(k, bk), 1
        while grid * split < sms and depth // (2 * split) >= 4:
            split *= 2
        return {
            "BLOCK_M": bm,
            "BLOCK_N": bn,
            "BLOCK_K": bk,
            "GROUP_M": 8,
            "SPLIT_K": split,
            "num_warps": warps,
            "num_stages": stages,
        }
    best = None
    for bm, bn, bk, warps, stages, share in tiles:
        if (bm > 64 and bm >= 2 * next_power(m)) or (bn > 64 and bn >= 2 * next_power(n)):
            continue
        for split in splits_worth(batch, m, n, k, bm, bn, bk, sms):
            time = cycles(batch, m, n, k, bm, bn, bk, split, share, sms)
            if best is None or time < best[0]:
                best = (time, bm, bn, bk, warps, stages, split)
    _, bm, bn, bk, warps, stages, split = best
    if bm * bn == 128 * 128 and warps == 4 and (loaded or m % bm or n % bn or k % bk):
        warps = 8  # 128 accumulators a thread leave no registers for masks or a long epilogue
    return {
        "BLOCK_M": bm,
        "BLOCK_N": bn,
        "BLOCK_K": bk,
        "GROUP_M": 8,
        "SPLIT_K": split,
        "num_warps": warps,
        "num_stages": stages,
    }


def fold(a, b, residual, y, preactivation):
    """(loop sizes, m, strides of a, b, residual, y, preactivation with core strides last), batch folded into m
    where all matrices share b."""
    views = [a, residual, y, preactivation]
    m = a.shape[-2]
    loop_sizes = y.shape[:-2]
    if all(stride == 0 or size == 1 for size, stride in zip(loop_sizes, b.strides, strict=False)):
        present = [v for v in views if v is not None]
        merged, strides = merge_loops(y.shape[:-1], [v.strides[:-1] for v in present])
        if len(merged) <= 4:
            rows = merged[-1] if merged else 1
            pad = 4 - max(len(merged), 1)
            walk = iter(strides)
            full = []
            for v in views:
                s = (next(walk) or (0,)) if v is not None else None
                full.append((0,) * pad + s + (v.strides[-1],) if s is not None else (0,) * 5)
            sizes = (1,) * pad + merged[:-1]
            return sizes, rows, [full[0], (0, 0, 0, *b.strides[-2:]), *full[1:]]
    sizes, strides = loops([a, b, residual, y, preactivation], [2] * 5)
    strides = [
        s + (v.strides[-2:] if v is not None else (0, 0))
        for s, v in zip(strides, [a, b, residual, y, preactivation], strict=True)
    ]
    return sizes, m, strides


def problem(a, b, bias=None, residual=None, y=None, preactivation=None, *, activation=0, allow_tf32=False):
    """What a tuned configuration depends on: words and truths must be equal, numbers near."""
    sizes, m, _ = fold(a, b, residual, y, preactivation)
    return {
        "dtype": dtype_name(a.dtype),
        "tf32": bool(allow_tf32),
        "loaded": int(activation) != 0 or residual is not None or preactivation is not None,
        "batch": product(sizes),
        "m": m,
        "n": y.shape[-1],
        "k": a.shape[-1],
    }


def candidates(problem, device):
    """[(modelled cycles, config), ...] for `isotile tune`, least first: the family's tiles, at other depths too."""
    batch, m, n, k = (problem[name] for name in ("batch", "m", "n", "k"))
    sms = units(device)
    exact = problem["dtype"] == "float32" and not problem["tf32"]
    half = 2 if problem["dtype"] == "float32" and problem["tf32"] else 1
    found = []
    if m <= 32 and not exact:
        # every candidate reads b once; what differs is how evenly the slices fill the multiprocessors
        for bn, bk, warps, stages in (
            (32, 128, 4, 4),
            (32, 256, 4, 4),
            (64, 128, 4, 4),
            (64, 64, 4, 5),
            (128, 64, 4, 4),
        ):
            grid, depth = batch * triton.cdiv(n, bn), triton.cdiv(k, bk // half)
            for split in (1, 2, 4, 8, 16):
                if depth // split < 2:
                    break
                each = triton.cdiv(depth, split) * bn * bk
                waves = grid * split / (2 * sms)
                time = max(waves, 1.0) * each + (8.0 * batch * m * n * split + 2000 * sms) / sms * (split > 1)
                config = {"BLOCK_M": next_power(m, 16), "BLOCK_N": bn, "BLOCK_K": bk // half, "SPLIT_K": split}
                found.append((time, {**config, "num_warps": warps, "num_stages": stages}))
        return cheapest(found)
    for bm, bn, bk, warps, stages, share in TILES["float32" if exact else family()]:
        bk = max(bk // half, 16)
        for split in splits_worth(batch, m, n, k, bm, bn, bk, sms):
            time = cycles(batch, m, n, k, bm, bn, bk, split, share, sms)
            for depth in (stages, stages - 1, stages + 1):
                for group in (8, 16):
                    config = {"BLOCK_M": bm, "BLOCK_N": bn, "BLOCK_K": bk, "GROUP_M": group, "SPLIT_K": split}
                    # ties stay in the order of the family's own choice
                    worse = 1.0 + 0.01 * (depth != stages) + 0.005 * (group != 8)
                    config = {**config, "num_warps": warps, "num_stages": depth}
                    found.append((time * worse, config))
                    if split == 1 and depth == stages and group == 8:
                        found.append((time * 1.02, {**config, "stored": False}))
    return cheapest(found)


def supports(a, b, bias=None, residual=None, y=None, preactivation=None, *, activation=0, allow_tf32=False):
    views = {"a": a, "b": b, "bias": bias, "residual": residual, "y": y, "preactivation": preactivation}
    return refuse_dtypes(views) or refuse_loops([a, b, residual, y, preactivation], [2] * 5)


def prepare(a, b, bias=None, residual=None, y=None, preactivation=None, *, activation=0, allow_tf32=False, config=None):
    """config: numbers of the tile, "stored" (through a descriptor or not); "batch_invariant" asks for one tile shape
    and no split whatever the size."""
    if y.numel() == 0:
        return []
    sizes, m, strides = fold(a, b, residual, y, preactivation)
    return folded_launches(
        a,
        b,
        bias,
        residual,
        y,
        preactivation,
        sizes,
        m,
        y.shape[-1],
        a.shape[-1],
        strides,
        activation,
        allow_tf32,
        config,
    )


def folded_launches(
    a, b, bias, residual, y, preactivation, sizes, m, n, k, strides, activation=0, allow_tf32=False, config=None
):
    """`prepare` once the loops are known: the operands' own shapes and strides are not looked at, only their memory."""
    batch = product(sizes)
    config, invariant = read_config(config)
    forced, stored = config.pop("descriptors", None), config.pop("stored", None)
    tf32 = bool(allow_tf32) and architecture()[0] == "cuda"
    loaded = int(activation) != 0 or residual is not None or preactivation is not None
    meta = override(choose(batch, m, n, k, a.dtype, tf32, units(y.device), invariant, loaded), config)
    plain = pointer_launches(
        a, b, bias, residual, y, preactivation, sizes, batch, m, n, k, strides, int(activation), tf32, meta
    )
    if forced is False or invariant or meta["SPLIT_K"] > 1:  # invariant: the other kernel would depend on m
        return plain
    return (
        _matmul_descriptor.launches(
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
            int(activation),
            tf32,
            meta,
            plain,
            forced,
            stored,
        )
        or plain
    )


def pointer_launches(a, b, bias, residual, y, preactivation, sizes, batch, m, n, k, strides, activation, tf32, meta):
    a_strides, b_strides, residual_strides, y_strides, preactivation_strides = strides
    split = meta["SPLIT_K"]
    bias_stride = bias.strides[0] if bias is not None else 0
    is_wide = wide(
        (m, a_strides[3]),
        (k, a_strides[4]),
        (k, b_strides[3]),
        (n, b_strides[4]),
        (m, y_strides[3]),
        (n, y_strides[4]),
        (m, residual_strides[3]),
        (n, residual_strides[4]),
        (m, preactivation_strides[3]),
        (n, preactivation_strides[4]),
        (m, n),
    ) or any(
        (s0 - 1) * t[3] + (s1 - 1) * t[4] >= 2**31 - 2**20
        for (s0, s1), t in zip(((m, k), (k, n), (m, n), (m, n), (m, n)), strides, strict=True)
    )
    tiles = batch * triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"])
    if tiles * split > MAX_GRID:
        raise ValueError(f"{tiles * split} tiles exceed the grid")
    partial = Scratch((split, batch, m, n), torch.float32) if split > 1 else None
    out = Launch(
        matmul_kernel,
        (tiles * split,),
        (a, b, bias, residual, y, preactivation, partial, *strides, bias_stride, sizes, batch, m, n, k),
        {
            "ACTIVATION": activation,
            "PRECISION": "tf32" if tf32 else "ieee",
            "WIDE": is_wide,
            "EVEN_M": m % meta["BLOCK_M"] == 0,
            "EVEN_N": n % meta["BLOCK_N"] == 0,
            "EVEN_K": k % (meta["BLOCK_K"]) == 0,
            **meta,
        },
    )
    if split == 1:
        return [out]
    block_m = min(next_power(m), 16)
    block_n = 128
    combine = Launch(
        matmul_combine_kernel,
        (batch * triton.cdiv(m, block_m) * triton.cdiv(n, block_n),),
        (
            partial,
            bias,
            residual,
            y,
            preactivation,
            residual_strides,
            y_strides,
            preactivation_strides,
            bias_stride,
            sizes,
            batch,
            m,
            n,
        ),
        {
            "ACTIVATION": activation,
            "SPLIT_K": split,
            "WIDE": is_wide,
            "BLOCK_M": block_m,
            "BLOCK_N": block_n,
            "num_warps": 4,
        },
    )
    return [out, combine]
