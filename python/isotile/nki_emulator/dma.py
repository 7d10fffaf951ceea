"""DMA instructions, two-core exchange, and sequencer registers."""

from __future__ import annotations

import numpy as np

from .constants import dge_mode, dma_engine, oob_mode
from .constants import engine as engines
from .dtypes import from_float32, to_float32
from .machine import MemoryRegion, NkiIndexError, NkiValidationError, active
from .ops import op_name
from .rules import PSUM, generation, is_tensor, refuse, tile
from .tensor import NkiTensor, VirtualRegister


def _end(me, operand, tensor):
    is_tensor(me, operand, tensor)
    if tensor.buffer is PSUM:
        refuse(me, operand, "DMA does not reach PSUM; copy to SBUF first")
    if tensor._gather is not None:
        refuse(me, operand, "DMA does not take .indirect() views; use .ap(vector_offset=...)")
    if tensor.buffer.on_chip and tensor.shape[0] > 128:
        refuse(me, operand, f"partition dim {tensor.shape[0]} exceeds 128")


def _writable(me, tensor):
    if any(s == 0 and n > 1 for s, n in zip(tensor.strides, tensor.shape, strict=True)):
        refuse(me, "dst", "a broadcast view cannot be written")


def _modes(me, dge, oob, priority, engine=engines.unknown):
    if not isinstance(dge, dge_mode):
        refuse(me, "dge_mode", f"a nisa.dge_mode member is wanted, given {dge!r}")
    if not isinstance(oob, oob_mode):
        refuse(me, "oob_mode", f"a nisa.oob_mode member is wanted, given {oob!r}")
    if dge is dge_mode.hwdge:
        generation(me, 3, "hwdge")
    if engine is not None and engine is not engines.unknown:
        if dge is not dge_mode.hwdge:
            refuse(me, "engine", "is for dge_mode.hwdge only")
        if engine not in (engines.sync, engines.scalar):
            refuse(me, "engine", f"sync or scalar triggers hwdge, given {engine}")
    if priority is not None:
        generation(me, 4, "priority")
        if priority not in (0, 1, 2, 3):
            refuse(me, "priority", f"0 (highest) to 3, given {priority}")


def _one_index_column(me, **tensors):
    for operand, tensor in tensors.items():
        if tensor._vector is not None and tensor._vector[0].free != 1:
            refuse(me, operand, f"vector_offset is a (P, 1) tile in SBUF, given {tensor._vector[0].shape}")


def _same_bits(a, b):
    """A packed dtype and the unsigned integers that hold its bits on the host."""
    return {a.kind, b.kind} == {"x", "u"} and a.itemsize == b.itemsize


def _run_bytes(tensor):
    """Contiguous bytes of the innermost run, which DMA efficiency follows."""
    run = 1
    for size, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if size == 1:
            continue
        if stride != run:
            break
        run *= size
    return run * tensor.dtype.itemsize


def _dma_info(dst, src):
    partitions = max([t.shape[0] for t in (dst, src) if t.on_chip] or [1])
    return {
        "bytes": max(dst.size * dst.dtype.itemsize, src.size * src.dtype.itemsize),
        "hbm_read": 0 if src.on_chip else _touched(src),
        "hbm_write": 0 if dst.on_chip else dst.size * dst.dtype.itemsize,
        "run_bytes": min(_run_bytes(dst), _run_bytes(src)),
        "partitions": partitions,
        "indirect": dst.is_indirect() or src.is_indirect(),
    }


def _touched(tensor):
    """Bytes read once; a broadcast dim is read again for each copy by the queues, but from the same rows."""
    return tensor.size * tensor.dtype.itemsize


def dma_copy(
    dst, src, priority=None, oob_mode=oob_mode.error, dge_mode=dge_mode.unknown, engine=engines.unknown, name=None
):
    me = "dma_copy"
    _end(me, "dst", dst)
    _end(me, "src", src)
    _writable(me, dst)
    _modes(me, dge_mode, oob_mode, priority, engine)
    if dst.size != src.size:
        refuse(me, "dst", f"has {dst.size} elements {dst.shape}, `src` has {src.size} {src.shape}")
    mode = dge_mode.name
    vector = dst._vector is not None or src._vector is not None
    _one_index_column(me, dst=dst, src=src)
    if vector and mode in ("hwdge", "none"):
        refuse(me, "dge_mode", f"vector_offset needs swdge, given {mode}")
    if dst.dtype != src.dtype:
        if mode == "hwdge":
            refuse(me, "dst", f"hwdge does not cast: {src.dtype} to {dst.dtype}")
        if "x" in (dst.dtype.kind, src.dtype.kind) and not _same_bits(dst.dtype, src.dtype):
            refuse(me, "dst", f"packed dtypes are copied without a cast only, given {src.dtype} to {dst.dtype}")
    skip = oob_mode.name == "skip"
    core = active()
    handle = core.emit(me, "dma", src.size, (src,), (dst,), **_dma_info(dst, src))
    if core.dry:
        return handle
    keep = None  # rows of the indexed dim that take part
    if src._vector is not None:
        (table, index), keep = src.vector_rows()
        if not keep.all() and not skip:
            _out_of_bounds(me, "src", keep)
        values = table[index] if table.shape[0] else np.zeros(src.shape, src.dtype.dtype)
    else:
        try:
            values = src.array()
        except IndexError:
            if skip and src._scalars:
                return handle
            raise
    if dst.dtype != src.dtype and not _same_bits(dst.dtype, src.dtype):
        values = from_float32(to_float32(values, src.dtype), dst.dtype)
    if dst._vector is not None:
        (table, index), valid = dst.vector_rows()
        if not valid.all() and not skip:
            _out_of_bounds(me, "dst", valid)
        rows = values.reshape(dst.shape)
        keep = valid if keep is None else valid & keep
        for i in np.flatnonzero(keep):  # in order: a later duplicate wins
            table[index[i]] = rows[i]
        return handle
    try:
        target = dst.array()
    except IndexError:
        if skip and dst._scalars:
            return handle
        raise
    if keep is None or keep.all():
        target[...] = values.reshape(dst.shape)
    else:
        if dst.shape[0] != keep.size:
            refuse(
                me, "oob_mode", f"skip needs dst rows to be the indexed rows, given {dst.shape} for {keep.size} indices"
            )
        target[keep] = values.reshape(dst.shape)[keep]
    return handle


def _out_of_bounds(me, operand, valid):
    refuse(
        me, operand, f"{int((~valid).sum())} of {valid.size} indices are out of bounds (oob_mode.error)", NkiIndexError
    )


_AXES = {2: (1, 0), 3: (2, 1, 0), 4: (3, 1, 2, 0)}


def dma_transpose(dst, src, axes=None, priority=None, dge_mode=dge_mode.unknown, oob_mode=oob_mode.error, name=None):
    me = "dma_transpose"
    _end(me, "dst", dst)
    _end(me, "src", src)
    _writable(me, dst)
    _modes(me, dge_mode, oob_mode, priority)
    if dst.buffer is not MemoryRegion.sbuf:
        refuse(me, "dst", f"must be in SBUF, it is in {dst.buffer}")
    if src.ndim not in _AXES:
        refuse(me, "src", f"2 to 4 dims, given {src.shape}")
    wanted = _AXES[src.ndim]
    if axes is not None and tuple(axes) != wanted:
        refuse(me, "axes", f"{wanted} for rank {src.ndim}, given {tuple(axes)}")
    if dst.dtype != src.dtype:
        refuse(me, "dst", f"must have src's dtype {src.dtype}, given {dst.dtype}")
    if src.dtype.itemsize not in (2, 4):
        refuse(me, "src", f"2- or 4-byte dtypes, given {src.dtype}")
    shape = tuple(src.shape[a] for a in wanted)
    if dst.shape != shape:
        refuse(me, "dst", f"is {shape} for src {src.shape}, given {dst.shape}: rank and shape match exactly")
    mode = dge_mode.name
    indirect = src._vector is not None
    if indirect:
        generation(me, 3, "the gathering form")
        if mode not in ("unknown", "swdge"):
            refuse(me, "dge_mode", f"the gathering form needs swdge, given {mode}")
        if src.shape[-1] > 128 or src.dtype.itemsize != 2 or src.shape[0] % 16:
            refuse(
                me,
                "src",
                f"gathering takes 2-byte rows of at most 128 and a multiple of 16 of them, given "
                f"{src.dtype} {src.shape}",
            )
        if src.ndim == 4 and 1 not in src.shape[1:3]:
            refuse(me, "src", f"a 4-D gather has size 1 in dim 1 or 2, given {src.shape}")
        index = src._vector[0]
        if index.ndim != 2 or index.dtype.name != "uint32":
            refuse(me, "src", f"the indices are 2-D uint32, given {index.dtype} {index.shape}")
        if index.shape[0] % 16 or (index.free > 1 and index.shape[0] != 128):
            refuse(
                me,
                "src",
                f"the indices fill a multiple of 16 partitions, all 128 with several columns, given {index.shape}",
            )
    else:
        if mode not in ("unknown", "hwdge"):
            refuse(me, "dge_mode", f"unknown or hwdge, given {mode}")
        if oob_mode.name == "skip":
            refuse(me, "oob_mode", "skip is for an indirect src")
        if mode == "hwdge":
            rows = src.shape[0]
            if src.dtype.itemsize != 2 or src.shape[-1] > 128:
                refuse(
                    me, "src", f"hwdge takes 2-byte dtypes and a last dim of at most 128, given {src.dtype} {src.shape}"
                )
            if src.ndim == 2 and rows != 16:
                refuse(me, "src", f"hwdge takes 16 rows in 2-D, given {rows}")
            if src.ndim > 2 and (rows not in (1, 2, 4, 8, 16) or rows * src.shape[-2] % 16):
                refuse(
                    me,
                    "src",
                    f"hwdge takes shape[0] of 1, 2, 4, 8 or 16 with shape[0] * shape[-2] a multiple of 16, given "
                    f"{src.shape}",
                )
    core = active()
    handle = core.emit(me, "dma", src.size, (src,), (dst,), **_dma_info(dst, src), transpose=True)
    if core.dry:
        return handle
    if indirect:
        (table, index), valid = src.vector_rows()
        if not valid.all() and oob_mode.name != "skip":
            _out_of_bounds(me, "src", valid)
        values = table[index]
        target = np.moveaxis(dst.array(), [wanted.index(0)], [0]) if src.ndim == 2 else None
        if not valid.all():
            if target is None:
                refuse(me, "oob_mode", "skip is emulated for 2-D gathers only")
            target[valid] = values[valid]
            return handle
    else:
        values = src.array()
    dst.array()[...] = values.transpose(wanted)
    return handle


def dma_compute(dst, srcs, reduce_op, scales=None, unique_indices=True, oob_mode=oob_mode.error, name=None):
    me = "dma_compute"
    _end(me, "dst", dst)
    _writable(me, dst)
    if not isinstance(srcs, (list, tuple)) or not 1 <= len(srcs) <= 16:
        refuse(me, "srcs", "a list of 1 to 16 tensors is wanted")
    for i, src in enumerate(srcs):
        _end(me, f"srcs[{i}]", src)
        if src.size != dst.size:
            refuse(me, f"srcs[{i}]", f"has {src.size} elements, dst has {dst.size}")
        if src.dtype.kind == "x":
            refuse(me, f"srcs[{i}]", f"{src.dtype} cannot be added")
    if op_name(reduce_op) != "add":
        refuse(me, "reduce_op", f"nl.add only, given {reduce_op!r}")
    if scales is not None and any(float(s) != 1.0 for s in scales):
        refuse(me, "scales", f"None or all 1.0, given {scales}")
    vector = dst._vector is not None or any(s._vector is not None for s in srcs)
    _one_index_column(me, dst=dst, **{f"srcs[{i}]": s for i, s in enumerate(srcs)})
    if vector:
        if not unique_indices:
            refuse(me, "unique_indices", "must be True with vector_offset")
        if len(srcs) != 2:
            refuse(me, "srcs", f"exactly 2 with vector_offset, given {len(srcs)}")
        if not any(s.storage is dst.storage for s in srcs):
            refuse(me, "srcs", "one of them aliases dst with vector_offset")
    core = active()
    info = _dma_info(dst, srcs[0])
    info["bytes"] = sum(s.size * s.dtype.itemsize for s in srcs) + dst.size * dst.dtype.itemsize
    info["hbm_read"] = sum(0 if s.on_chip else s.size * s.dtype.itemsize for s in srcs)
    handle = core.emit(me, "dma", dst.size, tuple(srcs), (dst,), **info)
    if core.dry:
        return handle
    skip = oob_mode.name == "skip"
    total = None
    keep = np.ones(dst.shape[0], bool)
    for src in srcs:
        if src._vector is not None:
            (table, index), valid = src.vector_rows()
            if not valid.all() and not skip:
                _out_of_bounds(me, "srcs", valid)
            keep = keep & valid
            values = table[index]
        else:
            values = src.array()
        values = to_float32(values, src.dtype).reshape(dst.shape)
        total = values if total is None else total + values
    assert total is not None  # there is at least one source
    typed = from_float32(total, dst.dtype)
    if dst._vector is not None:
        (table, index), valid = dst.vector_rows()
        if not valid.all() and not skip:
            _out_of_bounds(me, "dst", valid)
        keep = keep & valid
        table[index[keep]] = typed[keep]
    elif keep.all():
        dst.array()[...] = typed
    else:
        dst.array()[keep] = typed[keep]
    return handle


# -- two cores --------------------------------------------------------------------------------------------------


def _two_cores(me):
    core = active()
    generation(me, 3)
    if core.pair.size != 2:
        refuse(me, None, "needs two cores (launch the kernel as kernel[2])")
    return core


def core_barrier(data, cores, engine=engines.gpsimd, name=None):
    me = "core_barrier"
    core = _two_cores(me)
    is_tensor(me, "data", data)
    if data.buffer is not MemoryRegion.shared_hbm:
        refuse(me, "data", f"must be in shared_hbm, it is in {data.buffer}")
    if tuple(cores) != (0, 1):
        refuse(me, "cores", f"must be (0, 1), given {cores!r}")
    handle = core.emit(me, "gpsimd", 1, (), ())
    if not core.dry:
        core.pair.barrier(core.core)
    return handle


def sendrecv(src, dst, send_to_rank, recv_from_rank, pipe_id, dma_engine=dma_engine.dma, name=None):
    me = "sendrecv"
    core = _two_cores(me)
    tile(me, "src", src, psum=False, aligned=False)
    tile(me, "dst", dst, psum=False, aligned=False)
    if src.dtype != dst.dtype:
        refuse(me, "dst", f"must have src's dtype {src.dtype}, given {dst.dtype}")
    if src.shape != dst.shape:
        refuse(me, "dst", f"must have src's shape {src.shape}, given {dst.shape}")
    ranks = []
    for operand, rank in (("send_to_rank", send_to_rank), ("recv_from_rank", recv_from_rank)):
        rank = rank._read() if isinstance(rank, VirtualRegister) else int(rank)
        if rank not in (0, 1):
            refuse(me, operand, f"0 or 1, given {rank}")
        ranks.append(rank)
    if dma_engine.name == "gpsimd_dma":
        limit = 256 * src.dtype.itemsize
        if src.free * src.dtype.itemsize > limit:
            refuse(
                me,
                "src",
                f"gpsimd_dma moves at most {limit} bytes per partition of {src.dtype}, given "
                f"{src.free * src.dtype.itemsize}",
            )
    handle = core.emit(
        me,
        "dma",
        src.free,
        (src,),
        (dst,),
        bytes=src.size * src.dtype.itemsize,
        hbm_read=0,
        hbm_write=0,
        run_bytes=src.free * src.dtype.itemsize,
        partitions=src.shape[0],
        indirect=False,
    )
    if core.dry:
        return handle
    pair, (to, source) = core.pair, ranks
    with pair.lock:
        pair.mail.setdefault((pipe_id, core.core, to), []).append(np.array(src.array()))
        pair.lock.notify_all()
    slot = (pipe_id, source, core.core)
    pair.wait(core.core, me, lambda: bool(pair.mail.get(slot)))
    with pair.lock:
        received = pair.mail[slot].pop(0)
    if received.shape != dst.shape or received.dtype != dst.dtype.dtype:
        refuse(
            me, "dst", f"the other core sent {received.shape} of {received.dtype}, dst is {dst.shape} of {dst.dtype}"
        )
    dst.array()[...] = received
    return handle


# -- registers --------------------------------------------------------------------------------------------------


def register_alloc(x=None):
    if isinstance(x, NkiTensor):
        register = VirtualRegister()
        register_load(register, x)
        return register
    if x is not None and (isinstance(x, bool) or not isinstance(x, (int, np.integer))):
        refuse("register_alloc", "x", f"None or an int is wanted, given {x!r}")
    return VirtualRegister(x)


def _register(me, operand, register):
    if not isinstance(register, VirtualRegister):
        refuse(me, operand, f"a register is wanted, given {register!r}")


def register_move(dst, src):
    _register("register_move", "dst", dst)
    if isinstance(src, VirtualRegister):
        dst._write(src._read())
    elif isinstance(src, (int, np.integer)):
        dst._write(int(src))
    else:
        refuse("register_move", "src", f"an int or a register is wanted, given {src!r}")


def _one_element(me, operand, tensor):
    is_tensor(me, operand, tensor)
    if tensor.buffer is PSUM:
        refuse(me, operand, "must be in SBUF or HBM, it is in PSUM")
    if tensor.size != 1 or tensor.dtype.kind == "x":
        refuse(me, operand, f"one element of at most 32 bits is wanted, given {tensor.dtype} {tensor.shape}")


def register_load(dst, src):
    _register("register_load", "dst", dst)
    _one_element("register_load", "src", src)
    core = active()
    core.emit("register_load", "sequencer", 1, (src,), ())
    if core.dry:
        raise NkiValidationError("nisa.register_load: a dry run has no values")
    array = np.ascontiguousarray(src.array()).reshape(-1)
    if src.dtype.is_integer:
        dst._write(int(array[0]))
    else:  # raw bits
        dst._write(int(array.view(np.dtype(f"u{array.dtype.itemsize}"))[0]))


def register_store(dst, src):
    _one_element("register_store", "dst", dst)
    _register("register_store", "src", src)
    core = active()
    core.emit("register_store", "sequencer", 1, (), (dst,))
    if not core.dry:
        word = np.array([src._read() & 0xFFFFFFFF], np.uint32)
        dst.array().reshape(-1)[...] = word.astype(np.dtype(f"u{dst.dtype.itemsize}")).view(dst.dtype.dtype)


__all__ = [
    "core_barrier",
    "dma_compute",
    "dma_copy",
    "dma_transpose",
    "register_alloc",
    "register_load",
    "register_move",
    "register_store",
    "sendrecv",
]
