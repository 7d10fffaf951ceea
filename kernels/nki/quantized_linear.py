"""y = activation(x @ weight.T + bias) + residual with a quantised weight, and optionally the preactivation.

Three kernels, each a stream over its input:

    unpack     packed rows on partitions, so that a scale or zero point is one number a partition. Vector splits bytes
               (and, shift) and gives (q - zero) * scale in one instruction a group, rounded once to x's dtype; for
               dynamic schemes it gives q - zero, which bfloat16 holds exactly.
    quantise   (dynamic schemes) rows of x on partitions: the largest magnitude, then integers or e4m3 numbers, held
               exactly in bfloat16, and one float32 scale a row. The quotients are corrected to the last bit, since the
               engines have no division.
    product    for dynamic schemes: integers in bfloat16 multiply exactly; PSUM adds them exactly up to 2**24, so whole
               rows are cut into EXACT elements and added as int32 on GpSimd. Scales of groups follow on Vector.

The product of weight-only schemes is matmul.py's; but float16 does not hold what scales may give, so there the third
kernel multiplies x by q - zero. The unpacked weight goes through HBM: 2 bytes written and read for each element, which
many rows of x repay and few do not.
"""

# Plain loops with append: the parser front end takes a subset of Python.
# ruff: noqa: PERF401

import nki
import nki.isa as nisa
import nki.language as nl

from ._arrays import as_float32, as_int32, dense, dtype_name, refuse_dtypes, refuse_empty, rows, viewed
from ._tiles import DTYPES, add_columns, column, constant, load, load_across, my_tiles
from .matmul import _epilogue, load_contraction, matmul_kernel

#: By the scheme's index in the kernel form: elements, bits, largest quantised activation (0: not quantised), and how
#: scales are stored where they are bytes.
FORMATS = (
    ("int8", 8, 0.0, ""),
    ("int8", 8, 127.0, ""),
    ("int4", 4, 0.0, ""),
    ("int4", 4, 127.0, ""),
    ("float8_e4m3fn", 8, 448.0, ""),
    ("e2m1", 4, 0.0, "e8m0"),
    ("e2m1", 4, 0.0, "e4m3"),
)
BLOCK = 128  # elements in 64 bytes of a four-bit row
CHUNK = 2048  # elements of a row that are in SBUF at a time
EXACT = 1024  # products of two int8 numbers whose sum float32 holds
LEAST_AMAX = 2.0**-100


def _split_halves(codes, packed_sbuf, blocks):
    """codes [P, blocks * 128] uint8 from [P, blocks * 64]: low halves, then high halves, of each 64 bytes."""
    p = packed_sbuf.shape[0]
    halves = codes.reshape((p, blocks, 2, 64))
    source = packed_sbuf.reshape((p, blocks, 64))
    nisa.tensor_scalar(dst=halves[:, :, 0, :], data=source, op0=nl.bitwise_and, operand0=15)
    nisa.tensor_scalar(dst=halves[:, :, 1, :], data=source, op0=nl.right_shift, operand0=4)


def _e2m1_numbers(codes):
    """Twice the numbers of e2m1 codes [P, w], bfloat16: 0, 1, 2, 3, 4, 6, 8, 12 by the low three bits."""
    shape = codes.shape
    magnitude = nl.ndarray(shape, nl.uint8, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=magnitude, data=codes, op0=nl.bitwise_and, operand0=7)
    over4 = nl.ndarray(shape, nl.bfloat16, buffer=nl.sbuf)
    over6 = nl.ndarray(shape, nl.bfloat16, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=over4, data=magnitude, op0=nl.subtract, operand0=4.0, op1=nl.maximum, operand1=0.0)
    nisa.tensor_scalar(dst=over6, data=magnitude, op0=nl.subtract, operand0=6.0, op1=nl.maximum, operand1=0.0)
    twice = nl.ndarray(shape, nl.bfloat16, buffer=nl.sbuf)
    nisa.scalar_tensor_tensor(dst=twice, data=over6, op0=nl.multiply, operand0=2.0, op1=nl.add, operand1=over4)
    nisa.tensor_tensor(dst=twice, data1=twice, data2=magnitude, op=nl.add)
    high = nl.ndarray(shape, nl.uint8, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=high, data=codes, op0=nl.right_shift, operand0=3)
    sign = nl.ndarray(shape, nl.bfloat16, buffer=nl.sbuf)
    nisa.tensor_scalar(dst=sign, data=high, op0=nl.multiply, operand0=-2.0, op1=nl.add, operand1=1.0)
    nisa.tensor_tensor(dst=twice, data1=twice, data2=sign, op=nl.multiply)
    return twice


@nki.jit
def unpack_kernel(packed, scales, zeros, k, group, bits, element, scaled, zero_kind, out_dtype):
    """packed [n, row_bytes] -> [n, k] in out_dtype. scales, zeros: [n, groups] float32.

    scaled: the numbers themselves, else integers less their zero points. zero_kind: "none", "integer" or "float".
    """
    n = packed.shape[0]
    out_hbm = nl.ndarray((n, k), DTYPES[out_dtype], buffer=nl.shared_hbm)
    first, last = my_tiles(n, 128)
    for r in range(first, last, 128):
        end = min(last, r + 128)
        p = end - r
        scale = load(scales[r:end], nl.float32)
        zero = scale
        if zero_kind != "none":
            zero = load(zeros[r:end], nl.float32)
        for c in range(0, k, CHUNK):
            width = min(k - c, CHUNK)
            if bits == 4:
                blocks = (width + BLOCK - 1) // BLOCK
                source = load(packed[r:end, c // 2 : c // 2 + blocks * 64], packed.dtype)
                codes = nl.ndarray((p, blocks * BLOCK), nl.uint8, buffer=nl.sbuf)
                _split_halves(codes, source, blocks)
                if element == "e2m1":
                    codes = _e2m1_numbers(codes)
            else:
                codes = load(packed[r:end, c : c + width], packed.dtype)
            out = nl.ndarray((p, width), DTYPES[out_dtype], buffer=nl.sbuf)
            step = width
            if group > 0:
                step = group
            for g0 in range(0, width, step):
                g1 = min(width, g0 + step)
                g = 0
                if group > 0:
                    g = (c + g0) // group
                dst, data = out[:, g0:g1], codes[:, g0:g1]
                s, z = scale[:, g : g + 1], zero[:, g : g + 1]
                if not scaled:
                    if element == "int4" and zero_kind == "integer":
                        nisa.tensor_scalar(dst=dst, data=data, op0=nl.subtract, operand0=z)
                    elif element == "int4" and zero_kind == "none":
                        nisa.tensor_scalar(dst=dst, data=data, op0=nl.subtract, operand0=8.0)
                    else:
                        nisa.tensor_copy(dst=dst, src=data)
                elif zero_kind == "float":
                    nisa.tensor_scalar(dst=dst, data=data, op0=nl.multiply, operand0=s, op1=nl.add, operand1=z)
                elif zero_kind == "integer":
                    nisa.tensor_scalar(dst=dst, data=data, op0=nl.subtract, operand0=z, op1=nl.multiply, operand1=s)
                elif element == "int4":
                    nisa.tensor_scalar(dst=dst, data=data, op0=nl.subtract, operand0=8.0, op1=nl.multiply, operand1=s)
                else:
                    nisa.tensor_scalar(dst=dst, data=data, op0=nl.multiply, operand0=s)
            nisa.dma_copy(dst=out_hbm[r:end, c : c + width], src=out)
    return out_hbm


def _combine(a, b, op):
    result = column(a.shape[0])
    nisa.tensor_tensor(dst=result, data1=a, data2=b, op=op)
    return result


def _halves(a):
    """a = high + low with 12 bits each (Dekker, Numerische Mathematik 18, 1971), so that products of halves are exact.

    The power of two keeps a * 4097 finite.
    """
    scaled = column(a.shape[0])
    nisa.tensor_scalar(dst=scaled, data=a, op0=nl.multiply, operand0=4097.0)
    high = _combine(scaled, _combine(scaled, a, nl.subtract), nl.subtract)
    return high, _combine(a, high, nl.subtract)


def _quotient(a, b):
    """a / b of float32 columns, rounded to the nearest: a reciprocal's quotient, and the exact remainder's share."""
    inverse = column(a.shape[0])
    nisa.reciprocal(dst=inverse, data=b)
    quotient = _combine(a, inverse, nl.multiply)
    for _ in range(2):
        q_high, q_low = _halves(quotient)
        b_high, b_low = _halves(b)
        rest = _combine(a, _combine(q_high, b_high, nl.multiply), nl.subtract)
        rest = _combine(rest, _combine(q_high, b_low, nl.multiply), nl.subtract)
        rest = _combine(rest, _combine(q_low, b_high, nl.multiply), nl.subtract)
        rest = _combine(rest, _combine(q_low, b_low, nl.multiply), nl.subtract)
        quotient = _combine(quotient, _combine(rest, inverse, nl.multiply), nl.add)
    return quotient


@nki.jit
def quantize_rows_kernel(x, top, floating):
    """x [m, k] -> (q [m, k] bfloat16, scale [m, 1] float32). Rows with NaN or infinity have the scale NaN."""
    m, k = x.shape
    q_hbm = nl.ndarray((m, k), nl.bfloat16, buffer=nl.shared_hbm)
    scale_hbm = nl.ndarray((m, 1), nl.float32, buffer=nl.shared_hbm)
    starts = range(0, k, CHUNK)
    count = len(starts)
    first, last = my_tiles(m, 128)
    for r in range(first, last, 128):
        end = min(last, r + 128)
        p = end - r
        most = nl.ndarray((p, count), nl.float32, buffer=nl.sbuf)
        least = nl.ndarray((p, count), nl.float32, buffer=nl.sbuf)
        spoilt = nl.ndarray((p, count), nl.float32, buffer=nl.sbuf)
        for i in range(count):
            stop = min(k, starts[i] + CHUNK)
            piece = load(x[r:end, starts[i] : stop], x.dtype)
            nisa.tensor_reduce(dst=most[:, i : i + 1], op=nl.maximum, data=piece, axis=1)
            nisa.tensor_reduce(dst=least[:, i : i + 1], op=nl.minimum, data=piece, axis=1)
            nothing = nl.ndarray((p, stop - starts[i]), nl.float32, buffer=nl.sbuf)
            # 0 for finite numbers, NaN for the others
            nisa.activation(
                dst=nothing,
                op=nl.copy,
                data=piece,
                scale=0.0,
                reduce_op=nl.add,
                reduce_res=spoilt[:, i : i + 1],
                reduce_cmd=nisa.reduce_cmd.reset_reduce,
            )
        high, low = column(p), column(p)
        nisa.tensor_reduce(dst=high, op=nl.maximum, data=most, axis=1)
        nisa.tensor_reduce(dst=low, op=nl.minimum, data=least, axis=1)
        amax = column(p)
        nisa.tensor_scalar(dst=amax, data=low, op0=nl.multiply, operand0=-1.0)
        amax = _combine(amax, high, nl.maximum)
        nisa.tensor_scalar(dst=amax, data=amax, op0=nl.maximum, operand0=LEAST_AMAX)
        # splitting a number would overflow near the largest: such rows are divided by 2**80, which changes no bit
        tall = column(p)
        nisa.tensor_scalar(dst=tall, data=amax, op0=nl.greater, operand0=2.0**60)
        short, shrink, grow = column(p), column(p), column(p)
        nisa.tensor_scalar(dst=short, data=tall, op0=nl.multiply, operand0=-1.0, op1=nl.add, operand1=1.0)
        nisa.scalar_tensor_tensor(
            dst=shrink, data=tall, op0=nl.multiply, operand0=2.0**-80, op1=nl.maximum, operand1=short
        )
        nisa.tensor_scalar(dst=grow, data=tall, op0=nl.multiply, operand0=2.0**80, op1=nl.maximum, operand1=1.0)
        limit = constant(p, 1, top, nl.float32)
        small = _combine(amax, shrink, nl.multiply)
        factor = _combine(_quotient(limit, small), shrink, nl.multiply)
        scale = _combine(_quotient(small, limit), grow, nl.multiply)
        scale = _combine(scale, add_columns(spoilt, count), nl.add)
        nisa.dma_copy(dst=scale_hbm[r:end], src=scale)
        for c in starts:
            stop = min(k, c + CHUNK)
            piece = load(x[r:end, c:stop], x.dtype)
            kind = nl.int8
            if floating:
                kind = nl.float8_e4m3fn
            q = nl.ndarray((p, stop - c), kind, buffer=nl.sbuf)
            nisa.tensor_scalar(dst=q, data=piece, op0=nl.multiply, operand0=factor)
            wide = nl.ndarray((p, stop - c), nl.bfloat16, buffer=nl.sbuf)
            nisa.activation(dst=wide, op=nl.copy, data=q)
            nisa.dma_copy(dst=q_hbm[r:end, c:stop], src=wide)
    return q_hbm, scale_hbm


def _group_sum(acc, bank, scale_row, zero_row, row_sum, has_zero):
    """acc += bank * scale + zero * row_sum, one group's share of a tile [P, columns]."""
    part = nl.ndarray(bank.shape, nl.float32, buffer=nl.sbuf)
    nisa.tensor_tensor(dst=part, data1=bank, data2=scale_row, op=nl.multiply)
    nisa.tensor_tensor(dst=acc, data1=acc, data2=part, op=nl.add)
    if has_zero:
        nisa.scalar_tensor_tensor(dst=acc, data=zero_row, op0=nl.multiply, operand0=row_sum, op1=nl.add, operand1=acc)


@nki.jit
def product_kernel(
    q, w, row_scale, scales, zeros, bias, residual, group, whole, activation, y_dtype, has_row_scale, has_zero, has_pre,
    has_bias, has_residual,
):  # fmt: skip
    """q [m, k], w [n, k] bfloat16, row_scale [m, 1], scales and zeros [groups, n] float32 -> y [m, n].

    group: elements that share a scale, k for whole rows. whole: q and w are integers, to be added exactly.
    """
    m, k = q.shape
    n = w.shape[0]
    dtype = DTYPES[y_dtype]
    y_hbm = nl.ndarray((m, n), dtype, buffer=nl.shared_hbm)
    pre_hbm = y_hbm
    if has_pre:
        pre_hbm = nl.ndarray((m, n), dtype, buffer=nl.shared_hbm)
    rows_range, columns = (0, m), (0, n)
    if m > 128:
        rows_range = my_tiles(m, 128)
    else:
        columns = my_tiles(n, 128)
    turn = 0
    for g0 in range(rows_range[0], rows_range[1], 512):
        g1 = min(rows_range[1], g0 + 512)
        starts = range(g0, g1, 128)
        row_scales = []
        row_sums = []
        for r in starts:
            if has_row_scale:
                row_scales.append(load(row_scale[r : min(g1, r + 128)], nl.float32))
            if has_zero:
                row_sums.append(_sums_of_groups(q[r : min(g1, r + 128)], group))
        for c in range(columns[0], columns[1], 512):
            stop = min(columns[1], c + 512)
            accs = []
            totals = []
            for r in starts:
                shape = (min(g1, r + 128) - r, stop - c)
                accs.append(constant(shape[0], shape[1], 0.0, nl.float32))
                if whole and group > EXACT:
                    totals.append(nl.ndarray(shape, nl.int32, buffer=nl.sbuf))
            for s0 in range(0, k, group):
                s1 = min(k, s0 + group)
                scale_row = load_across(scales[s0 // group : s0 // group + 1], 128, c, stop, nl.float32)
                zero_row = scale_row
                if has_zero:
                    zero_row = load_across(zeros[s0 // group : s0 // group + 1], 128, c, stop, nl.float32)
                span = s1 - s0
                if whole:
                    span = min(span, EXACT)
                for e0 in range(s0, s1, span):
                    e1 = min(s1, e0 + span)
                    banks = []
                    for j in range(len(starts)):
                        banks.append(nl.ndarray(accs[j].shape, nl.float32, buffer=nl.psum))
                    for k0 in range(e0, e1, 128):
                        k1 = min(e1, k0 + 128)
                        left = load_contraction(q, True, k0, k1, g0, g1)
                        right = load_contraction(w, True, k0, k1, c, stop)
                        for j in range(len(starts)):
                            r = starts[j]
                            nisa.nc_matmul(
                                dst=banks[j], stationary=left[:, r - g0 : min(g1, r + 128) - g0], moving=right
                            )
                    for j in range(len(starts)):
                        p = accs[j].shape[0]
                        if whole and group > EXACT:
                            # one rounding of the whole sum: integers past 2**24 are added as integers
                            if e0 == s0:
                                nisa.tensor_copy(dst=totals[j], src=banks[j])
                            else:
                                more = nl.ndarray(accs[j].shape, nl.int32, buffer=nl.sbuf)
                                nisa.tensor_copy(dst=more, src=banks[j])
                                nisa.tensor_tensor(
                                    dst=totals[j], data1=totals[j], data2=more, op=nl.add, engine=nisa.engine.gpsimd
                                )
                        if e1 == s1:
                            total = banks[j]
                            if whole and group > EXACT:
                                total = totals[j]
                            row_sum = accs[j]
                            if has_zero:
                                row_sum = row_sums[j][:, s0 // group : s0 // group + 1]
                            _group_sum(accs[j], total, scale_row[0:p], zero_row[0:p], row_sum, has_zero)
            bias_row = accs[0]
            if has_bias:
                bias_row = load_across(bias, 128, c, stop, bias.dtype)
            for j in range(len(starts)):
                r = starts[j]
                end = min(g1, r + 128)
                p = end - r
                if has_row_scale:
                    nisa.tensor_scalar(dst=accs[j], data=accs[j], op0=nl.multiply, operand0=row_scales[j])
                y = nl.ndarray(accs[j].shape, dtype, buffer=nl.sbuf)
                pre = other = y
                if has_pre:
                    pre = nl.ndarray(accs[j].shape, dtype, buffer=nl.sbuf)
                if has_residual:
                    other = load(residual[r:end, c:stop], residual.dtype)
                _epilogue(y, accs[j], pre, bias_row[0:p], other, activation, has_pre, has_bias, has_residual, turn)
                turn += 1
                nisa.dma_copy(dst=y_hbm[r:end, c:stop], src=y)
                if has_pre:
                    nisa.dma_copy(dst=pre_hbm[r:end, c:stop], src=pre)
    if has_pre:
        return y_hbm, pre_hbm
    return y_hbm


def _sums_of_groups(q_rows, group):
    """[P, groups] float32: the sum of each group of the rows of q [P, k], exact for whole numbers."""
    p, k = q_rows.shape
    count = (k + group - 1) // group
    sums = nl.ndarray((p, count), nl.float32, buffer=nl.sbuf)
    for g in range(count):
        piece = load(q_rows[:, g * group : min(k, g * group + group)], q_rows.dtype)
        nisa.tensor_reduce(dst=sums[:, g : g + 1], op=nl.add, data=piece, axis=1)
    return sums


def supports(x, packed, scales, zeros=None, global_scale=None, bias=None, residual=None, **rest):
    outs = rest.get("outs") or {}
    given = {"x": x, "bias": bias, "residual": residual, "y": outs.get("y")}
    return refuse_dtypes(given) or refuse_empty({**given, "packed": packed})


def _scale_numbers(scales, kind):
    if kind == "e8m0":  # a float32's exponent; 0 is half of its least normal number, 255 NaN
        bits = as_int32(scales)
        ends = as_int32((bits == 0) | (bits == 255))
        return viewed((bits << 23) | (ends << 22), "float32")
    return as_float32(viewed(scales, "float8_e4m3fn") if kind == "e4m3" else scales)


def numbers_of(scales, zeros, global_scale, scheme):
    """(scales, zeros) [n, groups] as float32, and the kind of zeros; scales hold all factors of the stored elements."""
    element, _, _, stored = FORMATS[int(scheme)]
    numbers = _scale_numbers(scales, stored)
    if element == "e2m1":
        numbers = numbers * 0.5  # its elements come doubled
        if global_scale is not None:
            numbers = numbers * as_float32(global_scale).reshape(1, 1)
    if zeros is None:
        return numbers, numbers, "none"
    return numbers, as_float32(zeros), "integer" if dtype_name(zeros) == "uint8" else "float"


def run(
    x, packed, scales, zeros=None, global_scale=None, bias=None, residual=None, *, scheme, group_size, activation,
    outs, cores=1,
):  # fmt: skip
    """`outs`: dtype names of y and preactivation (None: not wanted)."""
    element, bits, top, _ = FORMATS[int(scheme)]
    shape = (*x.shape[:-1], packed.shape[0])
    n, k = packed.shape[0], x.shape[-1]
    group = max(0, int(group_size))
    left = rows(x)
    numbers, offsets, zero_kind = numbers_of(scales, zeros, global_scale, scheme)
    codes = dense(packed)
    if bits == 8:
        codes = viewed(codes, element)
    scaled = top == 0.0 and dtype_name(x) != "float16"
    compute = dtype_name(x) if scaled else "bfloat16"
    weight = unpack_kernel[cores](
        codes, dense(numbers), dense(offsets), k, group, bits, element, scaled, zero_kind, compute
    )
    extra = None if residual is None else rows(residual)
    row = None if bias is None else dense(bias).reshape(1, n)
    wants_pre = outs.get("preactivation") is not None
    flags = (wants_pre, bias is not None, residual is not None)
    if scaled:
        held = None if extra is None else extra.reshape((1, *extra.shape))
        result = matmul_kernel[cores](
            left.reshape((1, *left.shape)), weight.reshape((1, n, k)), row, held, True, True, int(activation),
            outs["y"], *flags,
        )  # fmt: skip
    else:
        q, row_scale = left, None
        if top > 0.0:
            q, row_scale = quantize_rows_kernel[cores](left, top, element == "float8_e4m3fn")
        whole = top > 0.0 and element != "float8_e4m3fn"
        result = product_kernel[cores](
            q, weight, row_scale, dense(numbers.swapaxes(0, 1)), dense(offsets.swapaxes(0, 1)), row, extra, group or k,
            whole, int(activation), outs["y"], top > 0.0, zero_kind == "float", *flags,
        )  # fmt: skip
    if wants_pre:
        return {"y": result[0].reshape(shape), "preactivation": result[1].reshape(shape)}
    return {"y": result.reshape(shape)}
