"""y[rows of group g] = a[rows of group g] @ b[g], rows past the last offset 0; kernels and notes in _grouped.py."""

from . import _grouped
from ._layout import refuse_dtypes


def supports(a, b=None, offsets=None, y=None, *, allow_tf32=False):
    if a.shape[0] >= 2**31 - 2**16:
        return "more than 2**31 rows"
    return refuse_dtypes({"a": a, "b": b, "y": y})


def problem(a, b, offsets=None, y=None, *, allow_tf32=False):
    return _grouped.problem(a.shape[0], b.shape[0], b.shape[2], a.shape[1], a.dtype, allow_tf32)


candidates = _grouped.candidates


def prepare(a, b, offsets, y, *, allow_tf32=False, config=None):
    if y.numel() == 0:
        return []
    return [_grouped.rows_launch(a, b, b.strides, offsets, y, y.shape[1], a.shape[1], allow_tf32, config)]
