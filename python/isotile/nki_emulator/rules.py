"""Checks that instructions share. Each refusal names the instruction, the operand, the limit and the page."""

from __future__ import annotations

import numpy as np

from .constants import engine as engines
from .constants import reduce_cmd as commands
from .dtypes import FLOAT8, as_dtype, from_float32, to_float32
from .machine import PMAX, MemoryRegion, NkiIndexError, active, refuse
from .ops import COMPARISONS, IDENTITY, REDUCE_ALIASES, op_name
from .tensor import NkiTensor, VirtualRegister

SBUF, PSUM = MemoryRegion.sbuf, MemoryRegion.psum


def generation(instruction, least, what="the instruction"):
    have = active().generation
    if have < least:
        refuse(instruction, None, f"{what} needs gen{least} or later, the target is gen{have}")


def is_tensor(instruction, operand, tensor):
    if not isinstance(tensor, NkiTensor):
        refuse(instruction, operand, f"a tensor is wanted, given {type(tensor).__name__} {tensor!r}")
    return tensor


def tile(instruction, operand, tensor, *, psum=True, sbuf=True, aligned=True):
    """An on-chip operand in an allowed buffer, at an allowed start partition."""
    is_tensor(instruction, operand, tensor)
    buffer = tensor.buffer
    if not buffer.on_chip:
        refuse(instruction, operand, f"must be on chip, it is in {buffer}; move it with dma_copy")
    if buffer is PSUM and not psum:
        refuse(instruction, operand, "must be in SBUF, it is in PSUM")
    if buffer is SBUF and not sbuf:
        refuse(instruction, operand, "must be in PSUM, it is in SBUF")
    partitions = tensor.shape[0]
    if partitions > PMAX:
        refuse(instruction, operand, f"partition dim {partitions} exceeds {PMAX}")
    if aligned:
        start = tensor.start_partition
        if start and (start % 32 or partitions > 64 or (partitions > 32 and start != 64)):
            allowed = "0" if partitions > 64 else "0 or 64" if partitions > 32 else "0, 32, 64 or 96"
            refuse(instruction, operand, f"{partitions} partitions start at {allowed}, given {start}")
    return tensor


def output(instruction, operand, tensor, **kwargs):
    tile(instruction, operand, tensor, **kwargs)
    if any(s == 0 and n > 1 for s, n in zip(tensor.strides, tensor.shape, strict=True)):
        refuse(instruction, operand, "a broadcast view cannot be written")
    if tensor.dtype.kind == "x" and instruction not in (
        "memset",
        "tensor_copy",
        "nc_transpose",
        "quantize_mx",
        "nc_n_gather",
        "local_gather",
        "nc_stream_shuffle",
        "tensor_copy_predicated",
    ):
        refuse(instruction, operand, f"packed dtype {tensor.dtype} is written by quantize_mx and bit copies only")
    return tensor


def same_tile(instruction, name_a, a, name_b, b):
    """Equal partitions and equal elements per partition; ranks may differ, nothing broadcasts."""
    if a.shape[0] != b.shape[0]:
        refuse(instruction, name_b, f"has {b.shape[0]} partitions, `{name_a}` has {a.shape[0]}")
    if a.free != b.free:
        refuse(
            instruction,
            name_b,
            f"has {b.free} elements per partition {b.shape}, `{name_a}` has {a.free} {a.shape}; "
            "operands are not broadcast",
        )


def not_both_psum(instruction, name_a, a, name_b, b):
    if a.buffer is PSUM and b.buffer is PSUM:
        refuse(instruction, name_b, f"`{name_a}` and `{name_b}` are both in PSUM; one of them must be in SBUF")


def pick_engine(instruction, engine, allowed, default):
    if engine is None or engine is engines.unknown:
        return default
    if not isinstance(engine, engines):
        refuse(instruction, "engine", f"{engine!r} is no nisa.engine member")
    if engine.name not in allowed:
        refuse(instruction, "engine", f"{engine.name} cannot run it; allowed: {', '.join(allowed)}")
    return engine.name


def no_psum_on_gpsimd(instruction, engine, **operands):
    if engine == "gpsimd":
        for name, tensor in operands.items():
            if isinstance(tensor, NkiTensor) and tensor.buffer is PSUM:
                refuse(instruction, name, "GpSimd cannot access PSUM")


def operation(instruction, operand, op, allowed, what):
    try:
        name = op_name(op)
    except TypeError as error:
        refuse(instruction, operand, str(error))
    if name not in allowed:
        refuse(instruction, operand, f"nl.{name} is not allowed here ({what})")
    if name in ("abs_max", "abs_min"):
        generation(instruction, 4, f"nl.{name}")
    return name


def reduction(instruction, operand, op, allowed):
    try:
        name = op_name(op)
    except TypeError as error:
        refuse(instruction, operand, str(error))
    name = REDUCE_ALIASES.get(name, name)
    if name not in allowed:
        refuse(instruction, operand, f"nl.{name} is no legal reduction here; allowed: {', '.join(allowed)}")
    return name


def comparison(instruction, operand, op):
    return operation(instruction, operand, op, COMPARISONS, "comparisons only")


def scalar_or_vector(instruction, operand, value, partitions, dtypes=("float32",)):
    """A Python number, or a [P, 1] tile of an allowed dtype. Returns whether it is a tile."""
    if isinstance(value, NkiTensor):
        tile(instruction, operand, value)
        if value.free != 1:
            refuse(instruction, operand, f"a vector operand is [P, 1], given {value.shape}")
        if value.shape[0] != partitions:
            refuse(instruction, operand, f"has {value.shape[0]} partitions, the data has {partitions}")
        if dtypes is not None and value.dtype.name not in dtypes:
            refuse(instruction, operand, f"a vector operand is {' or '.join(dtypes)}, given {value.dtype}")
        return True
    if isinstance(value, (VirtualRegister,)) or not isinstance(value, (int, float, np.integer, np.floating, bool)):
        refuse(instruction, operand, f"a number or a [P, 1] tile is wanted, given {value!r}")
    return False


def lanes(value):
    """float32 number or [P, 1] array of an operand checked before."""
    if isinstance(value, NkiTensor):
        return to_float32(value.array(), value.dtype).reshape(value.shape[0], 1)
    return np.float32(value)


def read2(tensor):
    """[P, free] float32 content."""
    return to_float32(tensor.array(), tensor.dtype).reshape(tensor.shape[0], -1)


def bits2(tensor):
    """[P, free] unsigned raw bits."""
    array = tensor.array()
    return array.view(np.dtype(f"u{array.dtype.itemsize}")).reshape(tensor.shape[0], -1)


def write2(tensor, values):
    """Cast float32 values once and store them."""
    scatter(tensor, from_float32(np.asarray(values, np.float32), tensor.dtype).reshape(tensor.shape))


def scatter(tensor, typed):
    """Store an array of the tensor's own dtype, through indirection where the view has it."""
    if tensor._vector is not None:
        (table, index), valid = tensor.vector_rows()
        if not valid.all():
            raise NkiIndexError(f"{tensor!r}: {int((~valid).sum())} of {valid.size} indices are out of bounds")
        table[index] = typed
    elif tensor._gather is not None:
        flat, index = tensor.gather_index()
        np.put_along_axis(flat, index, typed.reshape(index.shape), axis=1)
    else:
        tensor.array()[...] = typed


def command(instruction, value, allowed):
    if not isinstance(value, commands):
        refuse(instruction, "reduce_cmd", f"{value!r} is no nisa.reduce_cmd member")
    if value.name not in allowed:
        refuse(instruction, "reduce_cmd", f"{value.name} is not allowed; allowed: {', '.join(allowed)}")
    return value.name


def accumulate(instruction, register, start, count, how, op, partial, initial=None):
    """Advance the engine's per-partition register; returns its value for reduce_res (None where it is not readable)."""
    lane = slice(start, start + count)
    if how in ("reset", "reset_reduce"):
        register.value[lane] = IDENTITY[op]
        register.valid[lane] = True
    elif how == "load_reduce":
        register.value[lane] = np.broadcast_to(np.asarray(initial, np.float32).reshape(-1), (count,))
        register.valid[lane] = True
    elif not register.valid[lane].all():
        refuse(
            instruction,
            "reduce_cmd",
            f"{how} reads an accumulator that no reset_reduce started; begin every chain with reset_reduce",
        )
    if how in ("reduce", "reset_reduce", "load_reduce"):
        from .ops import BINARY

        register.value[lane] = BINARY[op](register.value[lane], np.asarray(partial, np.float32).reshape(-1))
    return register.value[lane].reshape(count, 1).copy()


def reduce_target(instruction, tensor, partitions):
    output(instruction, "reduce_res", tensor)
    if tensor.free != 1 or tensor.shape[0] != partitions:
        refuse(instruction, "reduce_res", f"is [{partitions}, 1], given {tensor.shape}")


def float8(dtype):
    return dtype in FLOAT8


__all__ = [name for name in globals() if not name.startswith("_")] + ["as_dtype"]
