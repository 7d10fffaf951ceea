"""NKI dtypes: storage as NumPy sees it, and the casts of the compute engines.

Every engine reads to float32 and casts once on the write: floats round half to even (and overflow to infinity, as the
IEEE-like storage types do), integers round half to even and saturate.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np


class DType:
    """One NKI dtype. Prints as its plain name, hashes, and compares with NumPy dtypes and names."""

    __slots__ = ("dtype", "itemsize", "kind", "name", "packed")

    def __init__(self, name: str, storage, kind: str, packed: str | None = None):
        self.name = name
        self.dtype = np.dtype(storage)  # NumPy reads this attribute: np.zeros(n, dtype=nl.bfloat16) works
        self.itemsize = self.dtype.itemsize
        self.kind = kind  # f float, i signed, u unsigned (bool_ too), x packed four
        self.packed = packed  # the element type of a packed dtype

    def __repr__(self):
        return self.name

    __str__ = __repr__

    def __hash__(self):
        return hash(self.name)

    def __eq__(self, other):
        if isinstance(other, DType):
            return self.name == other.name
        if other is None:
            return False
        try:
            return self.name == as_dtype(other).name
        except TypeError:
            return False

    def __reduce__(self):
        return (as_dtype, (self.name,))

    @property
    def is_float(self):
        return self.kind == "f"

    @property
    def is_integer(self):
        return self.kind in "iu"


bool_ = DType("bool_", np.uint8, "u")
int8 = DType("int8", np.int8, "i")
int16 = DType("int16", np.int16, "i")
int32 = DType("int32", np.int32, "i")
uint8 = DType("uint8", np.uint8, "u")
uint16 = DType("uint16", np.uint16, "u")
uint32 = DType("uint32", np.uint32, "u")
float16 = DType("float16", np.float16, "f")
float32 = DType("float32", np.float32, "f")
bfloat16 = DType("bfloat16", ml_dtypes.bfloat16, "f")
tfloat32 = DType("tfloat32", np.float32, "f")
float8_e4m3 = DType("float8_e4m3", ml_dtypes.float8_e4m3, "f")
float8_e5m2 = DType("float8_e5m2", ml_dtypes.float8_e5m2, "f")
float8_e4m3fn = DType("float8_e4m3fn", ml_dtypes.float8_e4m3fn, "f")
float8_e8m0fnu = DType("float8_e8m0fnu", ml_dtypes.float8_e8m0fnu, "f")
float8_e5m2_x4 = DType("float8_e5m2_x4", np.uint32, "x", "float8_e5m2")
float8_e4m3fn_x4 = DType("float8_e4m3fn_x4", np.uint32, "x", "float8_e4m3fn")
float4_e2m1fn_x4 = DType("float4_e2m1fn_x4", np.uint16, "x", "float4_e2m1fn")

ALL = {d.name: d for d in list(globals().values()) if isinstance(d, DType)}
FLOAT8 = (float8_e4m3, float8_e5m2, float8_e4m3fn)
_BY_NUMPY = {d.dtype: d for d in ALL.values() if d.kind != "x" and d not in (bool_, tfloat32)}
_BY_NUMPY[np.dtype(np.bool_)] = bool_
_ALIASES = {"bool": bool_, "half": float16, "float": float32}


def as_dtype(value) -> DType:
    """The NKI dtype of a DType, its name, a NumPy dtype or a framework dtype; TypeError if there is none."""
    if isinstance(value, DType):
        return value
    if isinstance(value, str):
        name = value.rsplit(".", 1)[-1]
        found = ALL.get(name) or _ALIASES.get(name)
        if found is not None:
            return found
        raise TypeError(f"{value!r} is not an NKI dtype; known: {', '.join(ALL)}")
    if type(value).__module__.split(".")[0] == "torch":
        return as_dtype(str(value))
    try:
        storage = np.dtype(value)
    except TypeError:
        raise TypeError(f"{value!r} is not an NKI dtype; known: {', '.join(ALL)}") from None
    found = _BY_NUMPY.get(storage)
    if found is None and storage.names and len(storage.names) == 4:  # four packed elements as a NumPy record
        element = storage[storage.names[0]]
        found = {
            np.dtype(ml_dtypes.float8_e5m2): float8_e5m2_x4,
            np.dtype(ml_dtypes.float8_e4m3fn): float8_e4m3fn_x4,
        }.get(element)
    if found is None:
        raise TypeError(f"NumPy dtype {storage} has no NKI counterpart; known: {', '.join(ALL)}")
    return found


def _round_tf32(values: np.ndarray) -> np.ndarray:
    """float32 rounded half to even to ten mantissa bits."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1)))) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(values), rounded.view(np.float32), values)


def to_float32(values: np.ndarray, dtype: DType) -> np.ndarray:
    """What an engine sees when it reads `values` of `dtype`."""
    if dtype is bfloat16:
        return np.left_shift(values.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
    if dtype is float32:
        return values
    if dtype is tfloat32:
        return _round_tf32(values)
    if dtype.kind == "x":
        raise TypeError(f"a packed {dtype} tile has no float32 value; only nc_matmul_mx reads it")
    return values.astype(np.float32)


def from_float32(values: np.ndarray, dtype: DType) -> np.ndarray:
    """`values` (float32) cast once to `dtype`."""
    if dtype is float32:
        return values
    if dtype is tfloat32:
        return _round_tf32(values)
    if dtype is bool_:
        return (values != 0).astype(np.uint8)
    if dtype.kind == "x":
        raise TypeError(
            f"an engine cannot cast to packed {dtype}; only quantize_mx and copies of the same dtype write it"
        )
    if dtype.kind == "f":
        return values.astype(dtype.dtype)
    info = np.iinfo(dtype.dtype)
    rounded = np.rint(values.astype(np.float64))
    return np.where(np.isnan(rounded), 0, np.clip(rounded, info.min, info.max)).astype(dtype.dtype)


def poison(dtype: DType):
    """The value of fresh memory: NaN for floats, 4 for integers, as in the SDK's simulator."""
    if dtype.kind == "f":
        return np.array(np.nan, dtype=np.float32).astype(dtype.dtype)
    return dtype.dtype.type(4)


def unpack(values: np.ndarray, dtype: DType) -> np.ndarray:
    """Packed [...] to float32 [..., 4], lowest bits first."""
    values = np.ascontiguousarray(values)
    if dtype is float4_e2m1fn_x4:
        nibbles = (values[..., None] >> np.array([0, 4, 8, 12], np.uint16)) & np.uint16(15)
        return nibbles.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    element = ALL[dtype.packed or ""].dtype
    return values[..., None].view(np.uint8).view(element).astype(np.float32)
