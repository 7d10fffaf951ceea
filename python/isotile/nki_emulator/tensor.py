"""NkiTensor: a view of storage as [stride, count] pairs, with NKI's indexing and view rules."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import math
import operator

import numpy as np

from . import machine
from .dtypes import as_dtype, poison
from .machine import PAGES, PMAX, TENSOR_PAGE, MemoryRegion, NkiIndexError, NkiValidationError, refuse

MAX_RANK = 5


class NKIObject:
    """Base of kernel-side objects: constructors from class attributes, annotated or not; missing ones are None."""

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        own = dict(cls.__dict__)
        annotations = dict(own.get("__annotations__") or getattr(cls, "__annotations__", {}))
        for name in annotations:
            if name not in own and "ClassVar" not in str(annotations[name]):
                setattr(cls, name, None)  # so a later @dataclass sees a default, in whatever order fields come
        for name, value in own.items():
            if name in annotations or name.startswith("__") or _is_behaviour(value):
                continue
            annotations[name] = object
            if isinstance(value, (list, dict, set)):
                setattr(cls, name, dataclasses.field(default_factory=value.copy))
        cls.__annotations__ = annotations
        if "__init__" not in own and dataclasses.is_dataclass(cls):
            cls.__init__ = NKIObject.__init__  # an undecorated heir of a dataclass has fields of its own

    def __init__(self, *args, **kwargs):
        fields = _fields_of(type(self))
        names = list(fields)
        if len(args) > len(names):
            raise TypeError(f"{type(self).__name__} takes {len(names)} values, {len(args)} were given")
        values = dict(zip(names, args, strict=False))
        for name, value in kwargs.items():
            if name in values:
                raise TypeError(f"{type(self).__name__} got {name!r} twice")
            if name not in fields:
                raise TypeError(f"{type(self).__name__} has no attribute {name!r}; it has {', '.join(names) or 'none'}")
            values[name] = value
        for name, default in fields.items():
            if name not in values:
                values[name] = _default(default)
            object.__setattr__(self, name, values[name])
        post = getattr(self, "__post_init__", None)
        if post is not None:
            post()


def _is_behaviour(value):
    return callable(value) or isinstance(value, (property, classmethod, staticmethod))


def _fields_of(cls) -> dict:
    fields = {}
    for base in reversed(cls.__mro__):
        if base is NKIObject or not issubclass(base, NKIObject):
            continue
        declared = base.__dict__.get("__dataclass_fields__", {})
        for name, annotation in inspect.get_annotations(base).items():
            if "ClassVar" not in str(annotation):
                fields[name] = declared.get(name, base.__dict__.get(name))
    return fields


def _default(value):
    if isinstance(value, dataclasses.Field):
        if value.default_factory is not dataclasses.MISSING:
            return value.default_factory()
        return None if value.default is dataclasses.MISSING else value.default
    return value


class VirtualRegister(NKIObject):
    """A 32-bit register of a sequencer. Its value exists on the device only: Python must not look at it."""

    def __init__(self, state=None, frozen=False):
        self._value = 0 if state is None else _wrap(state)
        self._written = state is not None
        self._frozen = frozen

    def _read(self) -> int:
        if not self._written:
            refuse("register_move", "src", "the register is read before register_move or register_load wrote it")
        return self._value

    def _write(self, value):
        if self._frozen:
            refuse("nl.fori_loop", "body_fun", "the loop variable is read-only")
        self._value, self._written = _wrap(value), True

    def _binary(self, other, f):
        if not isinstance(other, (int, np.integer, VirtualRegister)):
            return NotImplemented
        return VirtualRegister(f(self._read(), other._read() if isinstance(other, VirtualRegister) else int(other)))

    def __add__(self, other):
        return self._binary(other, operator.add)

    __radd__ = __add__

    def __sub__(self, other):
        return self._binary(other, operator.sub)

    def __rsub__(self, other):
        return self._binary(other, lambda a, b: b - a)

    def __mul__(self, other):
        return self._binary(other, operator.mul)

    __rmul__ = __mul__

    def __bool__(self):
        # `while register:` is deprecated in 0.6 yet accepted; the rest of Python must not see the value.
        return self._read() != 0

    def __index__(self):
        raise TypeError("a register has no Python value: use it as scalar_offset, in nl.ds, or as a loop bound")

    __int__ = __float__ = __index__

    def __repr__(self):
        return "VirtualRegister()"


def _illegal(message):
    return NkiValidationError(f"{message} [{TENSOR_PAGE}]")


def _outside(message):
    return NkiIndexError(f"{message} [{TENSOR_PAGE}]")


def _unplaced(message):
    return NkiValidationError(f"{message} [{PAGES}nki.language.ndarray.html]")


def _wrap(value):
    return (operator.index(value) + 2**31) % 2**32 - 2**31


class ds:
    """nl.ds(start, size): a slice with a static or register start."""

    __slots__ = ("size", "start")

    def __init__(self, start, size):
        self.start, self.size = start, operator.index(size)


def _dynamic_value(source) -> int:
    if isinstance(source, VirtualRegister):
        return source._read()
    return int(source.array().reshape(-1)[0])


def _is_dynamic(value):
    return isinstance(value, (VirtualRegister, NkiTensor))


class NkiTensor(NKIObject):
    """A view: shape, strides and offset in elements over a storage. On chip, dim 0 is the partition dim."""

    def __init__(
        self,
        shape,
        dtype,
        storage,
        buffer=MemoryRegion.sbuf,
        name="",
        *,
        strides=None,
        offset=0,
        scalars=(),
        vector=None,
        gather=None,
    ):
        self.shape = tuple(operator.index(s) for s in shape)
        self.dtype = dtype
        self.storage = storage
        self.buffer = buffer
        self.name = name
        if strides is None:
            strides = _row_major(self.shape)
        self.strides = tuple(strides)
        self.offset = offset
        self._scalars = scalars  # ((source, stride, limit), ...) added to the offset when an instruction runs
        self._vector = vector  # (index tile, stride): dim 0 is indexed through the tile
        self._gather = gather  # (index tile, count): v4 tensor indirection over the flattened free dim
        self._extent = None

    # -- description ------------------------------------------------------------------------------------------

    @property
    def ndim(self):
        return len(self.shape)

    @property
    def size(self):
        return math.prod(self.shape)

    @property
    def on_chip(self):
        return self.buffer.on_chip

    @property
    def row(self):
        """Elements of the storage in one partition."""
        return self.storage.row_bytes // self.dtype.itemsize

    @property
    def start_partition(self):
        return self.offset // self.row if self.on_chip else 0

    @property
    def free(self):
        """Elements per partition."""
        return math.prod(self.shape[1:])

    def __repr__(self):
        return f"NkiTensor({self.name or 'tensor'}, shape={self.shape}, dtype={self.dtype}, buffer={self.buffer})"

    def __len__(self):
        return self.shape[0]

    def __bool__(self):
        raise TypeError("a tensor has no Python truth value: its content exists on the device only")

    def is_contiguous(self):
        first = 1 if self.on_chip else 0
        expected = 1
        for size, stride in zip(reversed(self.shape[first:]), reversed(self.strides[first:]), strict=True):
            if size != 1:
                if stride != expected:
                    return False
                expected *= size
        return True

    def get_pattern(self):
        return [[stride, count] for stride, count in zip(self.strides, self.shape, strict=True)]

    def is_indirect(self):
        return bool(self._scalars) or self._vector is not None or self._gather is not None

    # -- memory -----------------------------------------------------------------------------------------------

    def _base(self) -> int:
        base = self.offset
        for source, stride, limit in self._scalars:
            value = _dynamic_value(source)
            if limit is not None and not 0 <= value <= limit:
                raise _outside(f"{self!r}: run-time index {value} is outside [0, {limit}]")
            base += value * stride
        return base

    def _numpy(self, buffer, dtype, scale):
        base = self._base()
        try:
            if base < 0:
                raise ValueError
            if self.on_chip:  # a lane sees its own partition only: the free part must not run into the next one
                last = sum((n - 1) * s for n, s in zip(self.shape[1:], self.strides[1:], strict=True))
                if base % self.row + last >= self.row:
                    raise ValueError
            return np.ndarray(self.shape, dtype, buffer, base * self.dtype.itemsize, [s * scale for s in self.strides])
        except (ValueError, TypeError):
            raise _outside(
                f"{self!r}: the access pattern {self.get_pattern()} at offset {base} leaves the storage of "
                f"{self.storage.partitions} x {self.row} elements"
            ) from None

    def array(self, group=16) -> np.ndarray:
        """The live NumPy view (a copy only for indirect views; `group` partitions share an .indirect() index)."""
        if self._vector is not None:
            rows, valid = self.vector_rows()
            if not valid.all():
                raise _outside(f"{self!r}: {int((~valid).sum())} of {valid.size} indices are out of bounds")
            return rows[0][rows[1]]
        if self._gather is not None:
            flat, index = self.gather_index(group)
            return np.take_along_axis(flat, index, axis=1).reshape(self.shape)
        return self._numpy(self.storage.data, self.dtype.dtype, self.dtype.itemsize)

    def psum_state(self) -> np.ndarray:
        return self._numpy(self.storage.psum_state, np.uint8, self.dtype.itemsize)

    def vector_rows(self):
        """((table, index), valid): table[index] is the gathered array; invalid indices are replaced by 0."""
        index_tile, stride = self._vector
        index = index_tile.array().reshape(index_tile.shape[0], -1).T.reshape(-1).astype(np.int64)[: self.shape[0]]
        base = self._base()
        total = self.storage.nbytes // self.dtype.itemsize
        inner = sum((n - 1) * s for n, s in zip(self.shape[1:], self.strides[1:], strict=True))
        count = max(0, (total - base - inner - 1) // stride + 1) if stride else 1
        valid = (index >= 0) & (index < count)
        size = self.dtype.itemsize
        table = np.ndarray(
            (count, *self.shape[1:]),
            self.dtype.dtype,
            self.storage.data,
            base * size,
            [stride * size, *(s * size for s in self.strides[1:])],
        )
        return (table, np.where(valid, index, 0)), valid

    def gather_index(self, group=16):
        """(elements, their indices) of each partition: offset i comes from index[i % group, i // group], group 16 for
        Vector, Scalar and GpSimd, 32 for the Tensor engine."""
        index_tile, count = self._gather
        index = index_tile.array()
        flat = self._numpy_source().reshape(self.storage.partitions, -1)
        start = self.start_partition
        rows = []
        for p in range(self.shape[0]):
            block = index[(p // group) * group : (p // group + 1) * group]
            rows.append(block.T.reshape(-1)[:count])
        picked = np.stack(rows).astype(np.int64)
        flat = flat[start : start + self.shape[0]]
        if picked.size and (picked.min() < 0 or picked.max() >= flat.shape[1]):
            raise _outside(f"{self!r}: indirect index outside [0, {flat.shape[1]})")
        return flat, picked

    def _numpy_source(self):
        return np.ndarray((self.storage.partitions, self.row), self.dtype.dtype, self.storage.data)

    def extent(self):
        """(partition start, end, byte start, end) touched at most; dynamic views touch all of the storage."""
        if self._extent is None:
            size = self.dtype.itemsize
            if self.is_indirect():
                self._extent = (0, self.storage.partitions, 0, self.storage.row_bytes)
            elif self.on_chip:
                p, f = divmod(self.offset, self.row)
                span = sum((n - 1) * s for n, s in zip(self.shape[1:], self.strides[1:], strict=True)) + 1
                self._extent = (p, p + self.shape[0], f * size, (f + span) * size)
            else:
                span = sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True)) + 1
                self._extent = (0, 1, self.offset * size, (self.offset + span) * size)
        return self._extent

    # -- views ------------------------------------------------------------------------------------------------

    def _view(self, shape, strides, offset=None, dtype=None, scalars=None, vector=None):
        shape = tuple(shape)
        if self.on_chip and len(shape) > MAX_RANK:
            raise _illegal(f"{self!r}: a view of rank {len(shape)}; on-chip views have at most {MAX_RANK} dims")
        return NkiTensor(
            shape,
            dtype or self.dtype,
            self.storage,
            self.buffer,
            self.name,
            strides=tuple(strides),
            offset=self.offset if offset is None else offset,
            scalars=self._scalars if scalars is None else scalars,
            vector=self._vector if vector is None else vector,
            gather=self._gather,
        )

    def _dim(self, dim, what, *, free=False):
        dim = operator.index(dim)
        if not -self.ndim <= dim < self.ndim:
            raise _outside(f"{what}: dim {dim} of a rank-{self.ndim} tensor")
        dim %= self.ndim
        if free and self.on_chip and dim == 0:
            raise _illegal(f"NkiTensor.{what}: dim 0 is the partition dim of an on-chip tensor")
        return dim

    def __getitem__(self, key):
        key = key if isinstance(key, tuple) else (key,)
        if sum(k is Ellipsis for k in key) > 1:
            raise _outside("more than one Ellipsis in an index")
        if any(k is Ellipsis for k in key):
            at = next(i for i, k in enumerate(key) if k is Ellipsis)
            key = key[:at] + (slice(None),) * (self.ndim - len(key) + 1) + key[at + 1 :]
        if len(key) > self.ndim:
            raise _outside(f"{len(key)} indices for {self!r}")
        key = key + (slice(None),) * (self.ndim - len(key))
        shape, strides, offset, scalars, vector = [], [], self.offset, list(self._scalars), self._vector
        dropped = []
        for dim, (item, size, stride) in enumerate(zip(key, self.shape, self.strides, strict=True)):
            if isinstance(item, slice):
                if any(_is_dynamic(v) for v in (item.start, item.stop, item.step)):
                    raise TypeError(f"{self!r}: a slice bound must be a Python int; use nl.ds(register, size)")
                step = 1 if item.step is None else operator.index(item.step)
                start = 0 if item.start is None else operator.index(item.start)
                stop = size if item.stop is None else operator.index(item.stop)
                start, stop = start + size * (start < 0), stop + size * (stop < 0)
                self._slice_check(dim, start, stop, step)
                count = -(-(stop - start) // step)
                if dim == 0 and vector is not None and start:
                    raise _illegal(f"{self!r}: the indexed dim of an indirect view cannot be sliced")
                offset += start * stride
                shape.append(count)
                strides.append(stride * step)
            elif isinstance(item, ds):
                if _is_dynamic(item.start):
                    _check_scalar_index("nl.ds", item.start)
                    if self.on_chip and dim == 0:
                        raise _illegal(f"{self!r}: a run-time index on the partition dim")
                    scalars.append((item.start, stride, size - item.size))
                else:
                    start = operator.index(item.start)
                    self._slice_check(dim, start, start + item.size, 1)
                    offset += start * stride
                shape.append(item.size)
                strides.append(stride)
            elif _is_dynamic(item):
                _check_scalar_index("index", item)
                if self.on_chip and dim == 0:
                    raise _illegal(f"{self!r}: a run-time index on the partition dim")
                scalars.append((item, stride, size - 1))
                dropped.append((len(shape), stride))
                shape.append(1)
                strides.append(stride)
            elif item is None:
                raise TypeError("None is not an NKI index; use expand_dim")
            else:
                index = operator.index(item)
                if not -size <= index < size:
                    raise _outside(f"index {index} of dim {dim} with size {size} of {self!r}")
                offset += (index % size) * stride
                dropped.append((len(shape), stride))
                shape.append(1)
                strides.append(stride)
        if self.on_chip:
            # On chip dim 0 stays, and at least two dims stay.
            drop = [i for i, _ in dropped if i != 0]
            drop = drop[: max(0, len(shape) - 2)] if len(shape) - len(drop) < 2 else drop
        else:
            drop = [i for i, _ in dropped]
        shape = [s for i, s in enumerate(shape) if i not in drop]
        strides = [s for i, s in enumerate(strides) if i not in drop]
        return self._view(shape, strides, offset, scalars=tuple(scalars), vector=vector)

    def _slice_check(self, dim, start, stop, step):
        size = self.shape[dim]
        if step < 1:
            raise _illegal(f"{self!r}: slice step {step} on dim {dim}; steps are at least 1")
        if not 0 <= start < stop <= size:
            raise _outside(
                f"{self!r}: slice [{start}:{stop}] of dim {dim} with size {size}; slices are not clamped and not empty"
            )
        if step > 1 and dim == 0 and self.on_chip:
            raise _illegal(f"{self!r}: partitions cannot be strided (step {step} on dim 0)")

    def __setitem__(self, key, value):
        raise TypeError("NkiTensor does not take assignments: write with a nisa instruction whose dst is the view")

    def __iter__(self):
        raise TypeError("NkiTensor is not iterable: index it")

    def slice(self, dim, start, end, step=1):
        dim = self._dim(dim, "slice")
        self._slice_check(dim, start, end, step)
        return self[(slice(None),) * dim + (slice(start, end, step),)]

    def select(self, dim, index):
        dim = self._dim(dim, "select")
        return self[(slice(None),) * dim + (index,)]

    def vector_select(self, dim, vector_offset):
        if self.on_chip or operator.index(dim) != 0:
            raise _illegal("NkiTensor.vector_select: HBM tensors and dim 0 only")
        _check_index_tile(vector_offset)
        if vector_offset.free != 1:
            raise _illegal(f"NkiTensor.vector_select: the index is a (P, 1) tile in SBUF, given {vector_offset!r}")
        return NkiTensor(
            (vector_offset.shape[0], *self.shape[1:]),
            self.dtype,
            self.storage,
            self.buffer,
            self.name,
            strides=self.strides,
            offset=self.offset,
            scalars=self._scalars,
            vector=(vector_offset, self.strides[0]),
        )

    def permute(self, dims):
        dims = tuple(self._dim(d, "permute") for d in dims)
        if sorted(dims) != list(range(self.ndim)):
            raise _illegal(f"NkiTensor.permute: {dims} is not a permutation of {self.ndim} dims")
        if self.on_chip and dims[0] != 0:
            raise _illegal(f"NkiTensor.permute: dims[0] must be 0 on chip, given {dims}")
        return self._view([self.shape[d] for d in dims], [self.strides[d] for d in dims])

    def broadcast(self, dim, size):
        on_hbm_partition = not self.on_chip
        dim = self._dim(dim, "broadcast", free=not on_hbm_partition)
        if self.shape[dim] != 1:
            raise _illegal(f"NkiTensor.broadcast: dim {dim} has size {self.shape[dim]}, only size 1 broadcasts")
        shape, strides = list(self.shape), list(self.strides)
        shape[dim], strides[dim] = operator.index(size), 0
        return self._view(shape, strides)

    def expand_dim(self, dim):
        dim = operator.index(dim)
        dim = dim + self.ndim + 1 if dim < 0 else dim
        if not 0 <= dim <= self.ndim or (self.on_chip and dim == 0):
            raise _illegal(f"NkiTensor.expand_dim: dim {dim} of {self!r}")
        shape, strides = list(self.shape), list(self.strides)
        stride = shape[dim] * strides[dim] if dim < self.ndim else 1
        shape.insert(dim, 1)
        strides.insert(dim, stride)
        return self._view(shape, strides)

    def squeeze_dim(self, dim):
        dim = self._dim(dim, "squeeze_dim", free=True)
        if self.shape[dim] != 1:
            raise _illegal(f"NkiTensor.squeeze_dim: dim {dim} has size {self.shape[dim]}, not 1")
        if self.on_chip and self.ndim == 2:
            raise _illegal("NkiTensor.squeeze_dim: on-chip tensors keep at least 2 dims")
        return self._view(self.shape[:dim] + self.shape[dim + 1 :], self.strides[:dim] + self.strides[dim + 1 :])

    def reshape_dim(self, dim, shape):
        dim = self._dim(dim, "reshape_dim", free=True)
        parts = [operator.index(s) for s in shape]
        if parts.count(-1) > 1:
            raise _illegal("NkiTensor.reshape_dim: at most one -1")
        if -1 in parts:
            known = -math.prod(parts)
            if not known or self.shape[dim] % known:
                raise _illegal(f"NkiTensor.reshape_dim: {self.shape[dim]} does not divide into {tuple(shape)}")
            parts[parts.index(-1)] = self.shape[dim] // known
        if math.prod(parts) != self.shape[dim]:
            raise _illegal(f"NkiTensor.reshape_dim: dim {dim} of size {self.shape[dim]} into {tuple(parts)}")
        strides = [s * self.strides[dim] for s in _row_major(parts)]
        return self._view(
            self.shape[:dim] + tuple(parts) + self.shape[dim + 1 :],
            self.strides[:dim] + tuple(strides) + self.strides[dim + 1 :],
        )

    def flatten_dims(self, start_dim, end_dim):
        start, end = self._dim(start_dim, "flatten_dims", free=True), self._dim(end_dim, "flatten_dims")
        if start > end:
            raise _illegal(f"NkiTensor.flatten_dims: range {start}..{end}")
        merged = _merge(self.shape[start : end + 1], self.strides[start : end + 1])
        if merged is None:
            raise _illegal(f"NkiTensor.flatten_dims: dims {start}..{end} of {self!r} are not contiguous")
        return self._view(
            (*self.shape[:start], merged[0], *self.shape[end + 1 :]),
            (*self.strides[:start], merged[1], *self.strides[end + 1 :]),
        )

    def reshape(self, shape):
        shape = [operator.index(s) for s in (shape if isinstance(shape, (tuple, list)) else (shape,))]
        if shape.count(-1) == 1:
            known = -math.prod(shape)
            shape[shape.index(-1)] = self.size // known if known else 0
        if math.prod(shape) != self.size:
            raise _illegal(
                f"NkiTensor.reshape: {self.shape} has {self.size} elements, {tuple(shape)} has {math.prod(shape)}"
            )
        if self.on_chip:
            if not shape or shape[0] != self.shape[0]:
                raise _illegal(
                    f"NkiTensor.reshape: shape[0] is the partition dim and stays {self.shape[0]}, given {tuple(shape)}"
                )
            if len(shape) < 2:
                raise _illegal("NkiTensor.reshape: on-chip tensors keep at least 2 dims")
            strides = _reshape_strides(self.shape[1:], self.strides[1:], shape[1:])
            strides = None if strides is None else (self.strides[0], *strides)
        else:
            strides = _reshape_strides(self.shape, self.strides, shape)
        if strides is None:
            raise _illegal(
                f"NkiTensor.reshape: {self.shape} with strides {self.strides} cannot be viewed as "
                f"{tuple(shape)} without a copy"
            )
        return self._view(shape, strides)

    def rearrange(self, src_pattern, dst_pattern, fixed_sizes=None):
        """einops-like: patterns are tuples of names, a nested tuple is a group."""
        sizes = dict(fixed_sizes or {})
        if len(src_pattern) != self.ndim:
            raise _illegal(f"NkiTensor.rearrange: pattern {src_pattern} for rank {self.ndim}")
        names, shape, strides = [], [], []
        for item, size, stride in zip(src_pattern, self.shape, self.strides, strict=True):
            group = item if isinstance(item, (tuple, list)) else (item,)
            unknown = [g for g in group if g not in sizes and g != 1]
            if len(group) == 1 and group[0] != 1:
                sizes.setdefault(group[0], size)
            elif len(unknown) == 1:
                known = math.prod(sizes[g] for g in group if g != 1 and g not in unknown)
                if size % known:
                    raise _illegal(f"NkiTensor.rearrange: {size} does not divide by {known} in {item}")
                sizes[unknown[0]] = size // known
            elif unknown:
                raise _illegal(f"NkiTensor.rearrange: sizes of {unknown} in {item} are not known")
            parts = [1 if g == 1 else sizes[g] for g in group]
            if math.prod(parts) != size:
                raise _illegal(f"NkiTensor.rearrange: {item} has {math.prod(parts)} elements, the dim has {size}")
            for g, n, s in zip(group, parts, _row_major(parts), strict=True):
                if g == 1:
                    continue
                if g in names:
                    raise _illegal(f"NkiTensor.rearrange: {g!r} appears twice in {src_pattern}")
                names.append(g)
                shape.append(n)
                strides.append(s * stride)
        flat = [g for item in dst_pattern for g in (item if isinstance(item, (tuple, list)) else (item,)) if g != 1]
        if sorted(map(str, flat)) != sorted(map(str, names)):
            raise _illegal(f"NkiTensor.rearrange: {dst_pattern} does not name the dims of {src_pattern}")
        if self.on_chip:
            first_src = src_pattern[0] if isinstance(src_pattern[0], (tuple, list)) else (src_pattern[0],)
            first_dst = dst_pattern[0] if isinstance(dst_pattern[0], (tuple, list)) else (dst_pattern[0],)
            if tuple(first_src) != tuple(first_dst):
                raise _illegal("NkiTensor.rearrange: the partition dim stays first and whole on chip")
        new_shape, new_strides = [], []
        for item in dst_pattern:
            group = [g for g in (item if isinstance(item, (tuple, list)) else (item,)) if g != 1]
            at = [names.index(g) for g in group]
            merged = _merge([shape[i] for i in at], [strides[i] for i in at])
            if merged is None:
                raise _illegal(f"NkiTensor.rearrange: {item} is not contiguous in {self!r}")
            new_shape.append(merged[0])
            new_strides.append(merged[1])
        return self._view(new_shape, new_strides)

    def view(self, dtype):
        dtype = as_dtype(dtype)
        old, new = self.dtype.itemsize, dtype.itemsize
        if old == new:
            return self._view(self.shape, self.strides, dtype=dtype)
        if self.shape[-1] != 1 and self.strides[-1] != 1:
            raise _illegal(f"NkiTensor.view: the last dim of {self!r} is not contiguous")
        if self.ndim == 1 and self.on_chip:
            raise _illegal("NkiTensor.view: no free dim to rescale")

        def scaled(elements, what):
            if (elements * old) % new:
                raise _illegal(f"NkiTensor.view: {what} {elements} of {self.dtype} is no whole number of {dtype}")
            return elements * old // new

        shape = (*self.shape[:-1], scaled(self.shape[-1], "last dim"))
        strides = (*(scaled(s, "stride") for s in self.strides[:-1]), 1)
        scalars = tuple((source, scaled(stride, "stride"), limit) for source, stride, limit in self._scalars)
        vector = None if self._vector is None else (self._vector[0], scaled(self._vector[1], "stride"))
        return self._view(shape, strides, scaled(self.offset, "offset"), dtype, scalars, vector)

    def ap(self, pattern, offset=None, scalar_offset=None, vector_offset=None, indirect_dim=0, dtype=None):
        """Raw [[stride, count], ...] over the storage; offset None keeps this view's own start."""
        dtype = self.dtype if dtype is None else as_dtype(dtype)
        ratio_old, ratio_new = self.dtype.itemsize, dtype.itemsize
        pattern = [[operator.index(s), operator.index(n)] for s, n in pattern]
        if offset is None:
            offset = self.offset * ratio_old // ratio_new
        if scalar_offset is not None and vector_offset is not None:
            raise _illegal("NkiTensor.ap: scalar_offset and vector_offset are exclusive")
        if self.on_chip:
            row = self.storage.row_bytes // ratio_new
            if len(pattern) > MAX_RANK:
                raise _illegal(f"NkiTensor.ap: {len(pattern)} pairs; on-chip patterns have at most {MAX_RANK}")
            if len(pattern) < 2:
                raise _illegal("NkiTensor.ap: on-chip patterns have at least 2 pairs")
            if pattern[0][1] > 1 and pattern[0][0] != row:
                raise _illegal(
                    f"NkiTensor.ap: the partition stride {pattern[0][0]} must be the storage's free size "
                    f"{row}: partitions cannot be strided"
                )
        if any(n < 1 or s < 0 for s, n in pattern):
            raise _illegal(f"NkiTensor.ap: pattern {pattern} needs counts >= 1 and strides >= 0")
        stride = self.strides[indirect_dim] * ratio_old // ratio_new
        scalars: tuple = ()
        vector = None
        if scalar_offset is not None:
            _check_scalar_index("scalar_offset", scalar_offset)
            if isinstance(scalar_offset, (int, np.integer)):
                offset += int(scalar_offset) * stride
            else:
                scalars = ((scalar_offset, stride, None),)
        if vector_offset is not None:
            if self.on_chip:
                raise _illegal("NkiTensor.ap: vector_offset indexes HBM tensors only")
            _check_index_tile(vector_offset)
            if vector_offset.size < pattern[0][1]:
                raise _illegal(
                    f"NkiTensor.ap: vector_offset has {vector_offset.size} indices for {pattern[0][1]} rows of pattern"
                )
            vector = (vector_offset, stride)
        return NkiTensor(
            [n for _, n in pattern],
            dtype,
            self.storage,
            self.buffer,
            self.name,
            strides=[s for s, _ in pattern],
            offset=offset,
            scalars=scalars,
            vector=vector,
        )

    def indirect(self, index, num_elem=None):
        """v4 tensor indirection: the free elements of each partition are picked by a snake-ordered index tile."""
        if machine.active().generation < 4:
            raise _illegal("NkiTensor.indirect: gen4 and later")
        if not self.on_chip or not index.on_chip or not index.dtype.is_integer:
            raise _illegal("NkiTensor.indirect: an on-chip tensor and an on-chip integer index tile")
        if index.start_partition % 32:
            raise _illegal(
                f"NkiTensor.indirect: the index starts at partition {index.start_partition}, not a multiple of 32"
            )
        count = operator.index(num_elem) if num_elem is not None else index.free * 16
        return NkiTensor(
            (self.shape[0], count),
            self.dtype,
            self.storage,
            self.buffer,
            self.name,
            strides=(self.row, 1),
            offset=self.offset,
            gather=(index, count),
        )


def _check_index_tile(index):
    """A (P, 1) tile; dma_transpose alone takes (128, k), read column by column."""
    if not isinstance(index, NkiTensor) or index.buffer is not MemoryRegion.sbuf:
        raise _illegal(f"vector_offset: the index is a (P, 1) tile in SBUF, given {index!r}")
    if index.dtype.name not in ("int32", "uint32"):
        raise _illegal(f"vector_offset: the index is int32 or uint32, given {index.dtype}")


def _check_scalar_index(what, index):
    """A register, or an integer 1 x 1 tile in SBUF."""
    if isinstance(index, NkiTensor) and (
        index.size != 1 or index.buffer is not MemoryRegion.sbuf or not index.dtype.is_integer
    ):
        raise _illegal(f"{what}: a run-time index is a register or an integer 1 x 1 tile in SBUF, given {index!r}")


def _row_major(shape):
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _merge(shape, strides):
    """(size, stride) of dims flattened into one, or None."""
    dims = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    if not dims:
        return (math.prod(shape), strides[-1] if strides else 1)
    for (_, s0), (n1, s1) in itertools.pairwise(dims):
        if s0 != n1 * s1:
            return None
    return math.prod(shape), dims[-1][1]


def _reshape_strides(shape, strides, new_shape):
    """Strides that view `shape` as `new_shape`, or None where that needs a copy."""
    old = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    chunks: list[list] = []  # maximal runs of contiguous dims: [size, innermost stride]
    for n, s in old:
        if chunks and chunks[-1][1] == n * s:
            chunks[-1] = [chunks[-1][0] * n, s]
        else:
            chunks.append([n, s])
    result = [0] * len(new_shape)
    chunk = len(chunks) - 1
    left, step = (chunks[chunk][0], chunks[chunk][1]) if chunks else (1, 1)
    for i in range(len(new_shape) - 1, -1, -1):
        n = new_shape[i]
        if n == 1:
            result[i] = step
            continue
        while left == 1 and chunk > 0:
            chunk -= 1
            left, step = chunks[chunk]
        if left % n:
            return None
        result[i] = step
        step, left = step * n, left // n
    return tuple(result)


def allocate(shape, dtype, buffer, name="", fill=None, data=None) -> NkiTensor:
    """A fresh tensor on `buffer`, filled with poison."""
    core = machine.active()
    if isinstance(shape, (int, np.integer)):
        shape = (shape,)
    shape = tuple(operator.index(s) for s in shape)
    dtype = as_dtype(dtype)
    if not isinstance(buffer, MemoryRegion):
        raise _unplaced(
            f"nl.ndarray: buffer {buffer!r} is no buffer object; pass nl.sbuf, nl.psum, nl.hbm or nl.shared_hbm"
        )
    if any(s < 1 for s in shape):
        raise _unplaced(f"nl.ndarray: shape {shape} has an empty dim")
    if buffer.on_chip:
        if len(shape) < 2:
            raise _unplaced(f"nl.ndarray: on-chip tensors have at least 2 dims, given {shape}")
        if len(shape) > MAX_RANK:
            raise _unplaced(f"nl.ndarray: on-chip tensors have at most {MAX_RANK} dims, given {shape}")
        if shape[0] > PMAX:
            raise _unplaced(f"nl.ndarray: partition dim {shape[0]} exceeds {PMAX} (nl.tile_size.pmax)")
        row_bytes = math.prod(shape[1:]) * dtype.itemsize
        if buffer is MemoryRegion.psum:
            limit = machine.BANK_BYTES * (machine.PSUM_BANKS if core.generation >= 4 else 1)
            if row_bytes > limit:
                raise _unplaced(
                    f"nl.ndarray: a PSUM tile of {row_bytes} bytes per partition; gen{core.generation} "
                    f"takes at most {limit} (nl.tile_size.psum_bank_fmax_bytes)"
                )
        elif row_bytes > core.spec.sbuf_usable_bytes:
            raise _unplaced(
                f"nl.ndarray: an SBUF tile of {row_bytes} bytes per partition; gen{core.generation} has "
                f"{core.spec.sbuf_usable_bytes} usable (nl.tile_size.sbuf_fmax_bytes)"
            )
        storage = core.allocate(buffer, shape[0], row_bytes, name, dtype, data)
        strides = (row_bytes // dtype.itemsize, *_row_major(shape[1:]))
    else:
        storage = core.allocate(buffer, 1, math.prod(shape) * dtype.itemsize, name, dtype, data)
        strides = _row_major(shape)
    return NkiTensor(shape, dtype, storage, buffer, name, strides=strides)


def fill_poison(tensor):
    tensor.array()[...] = poison(tensor.dtype)
