"""`nki.language`: tensors, buffers, dtypes, loops, and the tile functions (thin wrappers over `isa`)."""

from __future__ import annotations

import contextlib
import math
import os
import warnings

import numpy as np

from . import compute, dma
from . import matmul as _matmul
from . import tensor as _tensor
from .dtypes import (
    ALL as _DTYPES,
)
from .dtypes import (
    as_dtype,
    bfloat16,
    bool_,
    float4_e2m1fn_x4,
    float8_e4m3,
    float8_e4m3fn,
    float8_e4m3fn_x4,
    float8_e5m2,
    float8_e5m2_x4,
    float8_e8m0fnu,
    float16,
    float32,
    int8,
    int16,
    int32,
    tfloat32,
    uint8,
    uint16,
    uint32,
)
from .machine import BANK_BYTES, PMAX, MemoryRegion, active, psum_banks, refuse
from .ops import TOKENS
from .tensor import NKIObject, NkiTensor, VirtualRegister, ds

sbuf, psum = MemoryRegion.sbuf, MemoryRegion.psum
private_hbm = hbm = MemoryRegion.private_hbm
shared_hbm = MemoryRegion.shared_hbm


class NkiPortabilityWarning(UserWarning):
    """The SDK's simulator takes it, the hardware does not."""


class _TileSize(NKIObject):
    """Limits of the target. The lazily computed ones need an active kernel."""

    pmax = PMAX
    psum_fmax = psum_bank_fmax = BANK_BYTES // 4
    psum_bank_fmax_bytes = BANK_BYTES
    gemm_stationary_fmax = 128
    gemm_moving_fmax = 512
    bn_stats_fmax = 512
    psum_min_align = 4
    sbuf_min_align = 1

    def __init__(self):
        pass

    @property
    def psum_num_banks(self):
        return psum_banks(active().generation)

    @property
    def sbuf_size_bytes(self):
        return PMAX * active().spec.sbuf_partition_bytes

    @property
    def sbuf_fmax_bytes(self):
        return active().spec.sbuf_usable_bytes

    @property
    def sbuf_fmax(self):
        return self.sbuf_fmax_bytes // 4

    @property
    def total_available_sbuf_size(self):
        return self.sbuf_fmax_bytes


tile_size = _TileSize()


def is_hbm(buffer):
    return buffer in (private_hbm, shared_hbm)


def is_on_chip(buffer):
    return buffer in (sbuf, psum)


def is_psum(buffer):
    return buffer is psum


def is_sbuf(buffer):
    return buffer is sbuf


# -- allocation -------------------------------------------------------------------------------------------------


def ndarray(shape, dtype, buffer=sbuf, name="", address=None):
    """Uninitialised tensor. `address` pins a place for the compiler; the emulator places by live range."""
    return _tensor.allocate(shape, dtype, buffer, name)


_REMOVED = {
    "arange": "index with slices or nl.ds",
    "mgrid": "index with slices, or use access patterns (.ap)",
    "par_dim": "dim 0 of an on-chip tensor is the partition dim",
    "nc": "launch two cores as kernel[2]",
}


def __getattr__(name):
    if name in _REMOVED:
        raise AttributeError(f"nl.{name} was removed from NKI: {_REMOVED[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def full(shape, fill_value, dtype, buffer=sbuf, name=""):
    result = ndarray(shape, dtype, buffer, name)
    value = int(fill_value) if result.dtype.is_integer and float(fill_value).is_integer() else fill_value
    if is_on_chip(buffer):
        compute.memset(result, value)
        return result
    if not active().dry:
        from .dtypes import from_float32

        result.array()[...] = from_float32(np.array(fill_value, np.float32), result.dtype)
    return result


def zeros(shape, dtype, buffer=sbuf, name=""):
    return full(shape, 0, dtype, buffer, name)


def ones(shape, dtype, buffer=sbuf, name=""):
    return full(shape, 1, dtype, buffer, name)


def empty_like(x, dtype=None, buffer=None, name=""):
    return ndarray(x.shape, dtype or x.dtype, buffer or x.buffer, name)


def zeros_like(x, dtype=None, buffer=None, name=""):
    return zeros(x.shape, dtype or x.dtype, buffer or x.buffer, name)


def rand(shape, dtype, buffer=sbuf, name=""):
    result = ndarray(shape, dtype, buffer, name)
    if active().generation >= 4:
        compute.rand2(result, min=0.0, max=1.0)
        return result
    bits = ndarray(shape, uint32)
    compute.rng(bits)
    compute.tensor_scalar(bits, bits, TOKENS["right_shift"], 8)
    compute.tensor_scalar(result, bits, TOKENS["multiply"], 2.0**-24)
    return result


def random_seed(seed):
    if not isinstance(seed, NkiTensor):
        refuse("nl.random_seed", "seed", f"a [1, 1] tile of a 32-bit dtype is wanted, given {seed!r}")
    compute.set_rng_seed(seed)


def shared_constant(constant):
    """A NumPy array (or the path of a .npy file) as a shared_hbm tensor."""
    array = np.ascontiguousarray(np.load(constant) if isinstance(constant, (str, os.PathLike)) else constant)
    dtype = as_dtype(array.dtype)
    data = array.astype(dtype.dtype, copy=True).view(np.uint8).reshape(-1)
    return _tensor.allocate(array.shape, dtype, shared_hbm, "constant", data=data)


def shared_identity_matrix(n, dtype=uint8, dst=None):
    core = active()
    dtype = dst.dtype if dst is not None else as_dtype(dtype)
    result = dst if dst is not None else core.identities.get((n, dtype))
    if result is None or dst is not None:
        if result is None:
            result = ndarray((n, n), dtype, sbuf, f"identity_{dtype}")
            result.storage.scope = 0  # shared by the whole kernel, wherever it was first asked for
            core.identities[(n, dtype)] = result
        compute.memset(result, 0)
        one = ndarray((n, n), dtype, sbuf)
        compute.memset(one, 1 if dtype.is_integer else 1.0)
        compute.affine_select(result, pattern=[[-1, n]], channel_multiplier=1, on_true_tile=one, on_false_value=0.0)
    return result


# -- loops, grid, printing --------------------------------------------------------------------------------------


def _range(start, stop=None, step=1):
    return range(start) if stop is None else range(start, stop, step)


affine_range = sequential_range = static_range = _range


def _bound(value):
    return value._read() if isinstance(value, VirtualRegister) else int(value)


def dynamic_range(start, stop=None, step=1):
    """On-device loop (deprecated in 0.6): yields a read-only register."""
    if stop is None:
        start, stop = 0, start
    for i in range(_bound(start), _bound(stop), _bound(step)):
        with active().iteration():
            yield VirtualRegister(i, frozen=True)


def _loop_allowed(name):
    if active().no_reorder:
        refuse(f"nl.{name}", None, "is not allowed inside nl.no_reorder; put no_reorder inside the body")


def fori_loop(lower, upper, body_fun, step=1):
    _loop_allowed("fori_loop")
    if isinstance(step, VirtualRegister) or not isinstance(step, (int, np.integer)) or step < 1:
        refuse("nl.fori_loop", "step", f"a positive compile-time int is wanted, given {step!r}")
    for i in range(_bound(lower), _bound(upper), int(step)):
        with active().iteration():
            body_fun(VirtualRegister(i, frozen=True))


def while_loop(init, body_fun):
    _loop_allowed("while_loop")
    condition = init
    while _bound(condition) != 0:
        with active().iteration():
            condition = body_fun()
        if not isinstance(condition, (VirtualRegister, int, np.integer)):
            refuse("nl.while_loop", "body_fun", f"returns the next condition register, given {condition!r}")


@contextlib.contextmanager
def no_reorder():
    core = active()
    core.no_reorder += 1
    try:
        yield
    finally:
        core.no_reorder -= 1


def program_id(axis=0):
    core = active()
    if axis not in (0, -1):
        refuse("nl.program_id", "axis", f"the launch grid has one axis, given {axis}")
    return core.core


def num_programs(axes=0):
    size = active().pair.size
    if isinstance(axes, (tuple, list)):
        return tuple(size for _ in axes) if len(axes) != 1 else size
    return size


def program_ndim():
    return 1 if active().grid else 0


def device_print(print_prefix, tensor):
    core = active()
    if not core.dry:
        print(f"{print_prefix} (core {core.core}) {tensor!r}\n{tensor.array()}")


# -- tile functions ---------------------------------------------------------------------------------------------


def _as_tile(x):
    if not isinstance(x, NkiTensor):
        refuse("nl.ndarray", None, f"a tile is wanted, given {x!r}")
    return x


def _new(shape, dtype):
    return ndarray(shape, dtype, sbuf)


def _spread(x, shape):
    """x viewed as `shape`; size-1 broadcasting works in the SDK's simulator only."""
    if x.shape == tuple(shape):
        return x
    warnings.warn(
        f"nl binary functions do not broadcast on hardware: {x.shape} against {tuple(shape)}",
        NkiPortabilityWarning,
        stacklevel=5,
    )
    return broadcast_to(x, shape)


def _binary(name):
    token = TOKENS[name]
    bitvec = name.startswith("bitwise") or name.endswith("shift")

    def function(x, y, dtype=None):
        tiles = [t for t in (x, y) if isinstance(t, NkiTensor)]
        if not tiles:
            refuse(f"nl.{name}", "x", "at least one tile is wanted")
        result_dtype = as_dtype(dtype) if dtype is not None else tiles[0].dtype
        if len(tiles) == 2:
            shape = np.broadcast_shapes(x.shape, y.shape)
            x, y = _spread(x, shape), _spread(y, shape)
            result = _new(shape, result_dtype)
            compute.tensor_tensor(result, x, y, token)
            return result
        if name == "power":
            refuse("nl.power", "y", "hardware takes tile ** tile only")
        tile, other, reverse = (x, y, False) if isinstance(x, NkiTensor) else (y, x, True)
        result = _new(tile.shape, result_dtype)
        compute.tensor_scalar(result, tile, token, int(other) if bitvec else other, reverse0=reverse)
        return result

    function.__name__ = name
    return function


def _activation(name):
    token = TOKENS[name]

    def function(x, dtype=None):
        result = _new(_as_tile(x).shape, dtype or x.dtype)
        compute.activation(result, token, x)
        return result

    function.__name__ = name
    return function


def _elementwise(name, f):
    """Functions the compiler lowers to several instructions; emulated as one float32 pass on the Scalar engine."""

    def function(x, dtype=None):
        from .rules import read2, write2

        result = _new(_as_tile(x).shape, dtype or x.dtype)
        core = active()
        core.emit(
            name,
            "scalar",
            x.free,
            (x,),
            (result,),
            dtypes=(result.dtype.name, x.dtype.name),
            psum=(False, False),
            contiguous=(True, True),
            partitions=x.shape[0],
            op=name,
        )
        if not core.dry:
            write2(result, f(read2(x)))
        return result

    function.__name__ = name
    return function


def _copy(x, dtype=None):
    result = _new(_as_tile(x).shape, dtype or x.dtype)
    compute.tensor_copy(result, x)
    return result


def _rsqrt(x, dtype=None):
    result = _new(_as_tile(x).shape, dtype or x.dtype)
    compute.tensor_scalar(result, x, TOKENS["rsqrt"], 0.0)
    return result


def _reciprocal(x, dtype=None):
    result = _new(_as_tile(x).shape, dtype or x.dtype)
    compute.reciprocal(result, x)
    return result


def _invert(x, dtype=None):
    result = _new(_as_tile(x).shape, dtype or x.dtype)
    compute.tensor_scalar(result, x, TOKENS["invert"], None)
    return result


def logical_not(x, dtype=None):
    """XOR with 1: the input holds 0 and 1."""
    result = _new(_as_tile(x).shape, dtype or x.dtype)
    compute.tensor_scalar(result, x, TOKENS["logical_xor"], 1.0)
    return result


def negative(x, dtype=None):
    result = _new(_as_tile(x).shape, dtype or x.dtype)
    compute.tensor_scalar(result, x, TOKENS["multiply"], -1.0)
    return result


for _name, _token in TOKENS.items():
    globals()[_name] = _token
    if _name in compute.BINARY or _name.startswith("bitwise") or _name.endswith("shift"):
        _token.function = _binary(_name)
    elif _name in compute.ACTIVATION and _name != "prelu":
        _token.function = _activation(_name)
add, subtract, multiply, maximum, minimum = (TOKENS[n] for n in ("add", "subtract", "multiply", "maximum", "minimum"))
copy, exp, square = (TOKENS[n] for n in ("copy", "exp", "square"))
TOKENS["copy"].function = _copy
TOKENS["rsqrt"].function = _rsqrt
TOKENS["reciprocal"].function = _reciprocal
TOKENS["invert"].function = _invert
TOKENS["sin"].function = _elementwise("sin", lambda v: np.sin(v.astype(np.float64)).astype(np.float32))
cos = _elementwise("cos", lambda v: np.cos(v.astype(np.float64)).astype(np.float32))
tan = _elementwise("tan", lambda v: np.tan(v.astype(np.float64)).astype(np.float32))
ceil = _elementwise("ceil", np.ceil)
floor = _elementwise("floor", np.floor)
trunc = _elementwise("trunc", np.trunc)


def _no_divide(name, f):
    def function(x, y, dtype=None):
        warnings.warn(
            f"nl.{name} is not supported on hardware (no divide or modulo instruction)",
            NkiPortabilityWarning,
            stacklevel=2,
        )
        from .rules import read2, write2

        tiles = [t for t in (x, y) if isinstance(t, NkiTensor)]
        shape = np.broadcast_shapes(*(t.shape for t in tiles))
        result = _new(shape, dtype or tiles[0].dtype)
        active().emit(name, "vector", result.free, tuple(tiles), (result,))
        if not active().dry:
            values = [read2(t).reshape(t.shape) if isinstance(t, NkiTensor) else np.float32(t) for t in (x, y)]
            write2(result, np.broadcast_to(f(*values), shape))
        return result

    function.__name__ = name
    return function


divide, fmod, mod = _no_divide("divide", np.divide), _no_divide("fmod", np.fmod), _no_divide("mod", np.mod)


def _axes(name, x, axis):
    axes = tuple(axis) if isinstance(axis, (tuple, list)) else (axis,)
    axes = tuple(sorted(a + x.ndim if a < 0 else a for a in axes))
    if axes != tuple(range(x.ndim - len(axes), x.ndim)) or axes[0] == 0:
        refuse(f"nl.{name}", "axis", f"trailing free dims of {x.shape} only, given {axis}")
    return axes


def _reduced_shape(x, axes, keepdims):
    shape = [1 if i in axes else s for i, s in enumerate(x.shape)]
    if not keepdims:
        shape = [s for i, s in enumerate(shape) if i not in axes]
        if len(shape) < 2:
            shape.append(1)
    return shape


def _reduction(name, token):
    def function(x, axis, dtype=None, keepdims=False):
        axes = _axes(name, x, axis)
        result = _new(_reduced_shape(x, axes, keepdims), dtype or x.dtype)
        compute.tensor_reduce(result, TOKENS[token], x, axes, keepdims=keepdims)
        return result

    function.__name__ = name
    return function


sum = _reduction("sum", "add")
max = _reduction("max", "maximum")
min = _reduction("min", "minimum")
prod = _reduction("prod", "multiply")


def _scaled_sum(x, axes, keepdims, dtype):
    count = math.prod(x.shape[a] for a in axes)
    total = _new(_reduced_shape(x, axes, keepdims), float32)
    compute.tensor_reduce(total, TOKENS["add"], x, axes)
    result = _new(total.shape, dtype)
    compute.tensor_scalar(result, total, TOKENS["multiply"], 1.0 / count)
    return result


def mean(x, axis, dtype=None, keepdims=False):
    return _scaled_sum(x, _axes("mean", x, axis), keepdims, dtype or x.dtype)


def var(x, axis, dtype=None, keepdims=False):
    """Population variance; the reduced dims are always kept."""
    axes = _axes("var", x, axis)
    flat = x.reshape((x.shape[0], math.prod(x.shape[1 : axes[0]]), math.prod(x.shape[axes[0] :])))
    middle = _scaled_sum(flat, (2,), True, float32)
    centred = _new(flat.shape, float32)
    compute.tensor_tensor(centred, flat, broadcast_to(middle, flat.shape), TOKENS["subtract"])
    compute.tensor_tensor(centred, centred, centred, TOKENS["multiply"])
    return _scaled_sum(centred, (2,), True, dtype or x.dtype).reshape(_reduced_shape(x, axes, True))


def all(x, axis, dtype=None):
    axes = _axes("all", x, axis)
    result = _new(_reduced_shape(x, axes, False), dtype or x.dtype)
    compute.tensor_reduce(result, TOKENS["logical_and"], x, axes)
    return result


def softmax(x, axis=-1, dtype=None):
    axes = _axes("softmax", x, axis)
    flat = x.reshape((x.shape[0], math.prod(x.shape[1 : axes[0]]), math.prod(x.shape[axes[0] :])))
    peak = _new((*flat.shape[:2], 1), float32)
    compute.tensor_reduce(peak, TOKENS["maximum"], flat, (2,))
    shifted = _new(flat.shape, float32)
    compute.tensor_tensor(shifted, flat, broadcast_to(peak, flat.shape), TOKENS["subtract"])
    compute.activation(shifted, TOKENS["exp"], shifted)
    total = _new((*flat.shape[:2], 1), float32)
    compute.tensor_reduce(total, TOKENS["add"], shifted, (2,))
    compute.reciprocal(total, total)
    result = _new(x.shape, dtype or x.dtype)
    compute.tensor_tensor(result, shifted, broadcast_to(total, flat.shape), TOKENS["multiply"])
    return result


def rms_norm(x, w, axis, n, epsilon=1e-06, dtype=None, compute_dtype=None):
    axes = _axes("rms_norm", x, axis)
    if axes != tuple(range(1, x.ndim)):
        refuse("nl.rms_norm", "axis", f"all free dims, given {axis}")
    squares, total = _new(x.shape, compute_dtype or float32), _new((x.shape[0], 1), float32)
    compute.tensor_tensor(squares, x, x, TOKENS["multiply"])
    compute.tensor_reduce(total, TOKENS["add"], squares, axes)
    compute.tensor_scalar(total, total, TOKENS["multiply"], 1.0 / n, op1=TOKENS["add"], operand1=epsilon)
    compute.activation(total, TOKENS["rsqrt"], total)
    result = _new(x.shape, dtype or x.dtype)
    weight = w if w.shape == x.shape else broadcast_to(w, x.shape)
    compute.scalar_tensor_tensor(result, x, TOKENS["multiply"], total, TOKENS["multiply"], weight)
    return result


def where(condition, x, y, dtype=None):
    """x where the condition tile is 1, y where it is 0."""
    tiles = [t for t in (x, y) if isinstance(t, NkiTensor)]
    result = _new(condition.shape, dtype or (tiles[0].dtype if tiles else float32))
    predicate = _new(condition.shape, uint8)
    compute.tensor_scalar(predicate, condition, TOKENS["not_equal"], 0.0)
    for value, reverse in ((x, False), (y, True)):
        if isinstance(value, NkiTensor):
            if value.shape != condition.shape:
                value = _spread(value, condition.shape)
            if value.dtype != result.dtype:
                value = _copy(value, result.dtype)
        compute.tensor_copy_predicated(result, value, predicate, reverse_pred=reverse)
    return result


def dropout(x, rate, dtype=None):
    result = _new(x.shape, x.dtype)
    compute.dropout(result, x, rate)
    return result if dtype is None or as_dtype(dtype) == x.dtype else _copy(result, dtype)


def expand_dims(x, axis):
    return x.expand_dim(axis)


def broadcast_to(x, shape, dtype=None):
    """A new tile with the size-1 dims of x repeated."""
    if len(shape) != x.ndim or any(a != b and a != 1 for a, b in zip(x.shape, shape, strict=True)):
        refuse("nl.broadcast_to", "shape", f"same rank, size-1 dims expand: {x.shape} to {tuple(shape)}")
    result = _new(shape, dtype or x.dtype)
    view = x
    for dim in range(1, x.ndim):
        if x.shape[dim] != shape[dim]:
            view = view.broadcast(dim, shape[dim])
    if x.shape[0] == shape[0]:
        compute.tensor_copy(result, view)
        return result
    # Across partitions: one DMA that reads the row again for each of them.
    staged = ndarray(view.shape, x.dtype, private_hbm)
    dma.dma_copy(staged, view)
    dma.dma_copy(result, staged.broadcast(0, shape[0]))
    return result


def transpose(x, dtype=None):
    if x.ndim != 2:
        refuse("nl.transpose", "x", f"a 2-D tile, given {x.shape}")
    small = x.shape[0] <= 32 and x.shape[1] <= 32
    turned = ndarray((x.shape[1], x.shape[0]), x.dtype, sbuf if small else psum)
    _matmul.nc_transpose(turned, x)
    return turned if small and (dtype is None or as_dtype(dtype) == x.dtype) else _copy(turned, dtype or x.dtype)


def matmul(x, y, transpose_x=False):
    """x @ y in PSUM; x is [K, M] with transpose_x."""
    if not transpose_x:
        warnings.warn("nl.matmul needs transpose_x=True on hardware", NkiPortabilityWarning, stacklevel=2)
        x = transpose(x)
    result = ndarray((x.free, y.free), float32, psum)
    _matmul.nc_matmul(result, x, y)
    return result


def load(src, dtype=None):
    """HBM to a new SBUF tile of the same shape."""
    shape = src.shape if src.ndim > 1 else (src.shape[0], 1)
    result = _new(shape, dtype or src.dtype)
    dma.dma_copy(result, src)
    return result


def store(dst, value):
    """SBUF tile to HBM; PSUM content is copied to SBUF first by the kernel."""
    if isinstance(value, NkiTensor) and value.buffer is psum:
        refuse("nl.store", "value", "must be in SBUF; copy it out of PSUM first")
    dma.dma_copy(dst, value)


def load_transpose2d(src, dtype=None):
    result = _new((src.shape[1], src.shape[0]), src.dtype)
    dma.dma_transpose(result, src)
    return result if dtype is None or as_dtype(dtype) == src.dtype else _copy(result, dtype)


def gather_flattened(data, indices, axis=0, dtype=None):
    result = _new(indices.shape, data.dtype)
    compute.nc_n_gather(result, data, indices)
    return result if dtype is None or as_dtype(dtype) == data.dtype else _copy(result, dtype)


# -- 0.7 additions ----------------------------------------------------------------------------------------------


class _Grid:
    """A grid of equally shaped tiles (NKI 0.7)."""

    def __init__(self, shape, make):
        self.shape = tuple(shape)
        self._tiles = {index: make(index) for index in np.ndindex(*self.shape)}

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        if len(index) != len(self.shape):
            raise IndexError(f"a grid of {self.shape} takes {len(self.shape)} indices")
        return self._tiles[tuple(i % n if -n <= i < n else i for i, n in zip(index, self.shape, strict=True))]


def alloc_tiles(*, tile_shape, element_shape, buffer, dtype, address=None, name=""):
    """A grid `tile_shape` of tiles that each have `element_shape`."""
    return _Grid(tile_shape, lambda index: ndarray(element_shape, dtype, buffer, name))


def alloc_blocks(*, tile_shape, block_shape, element_shape, buffer, dtype, address=None, name=""):
    return _Grid(block_shape, lambda index: _Grid(tile_shape, lambda i: ndarray(element_shape, dtype, buffer, name)))


_ = (
    bfloat16,
    bool_,
    float4_e2m1fn_x4,
    float8_e4m3,
    float8_e4m3fn,
    float8_e4m3fn_x4,
    float8_e5m2,
    float8_e5m2_x4,
    float8_e8m0fnu,
    float16,
    int8,
    int16,
    int32,
    tfloat32,
    uint16,
    ds,
    _DTYPES,
)
