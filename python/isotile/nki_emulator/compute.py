"""Vector, Scalar and GpSimd instructions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from .constants import engine as engines
from .constants import nc_version, reduce_cmd
from .dtypes import from_float32
from .machine import NkiIndexError, active
from .ops import (
    ACTIVATION,
    BINARY,
    BITVEC,
    COMPARISONS,
    REDUCE_ALIASES,
    REDUCTIONS,
    UNARY,
    bitwise,
    op_name,
    reduce_free,
)
from .rules import (
    PSUM,
    accumulate,
    bits2,
    command,
    comparison,
    generation,
    is_tensor,
    lanes,
    no_psum_on_gpsimd,
    not_both_psum,
    operation,
    output,
    pick_engine,
    read2,
    reduce_target,
    reduction,
    refuse,
    same_tile,
    scalar_or_vector,
    scatter,
    tile,
    write2,
)
from .tensor import NkiTensor, VirtualRegister

FP32_MIN = float(np.finfo(np.float32).min)
INT_DTYPES = ("int8", "int16", "int32", "uint8", "uint16", "uint32")


def get_nc_version():
    return nc_version(active().generation)


def get_nc_sub_version():
    return 0


def _tensors(*values):
    return [v for v in values if isinstance(v, NkiTensor)]


def _traits(dst, *sources):
    """What the cost model asks of the operands: widths, buffers, contiguity."""
    return {
        "dtypes": tuple(t.dtype.name for t in (dst, *sources)),
        "psum": tuple(t.buffer is PSUM for t in (dst, *sources)),
        "contiguous": tuple(t.strides[-1] == 1 for t in (dst, *sources)),
        "partitions": sources[0].shape[0] if sources else dst.shape[0],
    }


# -- copies and constants ---------------------------------------------------------------------------------------


def tensor_copy(dst, src, engine=engines.unknown, name=None):
    me = "tensor_copy"
    output(me, "dst", dst)
    tile(me, "src", src)
    same_tile(me, "src", src, "dst", dst)
    where = pick_engine(me, engine, ("vector", "scalar", "gpsimd"), "vector")
    no_psum_on_gpsimd(me, where, dst=dst, src=src)
    core = active()
    if where == "scalar" and core.generation == 2:
        refuse(me, "engine", "the Scalar engine cannot run it on gen2; use activation with nl.copy")
    if dst.dtype != src.dtype and "x" in (dst.dtype.kind, src.dtype.kind):
        refuse(me, "dst", f"packed dtypes are copied without a cast only, given {src.dtype} to {dst.dtype}")
    handle = core.emit(me, where, src.free, (src,), (dst,), **_traits(dst, src))
    if not core.dry:
        if dst.dtype == src.dtype:
            scatter(dst, src.array().reshape(dst.shape))
        else:
            write2(dst, read2(src))
    return handle


def memset(dst, value, engine=engines.unknown, name=None):
    me = "memset"
    output(me, "dst", dst)
    where = pick_engine(me, engine, ("vector", "gpsimd"), "vector")
    no_psum_on_gpsimd(me, where, dst=dst)
    dtype = dst.dtype
    if isinstance(value, (NkiTensor, VirtualRegister)) or not isinstance(value, (int, float, np.number, bool)):
        refuse(me, "value", f"a compile-time number is wanted, given {value!r}")
    whole = isinstance(value, (int, np.integer, bool))
    if dtype.kind == "x" and value != 0:
        refuse(me, "value", f"packed {dtype} takes only 0, given {value}")
    if dtype.is_integer:
        if not whole:
            refuse(me, "value", f"an integer is wanted for a {dtype} tile, given {value!r}")
        info = np.iinfo(dtype.dtype)
        if not info.min <= int(value) <= info.max:
            refuse(me, "value", f"{value} does not fit {dtype}")
    core = active()
    handle = core.emit(me, where, dst.free, (), (dst,), **_traits(dst), zero=value == 0)
    if not core.dry:
        if dtype.is_float:
            fill = from_float32(np.array([value], np.float32), dtype)[0]
        else:
            fill = dtype.dtype.type(int(value))
        scatter(dst, np.broadcast_to(np.asarray(fill, dtype.dtype), dst.shape))
    return handle


def tensor_copy_predicated(dst, src, predicate, reverse_pred=False, name=None):
    me = "tensor_copy_predicated"
    output(me, "dst", dst)
    tile(me, "predicate", predicate)
    if predicate.dtype.name not in ("uint8", "uint16", "uint32"):
        refuse(me, "predicate", f"uint8, uint16 or uint32 is wanted, given {predicate.dtype}")
    same_tile(me, "dst", dst, "predicate", predicate)
    if isinstance(src, NkiTensor):
        tile(me, "src", src)
        same_tile(me, "dst", dst, "src", src)
        not_both_psum(me, "src", src, "predicate", predicate)
        if src.dtype != dst.dtype:
            refuse(me, "src", f"must have dst's dtype {dst.dtype}, given {src.dtype}")
    elif not isinstance(src, (int, float, np.number)):
        refuse(me, "src", f"a tile or a number is wanted, given {src!r}")
    core = active()
    # dst keeps its value where the predicate is false: it is read as well.
    handle = core.emit(me, "vector", dst.free, _tensors(src, predicate), (dst,), **_traits(dst, predicate))
    if not core.dry:
        chosen = predicate.array().reshape(dst.shape) != 0
        if reverse_pred:
            chosen = ~chosen
        if isinstance(src, NkiTensor):
            new = src.array().reshape(dst.shape)
        else:
            new = from_float32(np.full(dst.shape, src, np.float32), dst.dtype)
        scatter(dst, np.where(chosen, new, dst.array()))
    return handle


# -- element-wise -----------------------------------------------------------------------------------------------


def _bitvec(me, core, dst, first, name, second, reverse):
    """Raw-bit operation; `second` is an unsigned array, an int or None."""
    bits = first.dtype.itemsize * 8
    a = bits2(first)
    if name == "invert":
        return ~a
    b = second if isinstance(second, np.ndarray) else np.array(int(second) & ((1 << bits) - 1), a.dtype)
    b = b.astype(a.dtype)
    return bitwise(name, b, a, bits) if reverse else bitwise(name, a, b, bits)


def _write_bits(dst, unsigned):
    scatter(dst, unsigned.astype(np.dtype(f"u{dst.dtype.itemsize}")).view(dst.dtype.dtype).reshape(dst.shape))


def _integers(me, **operands):
    for name, tensor in operands.items():
        if isinstance(tensor, NkiTensor) and not tensor.dtype.is_integer:
            refuse(me, name, f"bit operations take integer tiles, given {tensor.dtype}")


def _exact_int(name, a, b, dtype):
    """GpSimd integer arithmetic: exact, wrapping at the width."""
    a, b = a.astype(np.int64), b.astype(np.int64)
    if name in ("add", "subtract", "multiply", "maximum", "minimum"):
        result = BINARY[name](a, b)
    elif name in COMPARISONS:
        result = getattr(np, name)(a, b).astype(np.int64)
    elif name.startswith("logical"):
        result = getattr(np, name)(a != 0, b != 0).astype(np.int64)
    else:
        pick = np.abs(a) >= np.abs(b) if name == "abs_max" else np.abs(a) <= np.abs(b)
        result = np.where(pick, a, b)
    return result.astype(np.uint64).astype(np.uint32).view(dtype)


def tensor_tensor(dst, data1, data2, op, engine=engines.unknown, name=None):
    me = "tensor_tensor"
    output(me, "dst", dst)
    tile(me, "data1", data1)
    tile(me, "data2", data2)
    same_tile(me, "data1", data1, "data2", data2)
    same_tile(me, "data1", data1, "dst", dst)
    not_both_psum(me, "data1", data1, "data2", data2)
    if data2._gather is not None:
        refuse(me, "data2", "cannot be an .indirect() view")
    opname = operation(me, "op", op, (*BINARY, *(b for b in BITVEC if b != "invert")), "two-operand ALU operations")
    bitvec = opname in BITVEC
    core = active()
    wide = all(t.dtype.name in ("int32", "uint32") for t in (dst, data1, data2))
    psum = any(t.buffer is PSUM for t in (dst, data1, data2))
    default = "gpsimd" if opname == "power" or (wide and not bitvec and not psum) else "vector"
    where = pick_engine(me, engine, ("vector", "gpsimd"), default)
    if opname == "power" and where != "gpsimd":
        refuse(me, "engine", "nl.power runs on GpSimd only")
    no_psum_on_gpsimd(me, where, dst=dst, data1=data1, data2=data2)
    if bitvec:
        _integers(me, dst=dst, data1=data1, data2=data2)
    handle = core.emit(me, where, data1.free, (data1, data2), (dst,), **_traits(dst, data1, data2), op=opname)
    if core.dry:
        return handle
    if bitvec:
        _write_bits(dst, _bitvec(me, core, dst, data1, opname, bits2(data2), False))
    elif wide and where == "gpsimd" and opname != "power":
        a, b = data1.array().reshape(dst.shape), data2.array().reshape(dst.shape)
        scatter(dst, _exact_int(opname, a, b, dst.dtype.dtype))
    else:
        write2(dst, BINARY[opname](read2(data1), read2(data2)))
    return handle


_SCALAR_PAIRS = {("multiply", "add"), ("multiply", None), ("add", None)}
_ARITHMETIC = tuple(n for n in BINARY if n != "power")


def tensor_scalar(
    dst, data, op0, operand0, reverse0=False, op1=None, operand1=None, reverse1=False, engine=engines.unknown, name=None
):
    me = "tensor_scalar"
    output(me, "dst", dst)
    tile(me, "data", data)
    same_tile(me, "data", data, "dst", dst)
    allowed = (*_ARITHMETIC, *UNARY, *BITVEC)
    core = active()
    steps = []
    for i, (op, operand, reverse) in enumerate(((op0, operand0, reverse0), (op1, operand1, reverse1))):
        if op is None:
            if i == 0:
                refuse(me, "op0", "an operation is wanted")
            if operand is not None:
                refuse(me, "operand1", "given without op1")
            continue
        opname = operation(me, f"op{i}", op, allowed, "ALU operations of tensor_scalar; nl.power takes two tiles")
        bitvec = opname in BITVEC
        if opname in UNARY or opname == "invert":
            if operand is not None and not (isinstance(operand, (int, float)) and operand == 0):
                refuse(me, f"operand{i}", f"nl.{opname} takes None or 0, given {operand!r}")
            if opname in ("square", "relu"):
                generation(me, 4, f"nl.{opname} as an operation of tensor_scalar")
            operand = None
        else:
            if operand is None:
                refuse(me, f"operand{i}", f"nl.{opname} wants a number or a [P, 1] tile")
            dtypes = INT_DTYPES if bitvec else ("float32",)
            is_tile = scalar_or_vector(me, f"operand{i}", operand, data.shape[0], dtypes)
            if bitvec and not is_tile and not isinstance(operand, (int, np.integer)):
                refuse(me, f"operand{i}", f"bit operations take an integer, given {operand!r}")
        steps.append((opname, operand, reverse, bitvec))
    if len({s[3] for s in steps}) > 1:
        refuse(me, "op1", f"nl.{steps[0][0]} and nl.{steps[1][0]} mix a bit operation with arithmetic")
    names = tuple(s[0] for s in steps)
    where = pick_engine(me, engine, ("vector", "scalar", "gpsimd"), "gpsimd" if "rsqrt" in names else "vector")
    if where == "scalar":
        generation(me, 3, "the Scalar engine for tensor_scalar")
        pair = (names[0], names[1] if len(names) > 1 else None)
        if pair not in _SCALAR_PAIRS or reverse0 or reverse1:
            refuse(me, "op0", f"the Scalar engine runs (multiply, add), (multiply, None) and (add, None), given {pair}")
    if where == "gpsimd" and "rsqrt" not in names:
        refuse(me, "engine", "GpSimd runs tensor_scalar for nl.rsqrt only")
    if "rsqrt" in names and where != "gpsimd":
        refuse(me, "engine", "nl.rsqrt runs on GpSimd only")
    no_psum_on_gpsimd(me, where, dst=dst, data=data, operand0=operand0, operand1=operand1)
    bitvec = steps[0][3]
    if bitvec:
        if where != "vector":
            refuse(me, "engine", "bit operations run on the Vector engine")
        _integers(me, dst=dst, data=data)
    handle = core.emit(me, where, data.free, _tensors(data, operand0, operand1), (dst,), **_traits(dst, data), op=names)
    if core.dry:
        return handle
    if bitvec:
        value = bits2(data)
        bits = data.dtype.itemsize * 8
        for opname, operand, reverse, _ in steps:
            if opname == "invert":
                value = ~value
                continue
            if isinstance(operand, NkiTensor):
                other = bits2(operand).astype(value.dtype)
            else:
                other = np.array(int(operand) & ((1 << bits) - 1), value.dtype)
            other = np.broadcast_to(other, value.shape)
            value = bitwise(opname, other, value, bits) if reverse else bitwise(opname, value, other, bits)
        _write_bits(dst, value)
        return handle
    value = read2(data)
    for opname, operand, reverse, _ in steps:
        value = _apply(opname, value, operand, reverse)
    write2(dst, value)
    return handle


def _apply(opname, value, operand, reverse):
    if opname in UNARY and operand is None:
        return UNARY[opname](value)
    other = lanes(operand)
    return BINARY[opname](other, value) if reverse else BINARY[opname](value, other)


def scalar_tensor_tensor(dst, data, op0, operand0, op1, operand1, reverse0=False, reverse1=False, name=None):
    me = "scalar_tensor_tensor"
    output(me, "dst", dst)
    tile(me, "data", data)
    tile(me, "operand1", operand1)
    same_tile(me, "data", data, "operand1", operand1)
    same_tile(me, "data", data, "dst", dst)
    not_both_psum(me, "data", data, "operand1", operand1)
    names = tuple(operation(me, f"op{i}", op, _ARITHMETIC, "two-operand arithmetic") for i, op in enumerate((op0, op1)))
    scalar_or_vector(me, "operand0", operand0, data.shape[0])
    core = active()
    handle = core.emit(
        me, "vector", data.free, _tensors(data, operand0, operand1), (dst,), **_traits(dst, data, operand1), op=names
    )
    if not core.dry:
        value = _apply(names[0], read2(data), operand0, reverse0)
        other = read2(operand1)
        write2(dst, BINARY[names[1]](other, value) if reverse1 else BINARY[names[1]](value, other))
    return handle


def reciprocal(dst, data, name=None):
    me = "reciprocal"
    output(me, "dst", dst)
    tile(me, "data", data)
    same_tile(me, "data", data, "dst", dst)
    core = active()
    handle = core.emit(me, "vector", data.free, (data,), (dst,), **_traits(dst, data))
    if not core.dry:
        write2(dst, np.float32(1) / read2(data))
    return handle


# -- reductions -------------------------------------------------------------------------------------------------


def tensor_reduce(dst, op, data, axis, negate=False, keepdims=False, name=None):
    me = "tensor_reduce"
    output(me, "dst", dst)
    tile(me, "data", data)
    allowed = list(REDUCTIONS)
    opname = reduction(me, "op", op, allowed)
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    axes = tuple(sorted(a + data.ndim if a < 0 else a for a in axes))
    if axes != tuple(range(data.ndim - len(axes), data.ndim)) or not axes:
        refuse(me, "axis", f"must be the last contiguous free dims, ending at dim {data.ndim - 1}; given {axis}")
    if axes[0] == 0:
        refuse(me, "axis", "the partition dim is not reduced here; use nc_matmul with ones or tensor_partition_reduce")
    kept = math.prod(data.shape[1 : axes[0]])
    if dst.shape[0] != data.shape[0] or dst.free != kept:
        refuse(
            me,
            "dst",
            f"is [{data.shape[0]}, {kept}] after the reduction of {data.shape} over {axes}, given {dst.shape}",
        )
    bitvec = opname in BITVEC
    if bitvec:
        _integers(me, dst=dst, data=data)
        if negate:
            refuse(me, "negate", "bit reductions have no negation")
    core = active()
    handle = core.emit(me, "vector", data.free, (data,), (dst,), **_traits(dst, data), op=opname)
    if core.dry:
        return handle
    if bitvec:
        values = bits2(data).reshape(data.shape[0], kept, -1)
        _write_bits(dst, getattr(np, opname).reduce(values, axis=-1))
    else:
        result = reduce_free(opname, read2(data).reshape(data.shape[0], kept, -1))
        write2(dst, -result if negate else result)
    return handle


def tensor_partition_reduce(dst, op, data, name=None):
    me = "tensor_partition_reduce"
    output(me, "dst", dst, psum=False)
    tile(me, "data", data, psum=False)
    allowed = ("add", "average", "maximum", "bitwise_or", "bitwise_and")
    try:
        opname = op_name(op)
    except TypeError:
        opname = getattr(op, "__name__", str(op))
    opname = {"mean": "average", **REDUCE_ALIASES}.get(opname, opname)
    if opname not in allowed:
        refuse(me, "op", f"nl.{opname}; allowed: {', '.join(allowed)}")
    if dst.shape[0] != 1 or dst.free != data.free:
        refuse(me, "dst", f"is [1, {data.free}], given {dst.shape}")
    core = active()
    handle = core.emit(me, "gpsimd", data.free * data.shape[0], (data,), (dst,), **_traits(dst, data), op=opname)
    if core.dry:
        return handle
    if opname in BITVEC:
        _integers(me, dst=dst, data=data)
        _write_bits(dst, getattr(np, opname).reduce(bits2(data), axis=0)[None])
    else:
        result = reduce_free("add" if opname == "average" else opname, np.ascontiguousarray(read2(data).T))
        write2(dst, (result / np.float32(data.shape[0]) if opname == "average" else result)[None])
    return handle


def tensor_scalar_reduce(
    dst,
    data,
    op0,
    operand0,
    reduce_op,
    reduce_res=None,
    reverse0=False,
    reduce_cmd=reduce_cmd.reset_reduce,
    reduce_init=None,
    reduce_res_negate=False,
    name=None,
):
    me = "tensor_scalar_reduce"
    output(me, "dst", dst)
    tile(me, "data", data)
    same_tile(me, "data", data, "dst", dst)
    opname = operation(me, "op0", op0, (*_ARITHMETIC, *UNARY), "arithmetic only")
    if reverse0:
        refuse(me, "reverse0", "is not supported yet")
    if opname in UNARY:
        if operand0 is not None and not (isinstance(operand0, (int, float)) and operand0 == 0):
            refuse(me, "operand0", f"nl.{opname} takes None or 0, given {operand0!r}")
        operand0 = None
    else:
        scalar_or_vector(me, "operand0", operand0, data.shape[0])
    redname = reduction(me, "reduce_op", reduce_op, ("add", "multiply", "maximum", "minimum"))
    how = command(me, reduce_cmd, ("reset_reduce", "reduce", "load_reduce"))
    if reduce_res is not None:
        reduce_target(me, reduce_res, data.shape[0])
    if how == "load_reduce":
        if reduce_init is None:
            refuse(me, "reduce_init", "load_reduce wants a number or a [P, 1] tile")
        scalar_or_vector(me, "reduce_init", reduce_init, data.shape[0])
    core = active()
    handle = core.emit(
        me,
        "vector",
        data.free,
        _tensors(data, operand0, reduce_init),
        _tensors(dst, reduce_res),
        **_traits(dst, data),
        op=(opname,),
        accumulator=True,
    )
    if not core.dry:
        value = _apply(opname, read2(data), operand0, False)
        write2(dst, value)
        initial = lanes(reduce_init) if how == "load_reduce" else None
        total = accumulate(
            me, core.vector_acc, data.start_partition, data.shape[0], how, redname, reduce_free(redname, value), initial
        )
        if reduce_res is not None:
            write2(reduce_res, -total if reduce_res_negate else total)
    return handle


def tensor_scalar_cumulative(dst, src, op0, op1, imm0, imm1=None, reduce_cmd=reduce_cmd.reset_reduce, name=None):
    me = "tensor_scalar_cumulative"
    output(me, "dst", dst)
    tile(me, "src", src)
    same_tile(me, "src", src, "dst", dst)
    for operand, tensor in (("dst", dst), ("src", src)):
        if tensor.dtype.name in ("int32", "uint32"):
            refuse(me, operand, f"{tensor.dtype} is not supported")
    first = operation(me, "op0", op0, _ARITHMETIC, "two-operand arithmetic")
    second = reduction(me, "op1", op1, ("add", "subtract", "multiply", "maximum", "minimum"))
    how = command(me, reduce_cmd, ("reset_reduce", "reduce", "load_reduce"))
    scalar_or_vector(me, "imm0", imm0, src.shape[0])
    if how == "load_reduce":
        if imm1 is None:
            refuse(me, "imm1", "load_reduce wants a number or a [P, 1] tile")
        scalar_or_vector(me, "imm1", imm1, src.shape[0])
    elif imm1 is not None:
        refuse(me, "imm1", "is for load_reduce only")
    core = active()
    handle = core.emit(me, "vector", src.free, _tensors(src, imm0, imm1), (dst,), **_traits(dst, src))
    if core.dry:
        return handle
    values = _apply(first, read2(src), imm0, False)
    lane = slice(src.start_partition, src.start_partition + src.shape[0])
    if how == "load_reduce":
        start = np.broadcast_to(np.asarray(lanes(imm1), np.float32).reshape(-1, 1), (src.shape[0], 1))
    else:
        start = accumulate(
            me, core.vector_acc, lane.start, src.shape[0], "reset" if how == "reset_reduce" else "idle", second, None
        )
    if second == "subtract":
        result = np.empty_like(values)
        carry = start[:, 0]
        for i in range(values.shape[1]):
            carry = values[:, i] - carry
            result[:, i] = carry
    else:
        joined = np.concatenate([np.asarray(start, np.float32), values], axis=1)
        operation_of: Any = BINARY[second]
        result = operation_of.accumulate(joined, axis=1)[:, 1:]
    core.vector_acc.value[lane] = result[:, -1]
    core.vector_acc.valid[lane] = True
    write2(dst, result)
    return handle


def tensor_tensor_scan(dst, data0, data1, initial, op0, op1, reverse0=False, reverse1=False, name=None):
    me = "tensor_tensor_scan"
    output(me, "dst", dst)
    tile(me, "data0", data0)
    tile(me, "data1", data1)
    same_tile(me, "data0", data0, "data1", data1)
    same_tile(me, "data0", data0, "dst", dst)
    not_both_psum(me, "data0", data0, "data1", data1)
    names = [operation(me, f"op{i}", op, _ARITHMETIC, "two-operand arithmetic") for i, op in enumerate((op0, op1))]
    scalar_or_vector(me, "initial", initial, data0.shape[0])
    core = active()
    handle = core.emit(me, "vector", data0.free, _tensors(data0, data1, initial), (dst,), **_traits(dst, data0, data1))
    if core.dry:
        return handle
    f, g = BINARY[names[0]], BINARY[names[1]]
    a, b = np.ascontiguousarray(read2(data0).T), np.ascontiguousarray(read2(data1).T)
    carry = np.broadcast_to(np.asarray(lanes(initial), np.float32).reshape(-1), (data0.shape[0],))
    result = np.empty_like(a)
    for i in range(a.shape[0]):
        step = f(carry, a[i]) if reverse0 else f(a[i], carry)
        carry = g(b[i], step) if reverse1 else g(step, b[i])
        result[i] = carry
    write2(dst, result.T)
    return handle


def bn_stats(dst, data, name=None):
    me = "bn_stats"
    output(me, "dst", dst)
    tile(me, "data", data)
    if data.free > 512:
        refuse(me, "data", f"at most 512 elements per partition (nl.tile_size.bn_stats_fmax), given {data.free}")
    if dst.shape[0] != data.shape[0] or dst.free != 6:
        refuse(me, "dst", f"is [{data.shape[0]}, 6], given {dst.shape}")
    core = active()
    handle = core.emit(me, "vector", data.free, (data,), (dst,), **_traits(dst, data))
    if not core.dry:
        values = read2(data)
        result = np.zeros((data.shape[0], 6), np.float32)
        for i in range(2):
            part = values[:, i::2]
            if part.shape[1]:
                mean = part.mean(axis=1, dtype=np.float32, keepdims=True)
                result[:, 3 * i] = part.shape[1]
                result[:, 3 * i + 1] = mean[:, 0]
                result[:, 3 * i + 2] = np.square(part - mean).sum(axis=1, dtype=np.float32)
        write2(dst, result)
    return handle


def bn_aggr(dst, data, name=None):
    me = "bn_aggr"
    output(me, "dst", dst)
    tile(me, "data", data)
    if data.free % 3:
        refuse(me, "data", f"elements per partition must be a multiple of 3, given {data.free}")
    if dst.shape[0] != data.shape[0] or dst.free != 2:
        refuse(me, "dst", f"is [{data.shape[0]}, 2], given {dst.shape}")
    core = active()
    handle = core.emit(me, "vector", data.free, (data,), (dst,), **_traits(dst, data))
    if not core.dry:
        count, mean, square = np.moveaxis(read2(data).reshape(data.shape[0], -1, 3), -1, 0)
        total = count.sum(axis=1, dtype=np.float32, keepdims=True)
        middle = (count * mean).sum(axis=1, dtype=np.float32, keepdims=True) / total
        spread = (square + count * np.square(mean - middle)).sum(axis=1, dtype=np.float32, keepdims=True) / total
        write2(dst, np.concatenate([middle, spread], axis=1))
    return handle


# -- the Scalar engine ------------------------------------------------------------------------------------------


def _activate(me, opname, value, param=0.0):
    if opname == "prelu":
        return np.where(value >= 0, value, np.asarray(param, np.float32) * value)
    return ACTIVATION[opname](value)


def activation(
    dst,
    op,
    data,
    bias=None,
    scale=1.0,
    reduce_op=None,
    reduce_res=None,
    reduce_cmd=reduce_cmd.idle,
    engine=engines.scalar,
    name=None,
    _me="activation",
):
    me = _me
    output(me, "dst", dst)
    tile(me, "data", data)
    same_tile(me, "data", data, "dst", dst)
    opname = operation(me, "op", op, tuple(ACTIVATION), "activation functions")
    core = active()
    where = pick_engine(me, engine, ("scalar", "gpsimd") if core.generation >= 4 else ("scalar",), "scalar")
    no_psum_on_gpsimd(me, where, dst=dst, data=data, bias=bias, scale=scale)
    scalar_or_vector(me, "scale", scale, data.shape[0])
    if bias is not None:
        if scalar_or_vector(me, "bias", bias, data.shape[0], None):
            if bias.dtype.name == "tfloat32" or bias.dtype.kind == "x":
                refuse(me, "bias", f"{bias.dtype} is not taken")
        elif core.generation == 2:
            refuse(me, "bias", "gen2 takes a [P, 1] tile, not a number")
        if opname == "reciprocal" and core.generation == 2:
            refuse(me, "bias", "nl.reciprocal takes no bias on gen2")
    how = command(me, reduce_cmd, ("idle", "reset", "reduce", "reset_reduce"))
    if reduce_op is not None:
        reduction(me, "reduce_op", reduce_op, ("add",))
    elif how in ("reduce", "reset_reduce"):
        refuse(me, "reduce_op", f"reduce_cmd {how} wants reduce_op=nl.add")
    if reduce_res is not None:
        reduce_target(me, reduce_res, data.shape[0])
    if where == "gpsimd" and (how != "idle" or reduce_res is not None):
        refuse(me, "engine", "only the Scalar engine has the accumulator")
    handle = core.emit(
        me,
        where,
        data.free,
        _tensors(data, bias, scale),
        _tensors(dst, reduce_res),
        **_traits(dst, data),
        op=opname,
        accumulator=reduce_res is not None,
    )
    if core.dry:
        return handle
    value = read2(data)
    if not (isinstance(scale, (int, float)) and scale == 1):
        value = value * lanes(scale)
    if bias is not None:
        value = value + lanes(bias)
    value = _activate(me, opname, value)
    write2(dst, value)
    if how != "idle" or reduce_res is not None:
        partial = value.sum(axis=1, dtype=np.float32) if how in ("reduce", "reset_reduce") else None
        total = accumulate(me, core.scalar_acc, data.start_partition, data.shape[0], how, "add", partial)
        if reduce_res is not None:
            write2(reduce_res, total)
    return handle


def activation_reduce(dst, op, data, reduce_op, reduce_res, bias=None, scale=1.0, name=None):
    is_tensor("activation_reduce", "reduce_res", reduce_res)
    reduction("activation_reduce", "reduce_op", reduce_op, ("add",))
    return activation(
        dst,
        op,
        data,
        bias=bias,
        scale=scale,
        reduce_op=reduce_op,
        reduce_res=reduce_res,
        reduce_cmd=reduce_cmd.reset_reduce,
        name=name,
        _me="activation_reduce",
    )


_PAIRS2 = {
    ("multiply", "add"),
    ("multiply", "subtract"),
    ("multiply", "bypass"),
    ("add", "bypass"),
    ("subtract", "bypass"),
    ("bypass", "bypass"),
}


def activate2(
    dst,
    op,
    data,
    imm0,
    imm1,
    op0,
    op1,
    relu_param=0.0,
    reverse0=False,
    reverse1=False,
    reduce_op=None,
    reduce_res=None,
    reduce_cmd=reduce_cmd.idle,
    engine=engines.scalar,
    name=None,
):
    me = "activate2"
    generation(me, 4)
    output(me, "dst", dst)
    tile(me, "data", data)
    same_tile(me, "data", data, "dst", dst)
    opname = operation(me, "op", op, tuple(ACTIVATION), "activation functions")
    pair = tuple(
        operation(me, f"op{i}", o, ("multiply", "add", "subtract", "bypass"), "stages of activate2")
        for i, o in enumerate((op0, op1))
    )
    if pair not in _PAIRS2:
        refuse(me, "op1", f"{pair} is no legal pair; legal: {sorted(_PAIRS2)}")
    imms = []
    for i, (stage, value) in enumerate(zip(pair, (imm0, imm1), strict=True)):
        if stage != "bypass":
            imms.append(scalar_or_vector(me, f"imm{i}", value, data.shape[0], None))
    if isinstance(imm0, NkiTensor) and isinstance(imm1, NkiTensor) and imm0.dtype != imm1.dtype:
        refuse(me, "imm1", f"has dtype {imm1.dtype}, imm0 has {imm0.dtype}; two tiles share one")
    scalar_or_vector(me, "relu_param", relu_param, data.shape[0], None)
    where = pick_engine(me, engine, ("scalar", "gpsimd"), "scalar")
    no_psum_on_gpsimd(me, where, dst=dst, data=data)
    how = command(me, reduce_cmd, ("idle", "reset", "reduce", "reset_reduce"))
    redname = None
    if reduce_op is not None:
        redname = reduction(me, "reduce_op", reduce_op, ("add", "maximum", "minimum", "abs_max", "abs_min"))
    elif how in ("reduce", "reset_reduce"):
        refuse(me, "reduce_op", f"reduce_cmd {how} wants a reduction")
    if reduce_res is not None:
        reduce_target(me, reduce_res, data.shape[0])
    if where == "gpsimd" and (how != "idle" or reduce_res is not None):
        refuse(me, "engine", "only the Scalar engine has the accumulator")
    core = active()
    handle = core.emit(
        me,
        where,
        data.free,
        _tensors(data, imm0, imm1, relu_param),
        _tensors(dst, reduce_res),
        **_traits(dst, data),
        op=opname,
        accumulator=reduce_res is not None,
    )
    if core.dry:
        return handle
    value = read2(data)
    for stage, imm, reverse in zip(pair, (imm0, imm1), (reverse0, reverse1), strict=True):
        if stage != "bypass":
            value = _apply(stage, value, imm, reverse)
    value = _activate(me, opname, value, lanes(relu_param))
    write2(dst, value)
    if how != "idle" or reduce_res is not None:
        redname = redname or "add"
        partial = reduce_free(redname, value) if how in ("reduce", "reset_reduce") else None
        total = accumulate(me, core.scalar_acc, data.start_partition, data.shape[0], how, redname, partial)
        if reduce_res is not None:
            write2(reduce_res, total)
    return handle


def exponential(dst, src, max_value=0.0, reduce_res=None, reduce_cmd=reduce_cmd.idle, reduce_init=0.0, name=None):
    me = "exponential"
    generation(me, 4)
    output(me, "dst", dst)
    tile(me, "src", src)
    same_tile(me, "src", src, "dst", dst)
    if src.ndim > 4:
        refuse(me, "src", f"at most 4 dims, given {src.shape}")
    for operand, tensor, barred in (("dst", dst, ("uint32", "bool_")), ("src", src, ("tfloat32", "bool_"))):
        if tensor.dtype.name in barred or tensor.dtype.kind == "x":
            refuse(me, operand, f"{tensor.dtype} is not taken")
    scalar_or_vector(me, "max_value", max_value, src.shape[0])
    how = command(me, reduce_cmd, ("idle", "reset_reduce", "reduce", "load_reduce"))
    scalar_or_vector(me, "reduce_init", reduce_init, src.shape[0])
    if how != "load_reduce" and (isinstance(reduce_init, NkiTensor) or reduce_init != 0):
        refuse(me, "reduce_init", "must be 0 unless reduce_cmd is load_reduce")
    if reduce_res is not None:
        reduce_target(me, reduce_res, src.shape[0])
        if not reduce_res.dtype.is_float:
            refuse(me, "reduce_res", f"a float tile is wanted, given {reduce_res.dtype}")
    core = active()
    handle = core.emit(
        me,
        "vector",
        src.free,
        _tensors(src, max_value, reduce_init),
        _tensors(dst, reduce_res),
        **_traits(dst, src),
        accumulator=reduce_res is not None,
    )
    if core.dry:
        return handle
    value = np.exp(read2(src) - lanes(max_value))
    write2(dst, value)
    _vector_accumulator(me, core, src, how, "add", value, reduce_res, lanes(reduce_init))
    return handle


def _vector_accumulator(me, core, data, how, redname, value, reduce_res, initial=None):
    lane = slice(data.start_partition, data.start_partition + data.shape[0])
    if how == "idle":
        if reduce_res is not None:
            refuse(me, "reduce_cmd", "idle keeps no accumulator to store in reduce_res; use reset_reduce")
        core.vector_acc.valid[lane] = False  # idle may disturb the shared accumulators
        return
    total = accumulate(
        me, core.vector_acc, lane.start, data.shape[0], how, redname, reduce_free(redname, value), initial
    )
    if reduce_res is not None:
        write2(reduce_res, total)


# -- masks and indices ------------------------------------------------------------------------------------------


def _pattern(me, pattern, count):
    pairs = [[int(s), int(n)] for s, n in pattern]
    if not 1 <= len(pairs) <= 4:
        refuse(me, "pattern", f"1 to 4 [step, num] pairs, given {len(pairs)}")
    if math.prod(n for _, n in pairs) != count:
        refuse(
            me,
            "pattern",
            f"the nums of {pairs} multiply to {math.prod(n for _, n in pairs)}, dst has {count} elements per partition",
        )
    return pairs


def _affine(pairs, offset, multiplier, partitions):
    value = np.zeros((), np.int64)
    for step, num in pairs:
        value = value[..., None] + step * np.arange(num, dtype=np.int64)
    start = offset._read() if isinstance(offset, VirtualRegister) else int(offset)
    lane = np.arange(partitions, dtype=np.int64)[:, None] * int(multiplier)
    return start + lane + value.reshape(1, -1)


def iota(dst, pattern, offset=0, channel_multiplier=0, name=None):
    me = "iota"
    output(me, "dst", dst, psum=False)
    pairs = _pattern(me, pattern, dst.free)
    core = active()
    handle = core.emit(me, "gpsimd", dst.free, (), (dst,), **_traits(dst))
    if not core.dry:
        values = _affine(pairs, offset, channel_multiplier, dst.shape[0])
        values = values.astype(np.uint64).astype(np.uint32).view(np.int32)
        if dst.dtype.name in ("int32", "uint32"):
            scatter(dst, values.view(dst.dtype.dtype).reshape(dst.shape))
        elif dst.dtype.is_integer:
            info = np.iinfo(dst.dtype.dtype)
            scatter(dst, np.clip(values, info.min, info.max).astype(dst.dtype.dtype).reshape(dst.shape))
        else:
            write2(dst, values.astype(np.float32))
    return handle


def affine_select(dst, pattern, channel_multiplier, on_true_tile, on_false_value, cmp_op=None, offset=0, name=None):
    me = "affine_select"
    output(me, "dst", dst, psum=False)
    tile(me, "on_true_tile", on_true_tile, psum=False)
    same_tile(me, "on_true_tile", on_true_tile, "dst", dst)
    pairs = _pattern(me, pattern, dst.free)
    test = "equal" if cmp_op is None else comparison(me, "cmp_op", cmp_op)
    if isinstance(on_false_value, NkiTensor) or not isinstance(on_false_value, (int, float, np.number)):
        refuse(me, "on_false_value", f"a number is wanted, given {on_false_value!r}")
    core = active()
    handle = core.emit(me, "gpsimd", dst.free, (on_true_tile,), (dst,), **_traits(dst, on_true_tile))
    if not core.dry:
        keep = getattr(np, test)(_affine(pairs, offset, channel_multiplier, dst.shape[0]), 0)
        if dst.dtype == on_true_tile.dtype:
            false = from_float32(np.array([on_false_value], np.float32), dst.dtype)
            scatter(dst, np.where(keep, on_true_tile.array().reshape(keep.shape), false).reshape(dst.shape))
        else:
            write2(dst, np.where(keep, read2(on_true_tile), np.float32(on_false_value)))
    return handle


def range_select(
    dst,
    on_true_tile,
    comp_op0,
    comp_op1,
    bound0,
    bound1,
    reduce_cmd=reduce_cmd.reset_reduce,
    reduce_res=None,
    reduce_op=None,
    range_start=0,
    on_false_value=FP32_MIN,
    name=None,
):
    me = "range_select"
    generation(me, 3)
    output(me, "dst", dst)
    tile(me, "on_true_tile", on_true_tile)
    same_tile(me, "on_true_tile", on_true_tile, "dst", dst)
    if not on_true_tile.dtype.is_float:
        refuse(me, "on_true_tile", f"a float tile is wanted, given {on_true_tile.dtype}")
    tests = [
        operation(
            me, f"comp_op{i}", op, ("equal", "less", "less_equal", "greater", "greater_equal"), "range comparisons"
        )
        for i, op in enumerate((comp_op0, comp_op1))
    ]
    for operand, bound in (("bound0", bound0), ("bound1", bound1)):
        if not scalar_or_vector(me, operand, bound, dst.shape[0]):
            refuse(me, operand, f"a float32 [P, 1] tile is wanted, given {bound!r}")
    if (
        on_false_value is not None
        and on_false_value is not Ellipsis
        and np.float32(on_false_value) != np.float32(FP32_MIN)
    ):
        refuse(me, "on_false_value", f"must be {FP32_MIN}, given {on_false_value}")
    if reduce_op is not None:
        reduction(me, "reduce_op", reduce_op, ("maximum",))
    how = command(me, reduce_cmd, ("idle", "reset_reduce", "reduce"))
    if isinstance(range_start, (NkiTensor, VirtualRegister)) or int(range_start) != range_start:
        refuse(me, "range_start", f"a compile-time int is wanted, given {range_start!r}")
    if range_start + dst.free > 2**24:
        refuse(me, "range_start", f"range_start + index stays below 2^24, given {range_start} with {dst.free} elements")
    if reduce_res is not None:
        reduce_target(me, reduce_res, dst.shape[0])
    core = active()
    handle = core.emit(
        me,
        "vector",
        dst.free,
        _tensors(on_true_tile, bound0, bound1),
        _tensors(dst, reduce_res),
        **_traits(dst, on_true_tile),
        accumulator=reduce_res is not None,
    )
    if core.dry:
        return handle
    index = np.arange(range_start, range_start + dst.free, dtype=np.int64).astype(np.float32)[None]
    keep = getattr(np, tests[0])(index, lanes(bound0)) & getattr(np, tests[1])(index, lanes(bound1))
    value = np.where(keep, read2(on_true_tile), np.float32(FP32_MIN))
    write2(dst, value)
    _vector_accumulator(me, core, on_true_tile, how, "maximum", value, reduce_res)
    return handle


def select_reduce(
    dst,
    predicate,
    on_true,
    on_false,
    reduce_res=None,
    reduce_cmd=reduce_cmd.idle,
    reduce_op=None,
    reverse_pred=False,
    name=None,
):
    me = "select_reduce"
    output(me, "dst", dst)
    tile(me, "predicate", predicate)
    tile(me, "on_true", on_true)
    same_tile(me, "on_true", on_true, "dst", dst)
    same_tile(me, "on_true", on_true, "predicate", predicate)
    not_both_psum(me, "on_true", on_true, "predicate", predicate)
    if predicate.dtype.name not in ("int8", "uint8", "int16", "uint16"):
        refuse(me, "predicate", f"int8, uint8, int16 or uint16 is wanted, given {predicate.dtype}")
    if on_true.dtype.name in ("tfloat32", "int32", "uint32") or on_true.dtype.kind == "x":
        refuse(me, "on_true", f"{on_true.dtype} is not taken")
    scalar_or_vector(me, "on_false", on_false, on_true.shape[0], None)
    if reduce_op is not None:
        reduction(me, "reduce_op", reduce_op, ("maximum",))
    how = command(me, reduce_cmd, ("idle", "reset_reduce", "reduce"))
    if reduce_res is not None:
        reduce_target(me, reduce_res, on_true.shape[0])
        if not reduce_res.dtype.is_float:
            refuse(me, "reduce_res", f"a float tile is wanted, given {reduce_res.dtype}")
    core = active()
    handle = core.emit(
        me,
        "vector",
        on_true.free,
        _tensors(predicate, on_true, on_false),
        _tensors(dst, reduce_res),
        **_traits(dst, on_true, predicate),
        accumulator=reduce_res is not None,
    )
    if core.dry:
        return handle
    chosen = predicate.array().reshape(on_true.shape[0], -1) != 0
    if reverse_pred:
        chosen = ~chosen
    value = np.where(chosen, read2(on_true), lanes(on_false)).astype(np.float32)
    write2(dst, value)
    _vector_accumulator(me, core, on_true, how, "maximum", value, reduce_res)
    return handle


def nc_n_gather(dst, data, indices, name=None):
    me = "nc_n_gather"
    output(me, "dst", dst, psum=False)
    tile(me, "data", data, psum=False)
    tile(me, "indices", indices, psum=False)
    if indices.dtype.name != "uint32":
        refuse(me, "indices", f"uint32 is wanted, given {indices.dtype}")
    if dst.dtype != data.dtype:
        refuse(me, "dst", f"must have data's dtype {data.dtype}, given {dst.dtype}")
    same_tile(me, "indices", indices, "dst", dst)
    if data.shape[0] != indices.shape[0]:
        refuse(me, "data", f"has {data.shape[0]} partitions, `indices` has {indices.shape[0]}")
    core = active()
    handle = core.emit(me, "gpsimd", dst.free, (data, indices), (dst,), **_traits(dst, data))
    if not core.dry:
        index = indices.array().reshape(indices.shape[0], -1).astype(np.int64)
        if index.max() >= data.free:
            refuse(me, "indices", f"index {index.max()} outside [0, {data.free})", NkiIndexError)
        scatter(dst, np.take_along_axis(data.array().reshape(data.shape[0], -1), index, axis=1).reshape(dst.shape))
    return handle


def local_gather(dst, src_buffer, index, num_elem_per_idx=1, num_valid_indices=None, name=None):
    me = "local_gather"
    output(me, "dst", dst, psum=False)
    tile(me, "src_buffer", src_buffer, psum=False)
    tile(me, "index", index, psum=False)
    if index.dtype.name != "uint16":
        refuse(me, "index", f"uint16 is wanted, given {index.dtype}")
    if dst.dtype != src_buffer.dtype:
        refuse(me, "dst", f"must have src_buffer's dtype {src_buffer.dtype}, given {dst.dtype}")
    partitions = src_buffer.shape[0]
    if partitions != index.shape[0] or partitions % 16:
        refuse(
            me,
            "index",
            f"partitions equal src_buffer's and are a multiple of 16, given {index.shape[0]} and {partitions}",
        )
    if num_elem_per_idx not in (1, 2, 4, 8, 16, 32):
        refuse(me, "num_elem_per_idx", f"1, 2, 4, 8, 16 or 32, given {num_elem_per_idx}")
    valid = 16 * index.free if num_valid_indices is None else int(num_valid_indices)
    if valid > 4096 or valid > 16 * index.free:
        refuse(
            me, "num_valid_indices", f"at most {min(4096, 16 * index.free)} indices per 16 partitions, given {valid}"
        )
    if src_buffer.free % num_elem_per_idx:
        refuse(
            me,
            "src_buffer",
            f"{src_buffer.free} elements per partition do not divide into blocks of {num_elem_per_idx}",
        )
    if dst.shape[0] != partitions or dst.free != valid * num_elem_per_idx:
        refuse(me, "dst", f"is [{partitions}, {valid * num_elem_per_idx}], given {dst.shape}")
    core = active()
    handle = core.emit(
        me, "gpsimd", dst.free, (src_buffer, index), (dst,), **_traits(dst, src_buffer), elem=num_elem_per_idx
    )
    if core.dry:
        return handle
    blocks = src_buffer.array().reshape(partitions, -1, num_elem_per_idx)
    which = index.array().reshape(partitions, -1)
    result = np.empty((partitions, valid, num_elem_per_idx), dst.dtype.dtype)
    for start in range(0, partitions, 16):
        order = which[start : start + 16].T.reshape(-1)[:valid].astype(np.int64)
        if order.size and order.max() >= blocks.shape[1]:
            refuse(me, "index", f"index {order.max()} outside [0, {blocks.shape[1]})", NkiIndexError)
        result[start : start + 16] = blocks[start : start + 16, order]
    scatter(dst, result.reshape(dst.shape))
    return handle


def nc_stream_shuffle(dst, src, shuffle_mask, name=None):
    me = "nc_stream_shuffle"
    output(me, "dst", dst)
    tile(me, "src", src)
    if dst.dtype != src.dtype:
        refuse(me, "dst", f"must have src's dtype {src.dtype}, given {dst.dtype}")
    if dst.free != src.free:
        refuse(me, "dst", f"has {dst.free} elements per partition, `src` has {src.free}")
    mask = [int(m) for m in shuffle_mask]
    if len(mask) != 32 or any(not (0 <= m < 32 or m == 255) for m in mask):
        refuse(me, "shuffle_mask", f"32 entries in [0, 32) or 255, given {mask}")
    if src.shape[0] not in (1, 32, 64, 96, 128) or dst.shape[0] not in (32, 64, 96, 128, src.shape[0]):
        refuse(
            me, "src", f"whole quadrants of 32 partitions (or one partition), given {src.shape[0]} to {dst.shape[0]}"
        )
    core = active()
    handle = core.emit(me, "vector", src.free, (src,), (dst,), **_traits(dst, src))
    if core.dry:
        return handle
    source = np.array(src.array().reshape(src.shape[0], -1))
    target = dst.array().reshape(dst.shape[0], -1).copy()
    for p in range(dst.shape[0]):
        m = mask[p % 32]
        if m == 255:
            continue
        row = p - p % 32 + m
        if row >= source.shape[0]:
            refuse(me, "shuffle_mask", f"partition {p} wants source partition {row}, `src` has {source.shape[0]}")
        target[p] = source[row]
    scatter(dst, target.reshape(dst.shape))
    return handle


def _eight(me, data, limit=16384):
    if data.ndim > 3:
        refuse(me, "data", f"at most 3 dims, given {data.shape}")
    if not 8 <= data.free <= limit:
        refuse(me, "data", f"8 to {limit} elements per partition, given {data.free}")


def max8(dst, src, name=None):
    me = "max8"
    output(me, "dst", dst)
    tile(me, "src", src)
    _eight(me, src)
    if dst.shape[0] != src.shape[0] or dst.free != 8:
        refuse(me, "dst", f"is [{src.shape[0]}, 8], given {dst.shape}")
    core = active()
    handle = core.emit(me, "vector", src.free, (src,), (dst,), **_traits(dst, src))
    if not core.dry:
        values = read2(src)
        write2(dst, -np.sort(-values, axis=1)[:, :8])
    return handle


def _match8(values, wanted, order):
    """Index of the next unused occurrence of each wanted value, -1 where there is none; `order` as processed."""
    used = np.zeros(values.shape, bool)
    found = np.full(wanted.shape, -1, np.int64)
    rows = np.arange(values.shape[0])
    for k in order:
        hit = (values == wanted[:, k : k + 1]) & ~used
        first = hit.argmax(axis=1)
        ok = hit[rows, first]
        found[ok, k] = first[ok]
        used[rows[ok], first[ok]] = True
    return found


def nc_find_index8(dst, data, vals, name=None):
    me = "nc_find_index8"
    output(me, "dst", dst)
    tile(me, "data", data)
    tile(me, "vals", vals)
    _eight(me, data)
    if dst.dtype.name not in ("uint16", "uint32"):
        refuse(me, "dst", f"uint16 or uint32 is wanted, given {dst.dtype}")
    for operand, tensor in (("dst", dst), ("vals", vals)):
        if tensor.shape[0] != data.shape[0] or tensor.free != 8:
            refuse(me, operand, f"is [{data.shape[0]}, 8], given {tensor.shape}")
    core = active()
    handle = core.emit(me, "vector", data.free, (data, vals), (dst,), **_traits(dst, data))
    if not core.dry:
        found = _match8(read2(data), read2(vals), range(8))
        scatter(dst, found.astype(np.uint64).astype(dst.dtype.dtype).reshape(dst.shape))  # -1 is all ones
    return handle


def nc_match_replace8(dst, data, vals, imm, dst_idx=None, name=None):
    me = "nc_match_replace8"
    output(me, "dst", dst)
    tile(me, "data", data)
    tile(me, "vals", vals)
    _eight(me, data)
    same_tile(me, "data", data, "dst", dst)
    if vals.shape[0] != data.shape[0] or vals.free != 8:
        refuse(me, "vals", f"is [{data.shape[0]}, 8], given {vals.shape}")
    if isinstance(imm, NkiTensor) or not isinstance(imm, (int, float, np.number)):
        refuse(me, "imm", f"a number is wanted, given {imm!r}")
    if dst_idx is not None:
        output(me, "dst_idx", dst_idx)
        if dst_idx.shape[0] != data.shape[0] or dst_idx.free != 8 or not dst_idx.dtype.is_integer:
            refuse(me, "dst_idx", f"is an integer [{data.shape[0]}, 8], given {dst_idx.dtype} {dst_idx.shape}")
    core = active()
    handle = core.emit(me, "vector", data.free, (data, vals), _tensors(dst, dst_idx), **_traits(dst, data))
    if core.dry:
        return handle
    values = np.array(read2(data))
    found = _match8(values, read2(vals), range(7, -1, -1))
    for k in range(8):
        hit = found[:, k] >= 0
        values[np.nonzero(hit)[0], found[hit, k]] = np.float32(imm)
    write2(dst, values)
    if dst_idx is not None:
        scatter(
            dst_idx,
            found.astype(np.uint64)
            .astype(f"u{dst_idx.dtype.itemsize}")
            .view(dst_idx.dtype.dtype)
            .reshape(dst_idx.shape),
        )
    return handle


def topk(val_dst, idx_dst, src, n, name=None):
    me = "topk"
    for operand, tensor, dtype in (
        ("val_dst", val_dst, "bfloat16"),
        ("idx_dst", idx_dst, "uint32"),
        ("src", src, "bfloat16"),
    ):
        (tile if operand == "src" else output)(me, operand, tensor, psum=False)
        if tensor.dtype.name != dtype:
            refuse(me, operand, f"{dtype} is wanted, given {tensor.dtype}")
    partitions, k = src.shape[0], val_dst.free
    if not 8 <= n < 65536:
        refuse(me, "n", f"8 <= n < 65536, given {n}")
    if not 1 <= k < 32768 or k > n:
        refuse(me, "val_dst", f"1 <= K < 32768 and K <= n, given K={k}")
    if partitions % 16:
        refuse(me, "src", f"partitions are a multiple of 16, given {partitions}")
    if src.free < -(-n // 16):
        refuse(me, "src", f"{n} elements of 16 partitions need {-(-n // 16)} per partition, given {src.free}")
    if val_dst.shape[0] != partitions or idx_dst.shape[0] != partitions or idx_dst.free != k:
        refuse(me, "idx_dst", f"val_dst and idx_dst are [{partitions}, K], given {val_dst.shape} and {idx_dst.shape}")
    core = active()
    handle = core.emit(me, "gpsimd", 4 * n + k, (src,), (val_dst, idx_dst), **_traits(val_dst, src))
    if core.dry:
        return handle
    values = read2(src)
    out_v = np.empty((partitions, k), np.float32)
    out_i = np.empty((partitions, k), np.uint32)
    for start in range(0, partitions, 16):
        snake = values[start : start + 16].T.reshape(-1)[:n]
        order = np.argsort(-snake, kind="stable")[:k][::-1]  # ascending values
        out_v[start : start + 16], out_i[start : start + 16] = snake[order], order
    write2(val_dst, out_v)
    scatter(idx_dst, out_i.reshape(idx_dst.shape))
    return handle


def sequence_bounds(dst, segment_ids, name=None):
    me = "sequence_bounds"
    output(me, "dst", dst, psum=False)
    tile(me, "segment_ids", segment_ids, psum=False)
    n = segment_ids.free
    if segment_ids.shape[0] != 1 or dst.shape[0] != 1:
        refuse(me, "segment_ids", f"the partition dim is 1, given {segment_ids.shape[0]} and {dst.shape[0]}")
    if dst.shape != (1, 2, n):
        refuse(me, "dst", f"is (1, 2, {n}), given {dst.shape}")
    for operand, tensor in (("dst", dst), ("segment_ids", segment_ids)):
        if tensor.dtype.name not in ("float32", "int32"):
            refuse(me, operand, f"float32 or int32 is wanted, given {tensor.dtype}")
    core = active()
    handle = core.emit(me, "gpsimd", n, (segment_ids,), (dst,), **_traits(dst, segment_ids))
    if not core.dry:
        ids = segment_ids.array().reshape(-1).astype(np.int64)
        change = np.flatnonzero(np.diff(ids)) + 1
        starts = np.concatenate([[0], change])
        ends = np.concatenate([change, [n]])
        run = np.searchsorted(change, np.arange(n), side="right")
        bounds = np.stack([np.where(ids == 0, n, starts[run]), np.where(ids == 0, -1, ends[run])])
        scatter(dst, bounds.astype(dst.dtype.dtype).reshape(dst.shape))
    return handle


def nonzero_with_count(dst, src, index_offset=0, padding_val=-1, name=None):
    me = "nonzero_with_count"
    generation(me, 3)
    output(me, "dst", dst, psum=False)
    tile(me, "src", src, psum=False)
    if dst.dtype.name != "int32":
        refuse(me, "dst", f"int32 is wanted, given {dst.dtype}")
    if src.dtype.name not in ("float32", "int32"):
        refuse(me, "src", f"float32 or int32 is wanted, given {src.dtype}")
    if dst.shape[0] != src.shape[0] or dst.free != src.free + 1:
        refuse(me, "dst", f"is [{src.shape[0]}, {src.free + 1}], given {dst.shape}")
    core = active()
    handle = core.emit(me, "gpsimd", src.free, (src,), (dst,), **_traits(dst, src))
    if not core.dry:
        values = src.array().reshape(src.shape[0], -1)
        target = dst.array().reshape(dst.shape[0], -1).copy()
        for p in range(0, src.shape[0], 16):
            at = np.flatnonzero(values[p])
            target[p, :-1] = padding_val
            target[p, : at.size] = at + index_offset
            target[p, -1] = at.size
        scatter(dst, target.reshape(dst.shape))
    return handle


# -- random numbers ---------------------------------------------------------------------------------------------


def set_rng_seed(src_seeds, name=None):
    me = "set_rng_seed"
    tile(me, "src_seeds", src_seeds)
    if src_seeds.shape != (1, 1) or src_seeds.dtype.itemsize != 4:
        refuse(me, "src_seeds", f"a [1, 1] tile of a 32-bit dtype is wanted, given {src_seeds.dtype} {src_seeds.shape}")
    core = active()
    handle = core.emit(me, "vector", 1, (src_seeds,), (), **_traits(src_seeds))
    if not core.dry:
        core.rng_vector = np.random.Generator(np.random.Philox(int(src_seeds.array().view(np.uint32).reshape(-1)[0])))
    return handle


def rng(dst, engine=engines.vector, name=None):
    me = "rng"
    output(me, "dst", dst)
    where = pick_engine(me, engine, ("vector", "gpsimd"), "vector")
    if where == "gpsimd":
        generation(me, 3, "GpSimd random numbers")
    no_psum_on_gpsimd(me, where, dst=dst)
    if dst.dtype.name not in INT_DTYPES:
        refuse(me, "dst", f"an integer tile is wanted, given {dst.dtype}")
    core = active()
    handle = core.emit(me, where, dst.free, (), (dst,), **_traits(dst))
    if not core.dry:
        if where == "gpsimd":
            words = _xorwow(core, where, dst.shape[0], dst.free)
        else:
            words = core.rng_vector.integers(0, 2**32, (dst.shape[0], dst.free), np.uint32)
        _write_bits(dst, words)
    return handle


def _state(core, where):
    if where not in core.xorwow:
        width = 6 if where == "gpsimd" else 24
        core.xorwow[where] = np.random.Generator(np.random.Philox(0xC0DE + core.core)).integers(
            1, 2**32, (128, width), np.uint32
        )
    return core.xorwow[where]


def _xorwow(core, where, partitions, count):
    """Marsaglia's xorwow (J. Statistical Software 8 (14), 2003), one stream per partition and six-word state."""
    state = _state(core, where)
    streams = state.shape[1] // 6
    words = state[:partitions].reshape(partitions, streams, 6).copy()
    out = np.empty((partitions, -(-count // streams), streams), np.uint32)
    for i in range(out.shape[1]):
        x, v = words[..., 0], words[..., 4]
        t = x ^ (x >> np.uint32(2))
        new = (v ^ (v << np.uint32(4))) ^ (t ^ (t << np.uint32(1)))
        words[..., :4] = words[..., 1:5]
        words[..., 4] = new
        words[..., 5] += np.uint32(362437)
        out[:, i] = new + words[..., 5]
    state[:partitions] = words.reshape(partitions, -1)
    return out.reshape(partitions, -1)[:, :count]


def _state_tile(me, operand, tensor, where):
    width = 6 if where == "gpsimd" else 24
    if tensor.dtype.name != "uint32" or tensor.free != width:
        refuse(me, operand, f"uint32 [P, {width}] for {where}, given {tensor.dtype} {tensor.shape}")
    if where == "vector":
        generation(me, 4, "the Vector engine's state")


def rand_set_state(src_seeds, engine=engines.gpsimd, name=None):
    me = "rand_set_state"
    generation(me, 3)
    tile(me, "src_seeds", src_seeds, psum=False)
    where = pick_engine(me, engine, ("gpsimd", "vector"), "gpsimd")
    _state_tile(me, "src_seeds", src_seeds, where)
    core = active()
    handle = core.emit(me, where, src_seeds.free, (src_seeds,), (), **_traits(src_seeds))
    if not core.dry:
        _state(core, where)[: src_seeds.shape[0]] = src_seeds.array().reshape(src_seeds.shape[0], -1)
    return handle


def rand_get_state(dst, engine=engines.gpsimd, name=None):
    me = "rand_get_state"
    generation(me, 3)
    where = pick_engine(me, engine, ("gpsimd", "vector"), "gpsimd")
    output(me, "dst", dst, psum=where == "vector" and active().generation >= 4)
    _state_tile(me, "dst", dst, where)
    core = active()
    handle = core.emit(me, where, dst.free, (), (dst,), **_traits(dst))
    if not core.dry:
        scatter(dst, _state(core, where)[: dst.shape[0]].reshape(dst.shape))
    return handle


def rand2(dst, min, max, name=None):
    me = "rand2"
    generation(me, 4)
    output(me, "dst", dst)
    tensors = [scalar_or_vector(me, n, v, dst.shape[0]) for n, v in (("min", min), ("max", max))]
    if not any(tensors) and not min < max:
        refuse(me, "min", f"min < max, given {min} and {max}")
    core = active()
    handle = core.emit(me, "vector", dst.free, _tensors(min, max), (dst,), **_traits(dst))
    if not core.dry:
        words = _xorwow(core, "vector", dst.shape[0], dst.free)
        unit = (words >> np.uint32(8)).astype(np.float32) * np.float32(2.0**-24)
        low, high = lanes(min), lanes(max)
        write2(dst, low + unit * (high - low))
    return handle


def dropout(dst, data, prob, name=None):
    me = "dropout"
    output(me, "dst", dst)
    tile(me, "data", data)
    same_tile(me, "data", data, "dst", dst)
    if dst.dtype != data.dtype:
        refuse(me, "dst", f"must have data's dtype {data.dtype}, given {dst.dtype}")
    scalar_or_vector(me, "prob", prob, data.shape[0], None)
    if isinstance(prob, NkiTensor) and (
        (data.dtype.is_integer and prob.dtype.name != "float32") or not prob.dtype.is_float
    ):
        refuse(me, "prob", f"a float tile (float32 for integer data) is wanted, given {prob.dtype}")
    core = active()
    handle = core.emit(me, "vector", data.free, _tensors(data, prob), (dst,), **_traits(dst, data))
    if not core.dry:
        draw = core.rng_vector.random((data.shape[0], data.free), np.float32)
        array = data.array().reshape(data.shape[0], -1)
        scatter(dst, np.where(draw < lanes(prob), np.zeros((), array.dtype), array).reshape(dst.shape))
    return handle


__all__ = [
    "activate2",
    "activation",
    "activation_reduce",
    "affine_select",
    "bn_aggr",
    "bn_stats",
    "dropout",
    "exponential",
    "get_nc_sub_version",
    "get_nc_version",
    "iota",
    "local_gather",
    "max8",
    "memset",
    "nc_find_index8",
    "nc_match_replace8",
    "nc_n_gather",
    "nc_stream_shuffle",
    "nonzero_with_count",
    "rand2",
    "rand_get_state",
    "rand_set_state",
    "range_select",
    "reciprocal",
    "rng",
    "scalar_tensor_tensor",
    "select_reduce",
    "sequence_bounds",
    "set_rng_seed",
    "tensor_copy",
    "tensor_copy_predicated",
    "tensor_partition_reduce",
    "tensor_reduce",
    "tensor_scalar",
    "tensor_scalar_cumulative",
    "tensor_scalar_reduce",
    "tensor_tensor",
    "tensor_tensor_scan",
    "topk",
]
