"""y = activation(a @ b + bias) + residual, and optionally the preactivation a @ b + bias.

The contraction goes on partitions: a arrives as [k, m] pieces (by a DMA transpose where a is stored [m, k]), b as
[k, n]. A block of a stays in SBUF while strips of b stream past it; four [128, 512] PSUM banks accumulate over all
of k while the other four drain, alternately on Vector and Scalar. SBUF holds A_BYTES of a and B_BYTES of b on each
partition; when one block of the whole of k does not fit, both stream. Two cores split the batch, else the rows, else
the columns.
"""

# Plain loops with append: the parser front end takes a subset of Python.
# ruff: noqa: PERF401

import nki
import nki.isa as nisa
import nki.language as nl

from ._arrays import dense, matrices, refuse_dtypes, refuse_empty, rows
from ._tiles import DTYPES, load, load_across, my_tiles

A_BYTES = 65536
B_BYTES = 49152
BIAS_COLUMNS = 4096


def _activation_op(index):
    if index == 1:
        return nl.relu
    if index == 2:
        return nl.gelu
    if index == 3:
        return nl.gelu_apprx_tanh
    if index == 4:
        return nl.silu
    if index == 5:
        return nl.sigmoid
    return nl.tanh


def load_contraction(src, turned, k0, k1, start, stop):
    """[k1 - k0, stop - start] in SBUF of an operand stored [k, free], or [free, k] if turned."""
    tile_sbuf = nl.ndarray((k1 - k0, stop - start), src.dtype, buffer=nl.sbuf)
    if turned:
        nisa.dma_transpose(dst=tile_sbuf, src=src[start:stop, k0:k1])
    else:
        nisa.dma_copy(dst=tile_sbuf, src=src[k0:k1, start:stop])
    return tile_sbuf


def _load_strip(src, turned, k_first, k_last, start, stop):
    tiles = []
    for k0 in range(k_first, k_last, 128):
        tiles.append(load_contraction(src, turned, k0, min(k_last, k0 + 128), start, stop))
    return tiles


def _drain(dst, src, turn):
    """Copy out of PSUM, in turn on Vector and on Scalar."""
    if turn % 2 == 0:
        nisa.tensor_copy(dst=dst, src=src)
    else:
        nisa.activation(dst=dst, op=nl.copy, data=src)


def _epilogue(y, product_psum, pre, bias, residual, activation, has_pre, has_bias, has_residual, turn):
    """y and pre (SBUF views [m, n]) from one accumulated PSUM tile; each rounded once."""
    shape = product_psum.shape
    z = product_psum
    if has_bias:
        z = y
        if activation > 0 or has_residual or has_pre:
            z = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
        nisa.tensor_tensor(dst=z, data1=product_psum, data2=bias, op=nl.add)
    if has_pre:
        nisa.activation(dst=pre, op=nl.copy, data=z)
    if activation > 0:
        value = y
        if has_residual:
            value = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
        nisa.activation(dst=value, op=_activation_op(activation), data=z)
        z = value
    if has_residual:
        nisa.tensor_tensor(dst=y, data1=z, data2=residual, op=nl.add)
    elif activation == 0 and (has_pre or not has_bias):
        _drain(y, z, turn)


@nki.jit
def matmul_kernel(
    a, b, bias, residual, a_turned, b_turned, activation, y_dtype, has_pre, has_bias, has_residual,
):  # fmt: skip
    """a [Ba, k, m] (or [Ba, m, k]), b [Bb, k, n] (or [Bb, n, k]), bias [1, n], residual [B, m, n] -> y [B, m, n]."""
    batch = max(a.shape[0], b.shape[0])
    m, k = a.shape[1], a.shape[2]
    if not a_turned:
        k, m = a.shape[1], a.shape[2]
    n = b.shape[2]
    if b_turned:
        n = b.shape[1]
    dtype = DTYPES[y_dtype]
    y_hbm = nl.ndarray((batch, m, n), dtype, buffer=nl.shared_hbm)
    pre_hbm = y_hbm
    if has_pre:
        pre_hbm = nl.ndarray((batch, m, n), dtype, buffer=nl.shared_hbm)
    batches, rows_range, columns = (0, batch), (0, m), (0, n)
    if batch > 1:
        batches = my_tiles(batch, 1)
    elif m > 128:
        rows_range = my_tiles(m, 128)
    else:
        columns = my_tiles(n, 128)
    size = a.dtype.itemsize
    steps = (k + 127) // 128
    streamed = steps * size * 128 > A_BYTES or steps * size * 512 > 2 * B_BYTES
    m_block = 512
    n_block = 512
    if not streamed:
        m_block = max(128, min(1024, A_BYTES // (steps * size) // 128 * 128))
        n_block = max(512, min(2048, B_BYTES // (steps * size) // 512 * 512))
    bias_tiles = []
    if has_bias and n <= BIAS_COLUMNS:
        bias_tiles.append(load_across(bias, 128, 0, n, bias.dtype))
    turn = 0
    for i in range(batches[0], batches[1]):
        a_i = a[min(i, a.shape[0] - 1)]
        b_i = b[min(i, b.shape[0] - 1)]
        for m0 in range(rows_range[0], rows_range[1], m_block):
            m1 = min(rows_range[1], m0 + m_block)
            a_tiles = []
            if not streamed:
                a_tiles = _load_strip(a_i, a_turned, 0, k, m0, m1)
            for n0 in range(columns[0], columns[1], n_block):
                n1 = min(columns[1], n0 + n_block)
                b_tiles = []
                if not streamed:
                    b_tiles = _load_strip(b_i, b_turned, 0, k, n0, n1)
                for g0 in range(m0, m1, 512):
                    g1 = min(m1, g0 + 512)
                    starts = range(g0, g1, 128)
                    outs = []
                    pres = []
                    extras = []
                    for r in starts:
                        shape = (min(g1, r + 128) - r, n1 - n0)
                        outs.append(nl.ndarray(shape, dtype, buffer=nl.sbuf))
                        if has_pre:
                            pres.append(nl.ndarray(shape, dtype, buffer=nl.sbuf))
                        if has_residual:
                            extras.append(load(residual[i, r : min(g1, r + 128), n0:n1], residual.dtype))
                    for c in range(n0, n1, 512):
                        stop = min(n1, c + 512)
                        banks = []
                        for r in starts:
                            shape = (min(g1, r + 128) - r, stop - c)
                            banks.append(nl.ndarray(shape, nl.float32, buffer=nl.psum))
                        for step in range(steps):
                            if streamed:
                                k0, k1 = step * 128, min(k, step * 128 + 128)
                                left = load_contraction(a_i, a_turned, k0, k1, g0, g1)
                                right = load_contraction(b_i, b_turned, k0, k1, c, stop)
                                shift = g0
                            else:
                                left = a_tiles[step]
                                right = b_tiles[step][:, c - n0 : stop - n0]
                                shift = m0
                            for j in range(len(starts)):
                                r = starts[j]
                                nisa.nc_matmul(
                                    dst=banks[j],
                                    stationary=left[:, r - shift : min(g1, r + 128) - shift],
                                    moving=right,
                                )
                        for j in range(len(starts)):
                            p = banks[j].shape[0]
                            y = outs[j][:, c - n0 : stop - n0]
                            pre = other = shift_row = y
                            if has_pre:
                                pre = pres[j][:, c - n0 : stop - n0]
                            if has_residual:
                                other = extras[j][:, c - n0 : stop - n0]
                            if has_bias:
                                if n <= BIAS_COLUMNS:
                                    shift_row = bias_tiles[0][0:p, c:stop]
                                else:
                                    shift_row = load_across(bias, p, c, stop, bias.dtype)
                            _epilogue(
                                y, banks[j], pre, shift_row, other, activation, has_pre, has_bias, has_residual, turn
                            )
                            turn += 1
                    for j in range(len(starts)):
                        r = starts[j]
                        nisa.dma_copy(dst=y_hbm[i, r : min(g1, r + 128), n0:n1], src=outs[j])
                        if has_pre:
                            nisa.dma_copy(dst=pre_hbm[i, r : min(g1, r + 128), n0:n1], src=pres[j])
    if has_pre:
        return y_hbm, pre_hbm
    return y_hbm


def supports(a, b, bias=None, residual=None, **rest):
    outs = rest.get("outs") or {}
    given = {"a": a, "b": b, "bias": bias, "residual": residual, "y": outs.get("y")}
    return refuse_dtypes(given) or refuse_empty(given)


def run(a, b, bias=None, residual=None, *, activation, outs, cores=1):
    """`outs`: dtype names of y and preactivation (None: not wanted)."""
    shape = (*a.shape[:-1], b.shape[-1])
    left, a_turned = matrices(a)
    right, b_turned = matrices(b)
    if left.shape[0] > 1 and right.shape[0] == 1 and not a_turned:  # one matrix for the whole batch: more rows
        left = left.reshape(1, left.shape[0] * left.shape[1], left.shape[2])
    batch = max(left.shape[0], right.shape[0])
    m = left.shape[2] if a_turned else left.shape[1]
    extra = None if residual is None else rows(residual).reshape(batch, m, shape[-1])
    row = None if bias is None else dense(bias).reshape(1, shape[-1])
    wants_pre = outs.get("preactivation") is not None
    result = matmul_kernel[cores](
        left, right, row, extra, not a_turned, b_turned, int(activation), outs["y"], wants_pre, bias is not None,
        residual is not None,
    )  # fmt: skip
    if wants_pre:
        return {"y": result[0].reshape(shape), "preactivation": result[1].reshape(shape)}
    return {"y": result.reshape(shape)}
