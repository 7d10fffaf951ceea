"""Tensor engine: matrix products into PSUM, transposes, and MX quantisation."""

from __future__ import annotations

import numpy as np

from .constants import engine as engines
from .constants import matmul_perf_mode
from .dtypes import ALL, FLOAT8, float8_e4m3, float8_e4m3fn, from_float32, to_float32, unpack
from .machine import PSUM_MATMUL, PSUM_OPEN, PSUM_WRITTEN, active
from .rules import PSUM, generation, output, pick_engine, refuse, scatter, tile

_OPERANDS = ("float8_e4m3", "float8_e5m2", "bfloat16", "float16", "tfloat32", "float32", "float8_e4m3fn")
_WIDE = ("float32", "tfloat32")


def _free_limit(dst):
    if active().generation < 4:
        return 512
    return 8192 if dst.dtype.itemsize == 2 else 4096


def _array_tile(me, tile_position, tile_size, rows, columns, double_row):
    if not tile_position and not tile_size:
        return
    if not tile_position or not tile_size:
        refuse(me, "tile_size", "tile_size and tile_position are given together")
    least = 64 if active().generation == 2 else 32
    for what, size, start, used in zip(("row", "column"), tile_size, tile_position, (rows, columns), strict=True):
        if size not in (32, 64, 128) or size < least:
            refuse(me, "tile_size", f"{what} size is 128, 64{', 32' if least == 32 else ''}, given {size}")
        if start % size or not 0 <= start < 128 or start + size > 128:
            refuse(me, "tile_position", f"start {what} is a multiple of {size} below 128, given {start}")
        if used > size:
            refuse(me, "tile_size", f"{used} {what}s in use exceed the {what} size {size}")
    if double_row and tile_size[1] != 128:
        refuse(me, "tile_size", "double_row cannot use column tiling")


def _into_psum(me, dst, product, mode):
    """Write or add `product` by the accumulate rules. The first write to a location overwrites, later ones add; a
    location starts over once anything else has read or rewritten it."""
    state = dst.psum_state()
    flat = state.reshape(product.shape) if state.flags.c_contiguous else None
    now = flat if flat is not None else np.array(state).reshape(product.shape)
    if mode is False:
        value = product
    elif mode is True:
        good = PSUM_WRITTEN if active().generation >= 4 else PSUM_MATMUL
        if not (now & good).all():
            what = "no instruction" if not (now & PSUM_WRITTEN).all() else "no matmul (only a copy or memset)"
            refuse(
                me,
                "accumulate",
                f"True adds to a PSUM location that {what} has written: its content is undefined on "
                f"gen{active().generation}; start with accumulate=False or None",
            )
        value = to_float32(dst.array(), dst.dtype).reshape(product.shape) + product
    else:
        opened = (now & PSUM_OPEN) != 0
        if opened.all():
            value = to_float32(dst.array(), dst.dtype).reshape(product.shape) + product
        elif opened.any():
            old = to_float32(dst.array(), dst.dtype).reshape(product.shape)
            value = np.where(opened, old + product, product)
        else:
            value = product
    dst.array()[...] = from_float32(value, dst.dtype).reshape(dst.shape)
    state[...] = PSUM_WRITTEN | PSUM_MATMUL | PSUM_OPEN


def _one_hot(matrix):
    """Row of the single one in each column, or None."""
    ones = matrix == 1
    if ((matrix == 0) | ones).all() and (ones.sum(axis=0) == 1).all():
        return ones.argmax(axis=0)
    return None


def nc_matmul(
    dst,
    stationary,
    moving,
    is_stationary_onezero=False,
    is_moving_onezero=False,
    is_transpose=False,
    accumulate=None,
    tile_position=(),
    tile_size=(),
    perf_mode=matmul_perf_mode.none,
    name=None,
):
    me = "nc_matmul"
    output(me, "dst", dst, sbuf=False)
    for operand, tensor in (("stationary", stationary), ("moving", moving)):
        tile(me, operand, tensor, psum=False)
        if tensor.dtype.name not in _OPERANDS:
            refuse(me, operand, f"dtype {tensor.dtype}; allowed: {', '.join(_OPERANDS)} (convert integers first)")
        if tensor.dtype is float8_e4m3fn:
            generation(me, 4, f"`{operand}` of dtype float8_e4m3fn")
        if tensor._gather is not None and tuple(tile_position) not in ((), (0, 0)):
            refuse(me, "tile_position", "an .indirect() operand needs (0, 0)")
    a, b = stationary.dtype, moving.dtype
    if (a.name in _WIDE) != (b.name in _WIDE):
        refuse(me, "moving", f"{b} with a stationary of {a}: float32 and tfloat32 pair with each other only")
    if {a, b} == {float8_e4m3, float8_e4m3fn}:
        refuse(me, "moving", "float8_e4m3 and float8_e4m3fn do not mix")
    if not isinstance(perf_mode, matmul_perf_mode):
        refuse(me, "perf_mode", f"a nisa.matmul_perf_mode member is wanted, given {perf_mode!r}")
    double = perf_mode is matmul_perf_mode.double_row
    k = stationary.shape[0]
    if moving.shape[0] != k:
        refuse(
            me, "moving", f"has {moving.shape[0]} partitions, `stationary` has {k}: both carry the contraction there"
        )
    if double:
        generation(me, 3, "double_row")
        for operand, tensor in (("stationary", stationary), ("moving", moving)):
            if tensor.dtype not in FLOAT8:
                refuse(me, operand, f"double_row needs float8, given {tensor.dtype}")
            if tensor.ndim < 3 or tensor.shape[1] != 2:
                refuse(me, operand, f"double_row operands are [K, 2, free], given {tensor.shape}")
    m, n = stationary.free // (2 if double else 1), moving.free // (2 if double else 1)
    if m > 128:
        refuse(me, "stationary", f"free size {m} exceeds 128 (nl.tile_size.gemm_stationary_fmax)")
    limit = _free_limit(dst)
    if n > limit:
        refuse(
            me, "moving", f"free size {n} exceeds {limit} on gen{active().generation} (nl.tile_size.gemm_moving_fmax)"
        )
    if dst.shape[0] != m or dst.free != n:
        refuse(me, "dst", f"is [{m}, {n}] for stationary [{k}, {m}] and moving [{k}, {n}], given {dst.shape}")
    _array_tile(me, tuple(tile_position or ()), tuple(tile_size or ()), k, m, double)
    if is_transpose:
        if dst.dtype.itemsize != max(a.itemsize, b.itemsize) and dst.dtype.name != "float32":
            refuse(me, "dst", f"a transpose keeps the input's dtype, given {dst.dtype}")
        if dst.dtype.itemsize == 2:
            generation(me, 3, "a 16-bit transpose")
    elif dst.dtype.name not in (("float32",) if active().generation < 4 else ("float32", "bfloat16")):
        refuse(
            me,
            "dst",
            f"{dst.dtype}; gen{active().generation} writes float32{' or bfloat16' if active().generation >= 4 else ''}",
        )
    core = active()
    handle = core.emit(
        me,
        "tensor",
        n,
        (stationary, moving),
        (dst,),
        k=k * (2 if double else 1),
        m=m,
        n=n,
        dtypes=(dst.dtype.name, a.name, b.name),
        double=double,
        transpose=is_transpose,
    )
    if core.dry:
        return handle
    rows = k * (2 if double else 1)
    left, right = stationary.array(32).reshape(rows, m), moving.array(32).reshape(rows, n)
    left32, right32 = to_float32(left, a), to_float32(right, b)
    if is_transpose and core.generation >= 3:
        pick = _one_hot(right32)
        if pick is not None:
            product, source = left[pick].T, a
        else:
            pick = _one_hot(left32)
            if pick is None:
                refuse(me, "moving", "is_transpose wants an identity (or permutation) as one operand")
            product, source = right[pick], b
        if source == dst.dtype:
            dst.array()[...] = product.reshape(dst.shape)
        else:
            dst.array()[...] = from_float32(to_float32(product, source), dst.dtype).reshape(dst.shape)
        dst.psum_state()[...] = PSUM_WRITTEN | PSUM_MATMUL | PSUM_OPEN
        return handle
    _into_psum(me, dst, np.matmul(left32.T, right32), accumulate)
    return handle


def _scale_rows(me, operand, scale, partitions, free):
    tile(me, operand, scale, psum=False, aligned=False)  # packed scale sets may start at partition 4, 8, ...
    if scale.dtype.name not in ("float8_e8m0fnu", "uint8"):
        refuse(me, operand, f"float8_e8m0fnu (or uint8) is wanted, given {scale.dtype}")
    if scale.free != free:
        refuse(me, operand, f"has {scale.free} elements per partition, {free} are wanted")
    rows = np.array([32 * q + g for q in range(partitions // 32) for g in range(4)])
    if scale.shape[0] <= rows[-1]:
        refuse(
            me,
            operand,
            f"holds 4 rows at the start of each 32-partition quadrant: {rows[-1] + 1} partitions for "
            f"{partitions} data partitions, given {scale.shape[0]}",
        )
    return rows


def _scale_values(scale, rows):
    bits = scale.array().view(np.uint8).reshape(scale.shape[0], -1)[rows].astype(np.int32)
    return np.where(bits == 255, np.float32(np.nan), np.ldexp(np.float32(1), bits - 127).astype(np.float32))


def nc_matmul_mx(
    dst,
    stationary,
    moving,
    stationary_scale,
    moving_scale,
    tile_position=None,
    tile_size=None,
    accumulate=None,
    name=None,
):
    me = "nc_matmul_mx"
    generation(me, 4)
    output(me, "dst", dst, sbuf=False)
    for operand, tensor in (("stationary", stationary), ("moving", moving)):
        tile(me, operand, tensor, psum=False)
        if tensor.dtype.kind != "x":
            refuse(me, operand, f"a packed x4 dtype is wanted, given {tensor.dtype}")
    p, m, n = stationary.shape[0], stationary.free, moving.free
    if moving.shape[0] != p:
        refuse(me, "moving", f"has {moving.shape[0]} partitions, `stationary` has {p}")
    if p % 32:
        refuse(me, "stationary", f"partitions are a multiple of 32, given {p}")
    if m > 128 or m % 2:
        refuse(me, "stationary", f"free size is even and at most 128, given {m}")
    if dst.dtype.name not in ("float32", "bfloat16"):
        refuse(me, "dst", f"float32 or bfloat16 is wanted, given {dst.dtype}")
    if n > _free_limit(dst):
        refuse(me, "moving", f"free size {n} exceeds {_free_limit(dst)}")
    if dst.shape[0] != m or dst.free != n:
        refuse(me, "dst", f"is [{m}, {n}], given {dst.shape}")
    rows_s = _scale_rows(me, "stationary_scale", stationary_scale, p, m)
    rows_m = _scale_rows(me, "moving_scale", moving_scale, p, n)
    _array_tile(me, tuple(tile_position or ()), tuple(tile_size or ()), p, m, False)
    if tile_size and (tile_size[1] != 128 or tile_position[1] != 0):
        refuse(me, "tile_size", "row tiling only: column size 128 at column 0")
    core = active()
    handle = core.emit(
        me,
        "tensor",
        n,
        (stationary, moving, stationary_scale, moving_scale),
        (dst,),
        k=4 * p,
        m=m,
        n=n,
        dtypes=(dst.dtype.name, stationary.dtype.name, moving.dtype.name),
    )
    if not core.dry:
        sides = []
        for tensor, scale, rows, free in ((stationary, stationary_scale, rows_s, m), (moving, moving_scale, rows_m, n)):
            values = unpack(tensor.array().reshape(p, free), tensor.dtype)  # [p, free, 4]
            values = values * np.repeat(_scale_values(scale, rows), 8, axis=0)[:, :, None]
            sides.append(values.transpose(0, 2, 1).reshape(4 * p, free))
        _into_psum(me, dst, np.matmul(sides[0].T, sides[1]), accumulate)
    return handle


_EMAX = {"float8_e4m3fn_x4": 8, "float8_e5m2_x4": 15}


def quantize_mx(dst, src, dst_scale, name=None):
    """Groups of 8 partitions x 4 elements share the scale 2^(floor(log2 amax) - (Emax - 1))."""
    me = "quantize_mx"
    generation(me, 4)
    output(me, "dst", dst, psum=False)
    tile(me, "src", src, psum=False)
    if dst.dtype.name not in _EMAX:
        refuse(me, "dst", f"{' or '.join(_EMAX)} is wanted, given {dst.dtype} (there is no MXFP4 output)")
    if src.dtype.name not in ("float16", "bfloat16"):
        refuse(me, "src", f"float16 or bfloat16 is wanted, given {src.dtype}")
    p, f = src.shape[0], src.free
    if p % 32:
        refuse(me, "src", f"partitions are a multiple of 32, given {p}")
    if f % 4:
        refuse(me, "src", f"elements per partition are a multiple of 4, given {f}")
    if dst.shape[0] != p or dst.free * 4 != f:
        refuse(me, "dst", f"is [{p}, {f // 4}] packed elements, given {dst.shape}")
    rows = _scale_rows(me, "dst_scale", dst_scale, p, f // 4)
    core = active()
    handle = core.emit(me, "vector", f, (src,), (dst, dst_scale), dtypes=(dst.dtype.name, src.dtype.name))
    if core.dry:
        return handle
    values = to_float32(src.array(), src.dtype).reshape(p, f)
    groups = values.reshape(p // 8, 8, f // 4, 4)
    amax = np.abs(groups).max(axis=(1, 3))
    exponent = np.frexp(np.where(np.isfinite(amax) & (amax > 0), amax, 1))[1] - 1 - (_EMAX[dst.dtype.name] - 1)
    exponent = np.where(amax > 0, np.clip(exponent, -127, 127), -127)
    byte = np.where(np.isfinite(amax), exponent + 127, 255).astype(np.uint8)
    scaled = np.ldexp(groups, -exponent[:, None, :, None])
    element = ALL[dst.dtype.packed]
    packed = np.ascontiguousarray(from_float32(scaled.astype(np.float32), element).reshape(p, f)).view(np.uint8)
    scatter(dst, packed.view(np.uint32).reshape(dst.shape))
    target = dst_scale.array()
    flat = target.view(np.uint8).reshape(dst_scale.shape[0], -1).copy()
    flat[rows] = byte
    target[...] = flat.view(dst_scale.dtype.dtype).reshape(dst_scale.shape)
    return handle


def nc_transpose(dst, data, engine=engines.unknown, name=None):
    me = "nc_transpose"
    output(me, "dst", dst)
    tile(me, "data", data)
    unknown = "tensor" if dst.buffer is PSUM and data.buffer is not PSUM else "vector"
    where = pick_engine(me, engine, ("tensor", "vector"), unknown)
    p, f = data.shape[0], data.free
    if dst.dtype != data.dtype:
        refuse(me, "dst", f"must have data's dtype {data.dtype}, given {dst.dtype}")
    if where == "tensor":
        if data.buffer is PSUM:
            refuse(me, "data", "the Tensor engine reads SBUF, it is in PSUM")
        if dst.buffer is not PSUM:
            refuse(me, "dst", "the Tensor engine writes PSUM, it is in SBUF")
    edge = 128 if where == "tensor" else 32
    if p > edge or f > edge:
        refuse(me, "data", f"the {where.title()} engine transposes up to {edge} x {edge}, given {p} x {f}")
    if dst.shape[0] != f or dst.free != p:
        refuse(me, "dst", f"is [{f}, {p}], given {dst.shape}")
    core = active()
    handle = core.emit(
        me,
        where,
        f if where == "tensor" else p,
        (data,),
        (dst,),
        p=p,
        f=f,
        dtypes=(dst.dtype.name, data.dtype.name),
        psum=(dst.buffer is PSUM, data.buffer is PSUM),
    )
    if not core.dry:
        array = data.array().reshape(p, f)
        if where == "tensor" and core.generation == 2 and data.dtype.is_float:
            # gen2 multiplies by an identity: a NaN or infinity spoils its whole row of the result.
            values = to_float32(array, data.dtype)
            if not np.isfinite(values).all():
                array = from_float32(np.matmul(values.T, np.eye(p, dtype=np.float32)).T, data.dtype)
        dst.array()[...] = array.T.reshape(dst.shape)
        if dst.storage.psum_state is not None:
            dst.psum_state()[...] = PSUM_WRITTEN | PSUM_MATMUL if where == "tensor" else PSUM_WRITTEN
    return handle


__all__ = ["nc_matmul", "nc_matmul_mx", "nc_transpose", "quantize_mx"]
