"""Row normalisation, forward and backward, shared by layer_norm (centred) and rms_norm.

Rows go on partitions, 128 at a time, and stay in SBUF between the passes over them. Everything is float32 on chip,
rounded once on the way out. Forward, for each element: one load, one store; rows too wide for SBUF are read again
(the wide kernels). Work is split so that no engine outweighs the DMA: layer_norm's statistics run on Vector (bn_stats)
and, for seven columns in sixteen, on Scalar as one (count, mean, sum of squared deviations) triple; bn_aggr merges.
"""

# Plain loops with append: the parser front end takes a subset of Python.
# ruff: noqa: PERF401, SIM113

import nki
import nki.isa as nisa
import nki.language as nl

from ._arrays import dtype_name, refuse_dtypes, refuse_empty, rows
from ._tiles import DTYPES, add_columns, add_other_core, column, constant, load, load_across, my_tiles, sum_partitions

CHUNK = 4096  # columns of one load
RESIDENT = 8192  # columns of weight and bias kept on chip for all rows
RESIDENT_BYTES = 65536  # of a row that stays in SBUF between the passes over it
BACKWARD_RESIDENT = 8192  # columns with float32 accumulators of two weight gradients: 64 KiB of each partition
WIDEST = 1 << 20  # columns: the triples of their statistics take 61 KiB


def _centred_stats(stats, index, data, start, stop, on_scalar):
    """Write the triples of data[:, start:stop] into stats; returns how many triples."""
    p = data.shape[0]
    if on_scalar == 0:
        nisa.bn_stats(dst=stats[:, 3 * index : 3 * index + 6], data=data[:, start:stop])
        return 2
    count = stop - start
    junk = nl.ndarray((p, count), nl.float32, buffer=nl.sbuf)
    minus_mean = column(p)
    nisa.activation(
        dst=junk,
        op=nl.copy,
        data=data[:, start:stop],
        scale=-1.0 / count,
        reduce_op=nl.add,
        reduce_res=minus_mean,
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )
    nisa.memset(dst=stats[:, 3 * index : 3 * index + 1], value=float(count))
    nisa.tensor_scalar(
        dst=stats[:, 3 * index + 1 : 3 * index + 2], data=minus_mean, op0=nl.multiply, operand0=-1.0
    )
    nisa.activation(
        dst=junk,
        op=nl.square,
        data=data[:, start:stop],
        bias=minus_mean,
        reduce_op=nl.add,
        reduce_res=stats[:, 3 * index + 2 : 3 * index + 3],
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )
    return 1


def _inverse_deviation(variance, eps):
    """1 / sqrt(variance + eps), [P, 1]."""
    p = variance.shape[0]
    rstd = column(p)
    nisa.activation(dst=rstd, op=nl.rsqrt, data=variance, bias=constant(p, 1, eps, nl.float32))
    return rstd


def _pieces(first, width):
    pieces = []
    for start in range(first, width, 512):
        pieces.append((start, min(width, start + 512)))
    return pieces


def _open_statistics(p, n, width, centred):
    """Room for what _add_statistics finds in every chunk of up to `width` columns."""
    if centred:
        return nl.ndarray((p, 6 * ((n + 511) // 512 + 2 * ((n + width - 1) // width))), nl.float32, buffer=nl.sbuf)
    return nl.ndarray((p, (n + width - 1) // width), nl.float32, buffer=nl.sbuf)


def _add_statistics(stats, count, data, centred):
    """Put one chunk's triples, or its sum of squares, behind the first `count`; returns the new count."""
    if centred:
        width = data.shape[1]
        cut = 7 * width // 32 * 2 if width >= 1024 else 0
        if cut > 0:
            count += _centred_stats(stats, count, data, 0, cut, 1)
        for start, stop in _pieces(cut, width):
            count += _centred_stats(stats, count, data, start, stop, 0)
        return count
    junk = nl.ndarray(data.shape, nl.float32, buffer=nl.sbuf)
    nisa.activation(
        dst=junk,
        op=nl.square,
        data=data,
        reduce_op=nl.add,
        reduce_res=stats[:, count : count + 1],
        reduce_cmd=nisa.reduce_cmd.reset_reduce,
    )
    return count + 1


def _close_statistics(stats, count, n, centred, eps):
    """(mean, rstd) of the rows, [P, 1] each; not centred, the first is no mean and unused."""
    p = stats.shape[0]
    if centred:
        both = nl.ndarray((p, 2), nl.float32, buffer=nl.sbuf)
        nisa.bn_aggr(dst=both, data=stats[:, 0 : 3 * count])
        return both[:, 0:1], _inverse_deviation(both[:, 1:2], eps)
    mean_square = column(p)
    total = add_columns(stats, count)
    nisa.tensor_scalar(dst=mean_square, data=total, op0=nl.multiply, operand0=1.0 / n)
    return mean_square, _inverse_deviation(mean_square, eps)


def _statistics(chunks, n, centred, eps):
    """(mean, rstd) of a row tile from its chunks."""
    stats = _open_statistics(chunks[0].shape[0], n, chunks[0].shape[1], centred)
    count = 0
    for data in chunks:
        count = _add_statistics(stats, count, data, centred)
    return _close_statistics(stats, count, n, centred, eps)


def _hat(data, mean, rstd, centred):
    """(data - mean) * rstd in float32; without the mean if not centred."""
    xhat = nl.ndarray(data.shape, nl.float32, buffer=nl.sbuf)
    if centred:
        nisa.tensor_scalar(
            dst=xhat, data=data, op0=nl.subtract, operand0=mean, op1=nl.multiply, operand1=rstd
        )
    else:
        nisa.activation(dst=xhat, op=nl.copy, data=data, scale=rstd)
    return xhat


def _sum_into(dst, data):
    """dst [P, 1] = sum of each row, on Scalar."""
    junk = nl.ndarray(data.shape, nl.float32, buffer=nl.sbuf)
    nisa.activation(
        dst=junk, op=nl.copy, data=data, reduce_op=nl.add, reduce_res=dst, reduce_cmd=nisa.reduce_cmd.reset_reduce
    )


def _scaled_mean(partials, count, factor):
    """[P, 1]: factor times the sum of the first `count` columns."""
    result = column(partials.shape[0])
    nisa.tensor_scalar(dst=result, data=add_columns(partials, count), op0=nl.multiply, operand0=factor)
    return result


def _grad_x(result, g, xhat, minus_mean_gx, mean_g, rstd, extra, has_extra, centred):
    """result = rstd * (g - mean_g - xhat * mean_gx), plus extra if there is one."""
    inner = nl.ndarray(g.shape, nl.float32, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(
        dst=inner, data=xhat, op0=nl.multiply, operand0=minus_mean_gx, op1=nl.add, operand1=g
    )
    scaled = result
    if has_extra:
        scaled = nl.ndarray(g.shape, nl.float32, buffer=nl.sbuf)
    if centred:
        nisa.tensor_scalar(
            dst=scaled, data=inner, op0=nl.subtract, operand0=mean_g, op1=nl.multiply, operand1=rstd
        )
    else:
        nisa.tensor_scalar(dst=scaled, data=inner, op0=nl.multiply, operand0=rstd)
    if has_extra:
        nisa.tensor_tensor(dst=result, data1=scaled, data2=extra, op=nl.add)


def _weight_tile(weight, p, start, stop, offset):
    """weight + offset for these columns on every partition; in the weight's own dtype where no offset is added."""
    tile_sbuf = load_across(weight, p, start, stop, weight.dtype)
    if offset == 0.0:
        return tile_sbuf
    wide_sbuf = nl.ndarray((p, stop - start), nl.float32, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=wide_sbuf, data=tile_sbuf, op0=nl.add, operand0=offset)
    return wide_sbuf


def _apply(y, s, mean, rstd, w, b, centred, has_weight, has_bias):
    """y = (s - mean) * rstd * w + b on one chunk, rounded once."""
    shape = s.shape
    if centred and has_weight:
        scaled = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
        nisa.scalar_tensor_tensor(dst=scaled, data=s, op0=nl.subtract, operand0=mean, op1=nl.multiply, operand1=w)
        if has_bias:
            shifted = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
            nisa.activation(dst=shifted, op=nl.copy, data=scaled, scale=rstd)
            nisa.tensor_tensor(dst=y, data1=shifted, data2=b, op=nl.add, engine=nisa.engine.gpsimd)
        else:
            nisa.activation(dst=y, op=nl.copy, data=scaled, scale=rstd)
    elif centred:
        if has_bias:
            centre = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=centre, data=s, op0=nl.subtract, operand0=mean)
            nisa.scalar_tensor_tensor(dst=y, data=centre, op0=nl.multiply, operand0=rstd, op1=nl.add, operand1=b)
        else:
            nisa.tensor_scalar(
                dst=y, data=s, op0=nl.subtract, operand0=mean, op1=nl.multiply, operand1=rstd
            )
    elif has_weight:
        nisa.scalar_tensor_tensor(dst=y, data=s, op0=nl.multiply, operand0=rstd, op1=nl.multiply, operand1=w)
    else:
        nisa.tensor_scalar(dst=y, data=s, op0=nl.multiply, operand0=rstd)


@nki.jit
def norm_kernel(x, weight, bias, residual, eps, weight_offset, centred, has_weight, has_bias, has_residual):
    """x, residual: [rows, n]; weight, bias: [1, n] -> y [rows, n], and x + residual where there is one."""
    total, n = x.shape
    y_hbm = nl.ndarray((total, n), x.dtype, buffer=nl.shared_hbm)
    sum_hbm = y_hbm
    if has_residual:
        sum_hbm = nl.ndarray((total, n), x.dtype, buffer=nl.shared_hbm)
    width = min(n, CHUNK)
    starts = range(0, n, width)
    resident = n <= RESIDENT
    weights = []
    biases = []
    if resident:
        for c in starts:
            stop = min(n, c + width)
            if has_weight:
                weights.append(_weight_tile(weight, 128, c, stop, weight_offset))
            if has_bias:
                biases.append(load_across(bias, 128, c, stop, bias.dtype))
    first, last = my_tiles(total, 128)
    for r in range(first, last, 128):
        end = min(last, r + 128)
        p = end - r
        chunks = []
        for c in starts:
            stop = min(n, c + width)
            s = load(x[r:end, c:stop], x.dtype)
            if has_residual:
                other = load(residual[r:end, c:stop], x.dtype)
                joined = nl.ndarray((p, stop - c), x.dtype, buffer=nl.sbuf)
                nisa.tensor_tensor(dst=joined, data1=s, data2=other, op=nl.add)
                nisa.dma_copy(dst=sum_hbm[r:end, c:stop], src=joined)
                s = joined
            chunks.append(s)
        mean, rstd = _statistics(chunks, n, centred, eps)
        index = 0
        for c in starts:
            stop = min(n, c + width)
            w = b = mean
            if has_weight:
                w = weights[index][0:p] if resident else _weight_tile(weight, p, c, stop, weight_offset)
            if has_bias:
                b = biases[index][0:p] if resident else load_across(bias, p, c, stop, bias.dtype)
            y = nl.ndarray((p, stop - c), x.dtype, buffer=nl.sbuf)
            _apply(y, chunks[index], mean, rstd, w, b, centred, has_weight, has_bias)
            nisa.dma_copy(dst=y_hbm[r:end, c:stop], src=y)
            index += 1
    if has_residual:
        return y_hbm, sum_hbm
    return y_hbm


@nki.jit
def norm_backward_kernel(
    grad, grad_sum, x, weight, eps, weight_offset, centred, has_weight, has_grad_sum, need_x, need_weight, need_bias,
    weight_dtype,
):
    """grad, grad_sum, x: [rows, n]; weight [1, n] -> grad_x [rows, n], grad_weight [1, n], grad_bias [1, n].

    With g = grad * weight: grad_x = rstd * (g - mean(g) - xhat * mean(g * xhat)) + grad_sum; rms_norm has no mean(g).
    Weight gradients add up in SBUF row tile by row tile; a product with ones adds the 128 partitions at the end.
    """
    total, n = x.shape
    outs = []
    grad_x_hbm = grad_weight_hbm = grad_bias_hbm = x
    if need_x:
        grad_x_hbm = nl.ndarray((total, n), x.dtype, buffer=nl.shared_hbm)
        outs.append(grad_x_hbm)
    if need_weight:
        grad_weight_hbm = nl.ndarray((1, n), DTYPES[weight_dtype], buffer=nl.shared_hbm)
        outs.append(grad_weight_hbm)
    if need_bias:
        grad_bias_hbm = nl.ndarray((1, n), DTYPES[weight_dtype], buffer=nl.shared_hbm)
        outs.append(grad_bias_hbm)
    weight_sum = bias_sum = x
    if need_weight:
        weight_sum = constant(128, n, 0.0, nl.float32)
    if need_bias:
        bias_sum = constant(128, n, 0.0, nl.float32)
    w_all = x
    if has_weight:
        w_all = _weight_tile(weight, 128, 0, n, weight_offset)
    width = min(n, 2048)
    starts = range(0, n, width)
    count = len(starts)
    first, last = my_tiles(total, 128)
    for r in range(first, last, 128):
        end = min(last, r + 128)
        p = end - r
        chunks = []
        for c in starts:
            chunks.append(load(x[r:end, c : min(n, c + width)], x.dtype))
        mean, rstd = _statistics(chunks, n, centred, eps)
        grads = []
        hats = []
        sum_g = nl.ndarray((p, count), nl.float32, buffer=nl.sbuf)
        sum_gx = nl.ndarray((p, count), nl.float32, buffer=nl.sbuf)
        for i in range(count):
            c = starts[i]
            stop = min(n, c + width)
            shape = (p, stop - c)
            upstream = load(grad[r:end, c:stop], grad.dtype)
            xhat = _hat(chunks[i], mean, rstd, centred)
            product = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
            if need_weight:
                nisa.tensor_tensor(dst=product, data1=upstream, data2=xhat, op=nl.multiply)
                held = weight_sum[0:p, c:stop]
                nisa.tensor_tensor(dst=held, data1=held, data2=product, op=nl.add, engine=nisa.engine.gpsimd)
            if need_bias:
                held = bias_sum[0:p, c:stop]
                nisa.tensor_tensor(dst=held, data1=held, data2=upstream, op=nl.add, engine=nisa.engine.gpsimd)
            if need_x:
                g = upstream
                if has_weight:
                    g = nl.ndarray(shape, nl.float32, buffer=nl.sbuf)
                    nisa.tensor_tensor(dst=g, data1=upstream, data2=w_all[0:p, c:stop], op=nl.multiply)
                if centred:
                    _sum_into(sum_g[:, i : i + 1], g)
                nisa.tensor_tensor(dst=product, data1=g, data2=xhat, op=nl.multiply)
                _sum_into(sum_gx[:, i : i + 1], product)
                grads.append(g)
                hats.append(xhat)
        if need_x:
            minus_mean_gx = _scaled_mean(sum_gx, count, -1.0 / n)
            mean_g = minus_mean_gx
            if centred:
                mean_g = _scaled_mean(sum_g, count, 1.0 / n)
            for i in range(count):
                c = starts[i]
                stop = min(n, c + width)
                extra = grads[i]
                if has_grad_sum:
                    extra = load(grad_sum[r:end, c:stop], grad_sum.dtype)
                result = nl.ndarray((p, stop - c), x.dtype, buffer=nl.sbuf)
                _grad_x(result, grads[i], hats[i], minus_mean_gx, mean_g, rstd, extra, has_grad_sum, centred)
                nisa.dma_copy(dst=grad_x_hbm[r:end, c:stop], src=result)
    ones = constant(128, 1, 1.0, nl.float32)
    if need_weight:
        _store_total(grad_weight_hbm, weight_sum, ones, 0)
    if need_bias:
        _store_total(grad_bias_hbm, bias_sum, ones, 1)
    return tuple(outs)


@nki.jit
def norm_wide_kernel(x, weight, bias, residual, eps, weight_offset, centred, has_weight, has_bias, has_residual):
    """norm_kernel for rows that SBUF does not hold: each row is read twice, for its statistics and for its result."""
    total, n = x.shape
    y_hbm = nl.ndarray((total, n), x.dtype, buffer=nl.shared_hbm)
    sum_hbm = y_hbm
    source = x
    if has_residual:
        sum_hbm = nl.ndarray((total, n), x.dtype, buffer=nl.shared_hbm)
        source = sum_hbm
    first, last = my_tiles(total, 128)
    for r in range(first, last, 128):
        end = min(last, r + 128)
        p = end - r
        stats = _open_statistics(p, n, CHUNK, centred)
        count = 0
        for c in range(0, n, CHUNK):
            stop = min(n, c + CHUNK)
            s = load(x[r:end, c:stop], x.dtype)
            if has_residual:
                other = load(residual[r:end, c:stop], x.dtype)
                joined = nl.ndarray((p, stop - c), x.dtype, buffer=nl.sbuf)
                nisa.tensor_tensor(dst=joined, data1=s, data2=other, op=nl.add)
                nisa.dma_copy(dst=sum_hbm[r:end, c:stop], src=joined)
                s = joined
            count = _add_statistics(stats, count, s, centred)
        mean, rstd = _close_statistics(stats, count, n, centred, eps)
        for c in range(0, n, CHUNK):
            stop = min(n, c + CHUNK)
            w = b = mean
            if has_weight:
                w = _weight_tile(weight, p, c, stop, weight_offset)
            if has_bias:
                b = load_across(bias, p, c, stop, bias.dtype)
            y = nl.ndarray((p, stop - c), x.dtype, buffer=nl.sbuf)
            _apply(y, load(source[r:end, c:stop], x.dtype), mean, rstd, w, b, centred, has_weight, has_bias)
            nisa.dma_copy(dst=y_hbm[r:end, c:stop], src=y)
    if has_residual:
        return y_hbm, sum_hbm
    return y_hbm


@nki.jit
def norm_backward_wide_kernel(
    grad, grad_sum, x, weight, eps, weight_offset, centred, has_weight, has_grad_sum, need_x, need_weight, need_bias,
    weight_dtype,
):  # fmt: skip
    """norm_backward_kernel for rows whose weight gradients SBUF does not hold.

    Row tiles first: the four numbers of each row (mean, 1 / deviation, -mean(g * xhat), mean(g)) go to HBM. Then column
    blocks: all row tiles pass again, with the block's weight gradients in SBUF.
    """
    total, n = x.shape
    outs = []
    grad_x_hbm = grad_weight_hbm = grad_bias_hbm = x
    if need_x:
        grad_x_hbm = nl.ndarray((total, n), x.dtype, buffer=nl.shared_hbm)
        outs.append(grad_x_hbm)
    if need_weight:
        grad_weight_hbm = nl.ndarray((1, n), DTYPES[weight_dtype], buffer=nl.shared_hbm)
        outs.append(grad_weight_hbm)
    if need_bias:
        grad_bias_hbm = nl.ndarray((1, n), DTYPES[weight_dtype], buffer=nl.shared_hbm)
        outs.append(grad_bias_hbm)
    rows_hbm = nl.ndarray((total, 4), nl.float32, buffer=nl.private_hbm)
    width = 2048
    starts = range(0, n, width)
    first, last = my_tiles(total, 128)
    for r in range(first, last, 128):
        end = min(last, r + 128)
        p = end - r
        stats = _open_statistics(p, n, width, centred)
        count = 0
        for c in starts:
            count = _add_statistics(stats, count, load(x[r:end, c : min(n, c + width)], x.dtype), centred)
        mean, rstd = _close_statistics(stats, count, n, centred, eps)
        sum_g = nl.ndarray((p, len(starts)), nl.float32, buffer=nl.sbuf)
        sum_gx = nl.ndarray((p, len(starts)), nl.float32, buffer=nl.sbuf)
        numbers = constant(p, 4, 0.0, nl.float32)
        if need_x:
            for i in range(len(starts)):
                c = starts[i]
                stop = min(n, c + width)
                g = _upstream(grad, weight, weight_offset, has_weight, r, end, c, stop)
                if centred:
                    _sum_into(sum_g[:, i : i + 1], g)
                product = nl.ndarray((p, stop - c), nl.float32, buffer=nl.sbuf)
                xhat = _hat(load(x[r:end, c:stop], x.dtype), mean, rstd, centred)
                nisa.tensor_tensor(dst=product, data1=g, data2=xhat, op=nl.multiply)
                _sum_into(sum_gx[:, i : i + 1], product)
            nisa.tensor_copy(dst=numbers[:, 2:3], src=_scaled_mean(sum_gx, len(starts), -1.0 / n))
            if centred:
                nisa.tensor_copy(dst=numbers[:, 3:4], src=_scaled_mean(sum_g, len(starts), 1.0 / n))
        nisa.tensor_copy(dst=numbers[:, 0:1], src=mean)
        nisa.tensor_copy(dst=numbers[:, 1:2], src=rstd)
        nisa.dma_copy(dst=rows_hbm[r:end], src=numbers)
    ones = constant(128, 1, 1.0, nl.float32)
    for c in starts:
        stop = min(n, c + width)
        weight_sum = bias_sum = ones
        if need_weight:
            weight_sum = constant(128, stop - c, 0.0, nl.float32)
        if need_bias:
            bias_sum = constant(128, stop - c, 0.0, nl.float32)
        for r in range(first, last, 128):
            end = min(last, r + 128)
            p = end - r
            numbers = load(rows_hbm[r:end], nl.float32)
            xhat = _hat(load(x[r:end, c:stop], x.dtype), numbers[:, 0:1], numbers[:, 1:2], centred)
            upstream = load(grad[r:end, c:stop], grad.dtype)
            if need_weight:
                product = nl.ndarray((p, stop - c), nl.float32, buffer=nl.sbuf)
                nisa.tensor_tensor(dst=product, data1=upstream, data2=xhat, op=nl.multiply)
                held = weight_sum[0:p]
                nisa.tensor_tensor(dst=held, data1=held, data2=product, op=nl.add, engine=nisa.engine.gpsimd)
            if need_bias:
                held = bias_sum[0:p]
                nisa.tensor_tensor(dst=held, data1=held, data2=upstream, op=nl.add, engine=nisa.engine.gpsimd)
            if need_x:
                g = _upstream(grad, weight, weight_offset, has_weight, r, end, c, stop)
                extra = g
                if has_grad_sum:
                    extra = load(grad_sum[r:end, c:stop], grad_sum.dtype)
                result = nl.ndarray((p, stop - c), x.dtype, buffer=nl.sbuf)
                _grad_x(
                    result, g, xhat, numbers[:, 2:3], numbers[:, 3:4], numbers[:, 1:2], extra, has_grad_sum, centred
                )
                nisa.dma_copy(dst=grad_x_hbm[r:end, c:stop], src=result)
        if need_weight:
            _store_total(grad_weight_hbm[:, c:stop], weight_sum, ones, 0)
        if need_bias:
            _store_total(grad_bias_hbm[:, c:stop], bias_sum, ones, 1)
    return tuple(outs)


def _upstream(grad, weight, weight_offset, has_weight, r, end, c, stop):
    """grad * weight of these rows and columns; grad itself without a weight."""
    upstream = load(grad[r:end, c:stop], grad.dtype)
    if not has_weight:
        return upstream
    g = nl.ndarray(upstream.shape, nl.float32, buffer=nl.sbuf)
    w = _weight_tile(weight, end - r, c, stop, weight_offset)
    nisa.tensor_tensor(dst=g, data1=upstream, data2=w, op=nl.multiply)
    return g


def _store_total(dst_hbm, held, ones, pipe):
    total = nl.ndarray((1, held.shape[1]), nl.float32, buffer=nl.sbuf)
    sum_partitions(total, held, ones)
    add_other_core(total, pipe)
    if nl.program_id(0) == 0:
        nisa.dma_copy(dst=dst_hbm, src=total)


def _row(vector):
    return None if vector is None else vector.reshape(1, vector.shape[-1])


def supports_forward(x, weight, bias, residual):
    given = {"x": x, "weight": weight, "bias": bias, "residual": residual}
    if x.shape[-1] > WIDEST:
        return f"rows of {x.shape[-1]}; the kernel takes at most {WIDEST}"
    return refuse_dtypes(given) or refuse_empty(given)


def run_forward(x, weight, bias, residual, *, eps, weight_offset, centred, cores):
    """{"y": ..., "sum": ...} of arrays in the kernel form."""
    shape = tuple(x.shape)
    wide = shape[-1] * (4 if dtype_name(x) == "float32" else 2) > RESIDENT_BYTES
    kernel = norm_wide_kernel if wide else norm_kernel
    result = kernel[cores](
        rows(x), _row(weight), _row(bias), rows(residual), float(eps), float(weight_offset), centred,
        weight is not None, bias is not None, residual is not None,
    )  # fmt: skip
    if residual is None:
        return {"y": result.reshape(shape)}
    return {"y": result[0].reshape(shape), "sum": result[1].reshape(shape)}


def supports_backward(grad, grad_sum, x, weight):
    given = {"grad": grad, "grad_sum": grad_sum, "x": x, "weight": weight}
    if x.shape[-1] > WIDEST:
        return f"rows of {x.shape[-1]}; the kernel takes at most {WIDEST}"
    return refuse_dtypes(given) or refuse_empty(given)


def run_backward(grad, grad_sum, x, weight, *, eps, weight_offset, centred, wanted, cores):
    """The gradients named in `wanted`, of arrays in the kernel form."""
    wanted = {name for name, dtype in wanted.items() if dtype}
    names = [name for name in ("grad_x", "grad_weight", "grad_bias") if name in wanted]
    dtype = dtype_name(x if weight is None else weight)
    kernel = norm_backward_kernel if x.shape[-1] <= BACKWARD_RESIDENT else norm_backward_wide_kernel
    results = kernel[cores](
        rows(grad), rows(grad_sum), rows(x), _row(weight), float(eps), float(weight_offset), centred,
        weight is not None, grad_sum is not None, "grad_x" in wanted, "grad_weight" in wanted, "grad_bias" in wanted,
        dtype,
    )  # fmt: skip
    found = dict(zip(names, results, strict=True))
    for name, shape in (("grad_x", x.shape), ("grad_weight", x.shape[-1:]), ("grad_bias", x.shape[-1:])):
        if name in found:
            found[name] = found[name].reshape(tuple(shape))
    return found
