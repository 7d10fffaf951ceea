"""y = exp(x - max) / sum over the last dim.

128 rows on partitions. A row of up to WHOLE elements is read once: maximum on Vector, exp with its sum on Scalar, the
division as one multiply split between Vector and Scalar. Wider rows are read three times. An all -inf row is NaN.
"""

# Plain loops with append: the parser front end takes a subset of Python.
# ruff: noqa: PERF401

import nki
import nki.isa as nisa
import nki.language as nl

from ._arrays import refuse_dtypes, refuse_empty, rows
from ._tiles import DTYPES, add_columns, column, load, my_tiles

WHOLE = 8192
CHUNK = 4096


def _row_max(chunks):
    """[P, 1] of minus the maximum over the chunks."""
    p = chunks[0].shape[0]
    tops = nl.ndarray((p, len(chunks)), nl.float32, buffer=nl.sbuf)
    for i in range(len(chunks)):
        nisa.tensor_reduce(dst=tops[:, i : i + 1], op=nl.maximum, data=chunks[i], axis=1)
    return _minus_top(tops)


def _minus_top(tops):
    result = column(tops.shape[0])
    nisa.tensor_reduce(dst=result, op=nl.maximum, data=tops, axis=1, negate=True)
    return result


def _exp(data, minus_top, partial):
    """exp(data - top) in float32, its sum over the free dim into partial [P, 1]."""
    power = nl.ndarray(data.shape, nl.float32, buffer=nl.sbuf)
    nisa.activation(
        dst=power,
        op=nl.exp,
        data=data,
        bias=minus_top,
        reduce_op=nl.add,
        reduce_res=partial,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )
    return power


def _scaled(power, inverse, dtype):
    """power * inverse in the result's dtype; Vector takes two columns in five, Scalar the rest."""
    p, n = power.shape
    y = nl.ndarray((p, n), dtype, buffer=nl.sbuf)
    cut = (2 * n // 5) // 2 * 2
    if cut > 0:
        nisa.tensor_scalar(dst=y[:, 0:cut], data=power[:, 0:cut], op0=nl.multiply, operand0=inverse)
    nisa.activation(dst=y[:, cut:n], op=nl.copy, data=power[:, cut:n], scale=inverse)
    return y


@nki.jit
def softmax_kernel(x, y_dtype):
    """x: [rows, n] -> y [rows, n]."""
    total, n = x.shape
    dtype = DTYPES[y_dtype]
    y_hbm = nl.ndarray((total, n), dtype, buffer=nl.shared_hbm)
    width = min(n, CHUNK)
    starts = range(0, n, width)
    first, last = my_tiles(total, 128)
    for r in range(first, last, 128):
        end = min(last, r + 128)
        p = end - r
        partials = nl.ndarray((p, len(starts)), nl.float32, buffer=nl.sbuf)
        inverse = column(p)
        if n <= WHOLE:
            chunks = []
            for c in starts:
                chunks.append(load(x[r:end, c : min(n, c + width)], x.dtype))
            minus_top = _row_max(chunks)
            powers = []
            for i in range(len(starts)):
                powers.append(_exp(chunks[i], minus_top, partials[:, i : i + 1]))
            nisa.reciprocal(dst=inverse, data=add_columns(partials, len(starts)))
            for i in range(len(starts)):
                c = starts[i]
                y = _scaled(powers[i], inverse, dtype)
                nisa.dma_copy(dst=y_hbm[r:end, c : min(n, c + width)], src=y)
        else:
            tops = nl.ndarray((p, len(starts)), nl.float32, buffer=nl.sbuf)
            for i in range(len(starts)):
                c = starts[i]
                data = load(x[r:end, c : min(n, c + width)], x.dtype)
                nisa.tensor_reduce(dst=tops[:, i : i + 1], op=nl.maximum, data=data, axis=1)
            minus_top = _minus_top(tops)
            for i in range(len(starts)):
                c = starts[i]
                _exp(load(x[r:end, c : min(n, c + width)], x.dtype), minus_top, partials[:, i : i + 1])
            nisa.reciprocal(dst=inverse, data=add_columns(partials, len(starts)))
            for i in range(len(starts)):
                c = starts[i]
                data = load(x[r:end, c : min(n, c + width)], x.dtype)
                y = _scaled(_exp(data, minus_top, partials[:, i : i + 1]), inverse, dtype)
                nisa.dma_copy(dst=y_hbm[r:end, c : min(n, c + width)], src=y)
    return y_hbm


def supports(x, **rest):
    return refuse_dtypes({"x": x}) or refuse_empty({"x": x})


def run(x, *, outs, cores=1):
    """`outs`: {"y": dtype name}."""
    return {"y": softmax_kernel[cores](rows(x), outs["y"]).reshape(tuple(x.shape))}
