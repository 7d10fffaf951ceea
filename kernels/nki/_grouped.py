"""Grouped products: each group's rows times the group's own matrix, with group ends read on the device.

Group ends are run-time values, so each group runs a device loop over its row tiles: 128 row indices (those past the
group's end pushed out of bounds) gather the rows by indirect DMA, and scatter the result; out-of-bounds entries are
skipped. Weights of one group and column block stay in SBUF during the loop. Two cores split the columns. A contraction
above SEGMENT columns is cut; the parts add up in float32 in HBM.
"""

# Plain loops with append: the parser front end takes a subset of Python.
# ruff: noqa: PERF401

import nki
import nki.isa as nisa
import nki.language as nl

from ._tiles import DTYPES, constant, load_across, my_tiles
from .matmul import load_contraction

WEIGHT_BYTES = 65536
SUM_BYTES = 65536
SEGMENT = 16384  # columns of one row of a in SBUF
BEYOND = 1 << 30


def _group_ends(offsets, total):
    """(ends [1, G + 1], the same on 128 partitions), int32: 0, then cumulative ends, at most total."""
    groups = offsets.shape[1]
    ends = nl.ndarray((1, groups + 1), nl.int32, buffer=nl.sbuf)
    nisa.memset(dst=ends[:, 0:1], value=0)
    nisa.dma_copy(dst=ends[:, 1 : groups + 1], src=offsets)
    limit = constant(1, 1, total, nl.int32)
    for g in range(1, groups + 1):
        here = ends[:, g : g + 1]
        nisa.tensor_tensor(dst=here, data1=here, data2=ends[:, g - 1 : g], op=nl.maximum)
        nisa.tensor_tensor(dst=here, data1=here, data2=limit, op=nl.minimum)
    scratch = nl.ndarray((1, groups + 1), nl.int32, buffer=nl.private_hbm)
    nisa.dma_copy(dst=scratch, src=ends)
    return ends, load_across(scratch, 128, 0, groups + 1, nl.int32)


def _register(tile_sbuf):
    register = nisa.register_alloc()
    nisa.register_load(register, tile_sbuf)
    return register


def _row_indices(start, end_across, lanes, scratch):
    """[128, 1] int32: start + partition, or out of bounds at and past the end. Integer-exact on GpSimd."""
    nisa.register_store(scratch, start)
    index = load_across(scratch, 128, 0, 1, nl.int32)
    nisa.tensor_tensor(dst=index, data1=index, data2=lanes, op=nl.add, engine=nisa.engine.gpsimd)
    past = nl.ndarray((128, 1), nl.int32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=past, data1=index, data2=end_across, op=nl.greater_equal, engine=nisa.engine.gpsimd)
    far = constant(128, 1, BEYOND, nl.int32)
    nisa.tensor_tensor(dst=past, data1=past, data2=far, op=nl.multiply, engine=nisa.engine.gpsimd)
    nisa.tensor_tensor(dst=index, data1=index, data2=past, op=nl.add, engine=nisa.engine.gpsimd)
    return index


def _gather(src, index, start, stop):
    """[128, stop - start] of the indexed rows; zeros where the index is out of bounds."""
    tile_sbuf = constant(128, stop - start, 0.0, src.dtype)
    nisa.dma_copy(
        dst=tile_sbuf, src=src.vector_select(0, index)[:, start:stop], oob_mode=nisa.oob_mode.skip
    )
    return tile_sbuf


def _scatter(dst, index, start, stop, tile_sbuf):
    nisa.dma_copy(
        dst=dst.vector_select(0, index)[:, start:stop], src=tile_sbuf, oob_mode=nisa.oob_mode.skip
    )


def _lanes():
    lanes = nl.ndarray((128, 1), nl.int32, buffer=nl.sbuf)
    nisa.iota(dst=lanes, pattern=[[0, 1]], offset=0, channel_multiplier=1)
    return lanes


@nki.jit
def grouped_kernel(a, b, offsets, turned, y_dtype):
    """a [total, k], b [groups, k, n] (or [groups, n, k] if turned), offsets [1, groups] -> y [total, n]."""
    total, k = a.shape
    groups, n = b.shape[0], b.shape[2]
    if turned:
        n = b.shape[1]
    dtype = DTYPES[y_dtype]
    y_hbm = nl.ndarray((total, n), dtype, buffer=nl.shared_hbm)
    scratch = nl.ndarray((1, 1), nl.int32, buffer=nl.private_hbm)
    ends, ends_across = _group_ends(offsets, total)
    lanes = _lanes()
    partial_hbm = y_hbm
    if k > SEGMENT:
        partial_hbm = nl.ndarray((total, n), nl.float32, buffer=nl.private_hbm)
    n_block = max(128, min(2048, WEIGHT_BYTES // ((min(k, SEGMENT) + 127) // 128 * a.dtype.itemsize) // 128 * 128))
    first, last = my_tiles(n, 128)
    for g in range(groups):
        start = _register(ends[:, g : g + 1])
        end = _register(ends[:, g + 1 : g + 2])
        end_across = ends_across[:, g + 1 : g + 2]
        for n0 in range(first, last, n_block):
            n1 = min(last, n0 + n_block)
            for s0 in range(0, k, SEGMENT):
                s1 = min(k, s0 + SEGMENT)
                weights = []
                for k0 in range(s0, s1, 128):
                    weights.append(load_contraction(b[g], turned, k0, min(s1, k0 + 128), n0, n1))

                def body(row, weights=weights, s0=s0, s1=s1, n0=n0, n1=n1, end_across=end_across):
                    index = _row_indices(row, end_across, lanes, scratch)
                    rows_sbuf = _gather(a, index, s0, s1)
                    lefts = []
                    for k0 in range(0, s1 - s0, 128):
                        k1 = min(s1 - s0, k0 + 128)
                        left = nl.ndarray((k1 - k0, 128), a.dtype, buffer=nl.sbuf)
                        nisa.dma_transpose(dst=left, src=rows_sbuf[:, k0:k1])
                        lefts.append(left)
                    before = rows_sbuf
                    if s0 > 0:
                        before = _gather(partial_hbm, index, n0, n1)
                    y = nl.ndarray((128, n1 - n0), dtype if s1 == k else nl.float32, buffer=nl.sbuf)
                    for c in range(0, n1 - n0, 512):
                        stop = min(n1 - n0, c + 512)
                        bank = nl.ndarray((128, stop - c), nl.float32, buffer=nl.psum)
                        for step in range(len(lefts)):
                            nisa.nc_matmul(
                                dst=bank,
                                stationary=lefts[step],
                                moving=weights[step][:, c:stop],
                                accumulate=step > 0,
                            )
                        if s0 > 0:
                            nisa.tensor_tensor(dst=y[:, c:stop], data1=before[:, c:stop], data2=bank, op=nl.add)
                        else:
                            nisa.tensor_copy(dst=y[:, c:stop], src=bank)
                    _scatter(y_hbm if s1 == k else partial_hbm, index, n0, n1, y)

                nl.fori_loop(start, end, body, step=128)
    after = _register(ends[:, groups : groups + 1])
    limit = constant(128, 1, total, nl.int32)

    def clear(row):
        index = _row_indices(row, limit, lanes, scratch)
        for n0 in range(first, last, 2048):
            n1 = min(last, n0 + 2048)
            _scatter(y_hbm, index, n0, n1, constant(128, n1 - n0, 0.0, dtype))

    nl.fori_loop(after, total, clear, step=128)
    return y_hbm


@nki.jit
def grouped_weight_kernel(grad, a, offsets, groups, y_dtype):
    """grad [total, n], a [total, k] -> grad_b [groups, k, n]: a_g.T @ grad_g, summed in SBUF in float32."""
    total, n = grad.shape
    k = a.shape[1]
    dtype = DTYPES[y_dtype]
    out_hbm = nl.ndarray((groups, k, n), dtype, buffer=nl.shared_hbm)
    scratch = nl.ndarray((1, 1), nl.int32, buffer=nl.private_hbm)
    ends, ends_across = _group_ends(offsets, total)
    lanes = _lanes()
    n_block = max(128, min(2048, SUM_BYTES // ((min(k, SEGMENT) + 127) // 128 * 4) // 128 * 128))
    first, last = my_tiles(n, 128)
    for g in range(groups):
        start = _register(ends[:, g : g + 1])
        end = _register(ends[:, g + 1 : g + 2])
        end_across = ends_across[:, g + 1 : g + 2]
        for s0 in range(0, k, SEGMENT):
            s1 = min(k, s0 + SEGMENT)
            steps = (s1 - s0 + 127) // 128
            for n0 in range(first, last, n_block):
                n1 = min(last, n0 + n_block)
                sums = []
                for step in range(steps):
                    sums.append(constant(min(s1 - s0, step * 128 + 128) - step * 128, n1 - n0, 0.0, nl.float32))

                def body(row, sums=sums, s0=s0, s1=s1, n0=n0, n1=n1, end_across=end_across):
                    index = _row_indices(row, end_across, lanes, scratch)
                    a_sbuf = _gather(a, index, s0, s1)
                    g_sbuf = _gather(grad, index, n0, n1)
                    for step in range(len(sums)):
                        k0, k1 = step * 128, min(s1 - s0, step * 128 + 128)
                        for c in range(0, n1 - n0, 512):
                            stop = min(n1 - n0, c + 512)
                            bank = nl.ndarray((k1 - k0, stop - c), nl.float32, buffer=nl.psum)
                            nisa.nc_matmul(dst=bank, stationary=a_sbuf[:, k0:k1], moving=g_sbuf[:, c:stop])
                            held = sums[step][:, c:stop]
                            nisa.tensor_tensor(dst=held, data1=held, data2=bank, op=nl.add)

                nl.fori_loop(start, end, body, step=128)
                for step in range(steps):
                    k0, k1 = s0 + step * 128, min(s1, s0 + step * 128 + 128)
                    nisa.dma_copy(dst=out_hbm[g, k0:k1, n0:n1], src=sums[step])
    return out_hbm
