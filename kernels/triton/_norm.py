"""LayerNorm and RMSNorm, forward and backward, in one set of kernels (CENTER: subtract the mean).

    y = (s - mean) * rstd * (weight + weight_offset) + bias,  s = x + residual rounded to x's dtype
    grad_x = rstd * (g - xhat * mean(g * xhat) [- mean(g]) + grad_sum,  g = grad * (weight + weight_offset)

Rows up to WHOLE_ROW elements are held in registers: one read of x, one write of y, variance in two passes over
registers. Wider rows are walked in chunks, twice forward (statistics by Welford's recurrence in each lane), the second
time out of the cache. Every choice depends on the width alone, so a row's result does not depend on its neighbours.

Weight gradients: a fixed number of programs each sum some rows into a float32 partial row; a second kernel adds the
partial rows in order. No atomics, so the sums are repeatable.
"""

import torch

import triton
import triton.language as tl

from ._launch import Launch, Scratch
from ._layout import (
    cheapest,
    chunk_candidates,
    loops,
    next_power,
    override,
    product,
    refuse_dtypes,
    refuse_loops,
    row_candidates,
    row_problem,
    units,
    whole_row,
    wide,
)
from ._tiles import loop_offset, sum_partials_kernel

WHOLE_ROW = 32768  # widest row kept in registers forward
WHOLE_ROW_BACKWARD = 16384
CHUNK = 4096


@triton.jit
def _row_statistics(x, cols, n, eps, CENTER: tl.constexpr, axis: tl.constexpr):
    """Centred values (zero outside the row) and 1 / standard deviation; x: [ROWS, BLOCK_N] with zeros outside."""
    if CENTER:
        mean = tl.sum(x, axis=axis) / n
        centred = tl.where((cols < n)[None, :], x - mean[:, None], 0.0)
    else:
        centred = x
    variance = tl.sum(centred * centred, axis=axis) / n
    return centred, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
    x_strides,
    residual_strides,
    y_strides,
    sum_strides,
    weight_stride,
    bias_stride,
    sizes,
    rows,
    n,
    eps,
    weight_offset,
    CENTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    at = cols.to(tl.int64) if WIDE else cols
    inside = cols < n
    mask = (row < rows)[:, None] & inside[None, :]
    x_raw = tl.load(
        x_ptr + loop_offset(row, sizes, x_strides)[:, None] + at[None, :] * x_strides[3], mask=mask, other=0.0
    )
    x = x_raw.to(tl.float32)
    if residual_ptr is not None:
        r = tl.load(
            residual_ptr + loop_offset(row, sizes, residual_strides)[:, None] + at[None, :] * residual_strides[3],
            mask=mask,
            other=0.0,
        )
        x_raw = (x + r.to(tl.float32)).to(x_raw.dtype)
        x = x_raw.to(tl.float32)
    if sum_ptr is not None:
        tl.store(
            sum_ptr + loop_offset(row, sizes, sum_strides)[:, None] + at[None, :] * sum_strides[3], x_raw, mask=mask
        )
    centred, rstd = _row_statistics(x, cols, n, eps, CENTER, 1)
    y = centred * rstd[:, None]
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + at * weight_stride, mask=inside, other=0.0).to(tl.float32) + weight_offset
        y = y * weight[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + at * bias_stride, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(
        y_ptr + loop_offset(row, sizes, y_strides)[:, None] + at[None, :] * y_strides[3],
        y.to(y_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def _wide_statistics(x_row, x_stride, n, eps, CENTER: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    """Mean (0 if not CENTER) and 1 / standard deviation of one row in memory."""
    lane = tl.arange(0, BLOCK_N)
    mean = tl.zeros([BLOCK_N], tl.float32)
    square = tl.zeros([BLOCK_N], tl.float32)
    count = 0.0
    for start in range(0, n, BLOCK_N):
        cols = start + lane
        at = cols.to(tl.int64) if WIDE else cols
        inside = cols < n
        x = tl.load(x_row + at * x_stride, mask=inside, other=0.0).to(tl.float32)
        if CENTER:
            count += 1.0
            delta = x - mean
            step = mean + delta / count
            square = tl.where(inside, square + delta * (x - step), square)
            mean = tl.where(inside, step, mean)
        else:
            square += x * x
    if CENTER:
        # lane i holds ceil((n - i) / BLOCK_N) values
        weight = ((n - lane + BLOCK_N - 1) // BLOCK_N).to(tl.float32)
        total = tl.sum(mean * weight, axis=0) / n
        drift = mean - total
        square += drift * drift * weight
    else:
        total = 0.0
    variance = tl.sum(square, axis=0) / n
    return total, tl.div_rn(1.0, tl.sqrt_rn(variance + eps))


@triton.jit
def norm_wide_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    sum_ptr,
    x_strides,
    residual_strides,
    y_strides,
    sum_strides,
    weight_stride,
    bias_stride,
    sizes,
    n,
    eps,
    weight_offset,
    CENTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK_N)
    x_row = x_ptr + loop_offset(row, sizes, x_strides)
    if residual_ptr is not None:
        # the rounded sum is an output anyway: write it first, then read it as x
        r_row = residual_ptr + loop_offset(row, sizes, residual_strides)
        s_row = sum_ptr + loop_offset(row, sizes, sum_strides)
        for start in range(0, n, BLOCK_N):
            cols = start + lane
            at = cols.to(tl.int64) if WIDE else cols
            x = tl.load(x_row + at * x_strides[3], mask=cols < n, other=0.0).to(tl.float32)
            r = tl.load(r_row + at * residual_strides[3], mask=cols < n, other=0.0).to(tl.float32)
            tl.store(s_row + at * sum_strides[3], (x + r).to(sum_ptr.dtype.element_ty), mask=cols < n)
        tl.debug_barrier()
        mean, rstd = _wide_statistics(s_row, sum_strides[3], n, eps, CENTER, BLOCK_N, WIDE)
    else:
        mean, rstd = _wide_statistics(x_row, x_strides[3], n, eps, CENTER, BLOCK_N, WIDE)
    y_row = y_ptr + loop_offset(row, sizes, y_strides)
    for start in range(0, n, BLOCK_N):
        cols = start + lane
        at = cols.to(tl.int64) if WIDE else cols
        inside = cols < n
        if residual_ptr is not None:
            x = tl.load(s_row + at * sum_strides[3], mask=inside, other=0.0).to(tl.float32)
        else:
            x = tl.load(x_row + at * x_strides[3], mask=inside, other=0.0).to(tl.float32)
        y = (x - mean) * rstd
        if weight_ptr is not None:
            y *= tl.load(weight_ptr + at * weight_stride, mask=inside, other=0.0).to(tl.float32) + weight_offset
        if bias_ptr is not None:
            y += tl.load(bias_ptr + at * bias_stride, mask=inside, other=0.0).to(tl.float32)
        tl.store(y_row + at * y_strides[3], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_kernel(
    grad_ptr,
    grad_sum_ptr,
    x_ptr,
    weight_ptr,
    grad_x_ptr,
    weight_partial_ptr,
    bias_partial_ptr,
    grad_strides,
    grad_sum_strides,
    x_strides,
    grad_x_strides,
    weight_stride,
    sizes,
    rows,
    n,
    eps,
    weight_offset,
    PARTS: tl.constexpr,
    CENTER: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Each of PARTS programs takes row tiles pid, pid + PARTS, ... and sums their weight gradients."""
    pid = tl.program_id(0)
    cols = tl.arange(0, BLOCK_N)
    at = cols.to(tl.int64) if WIDE else cols
    inside = cols < n
    if weight_partial_ptr is not None:
        weight_acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    if bias_partial_ptr is not None:
        bias_acc = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for tile in range(pid, tl.cdiv(rows, ROWS), PARTS):
        row = tile * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & inside[None, :]
        x = tl.load(
            x_ptr + loop_offset(row, sizes, x_strides)[:, None] + at[None, :] * x_strides[3], mask=mask, other=0.0
        ).to(tl.float32)
        grad = tl.load(
            grad_ptr + loop_offset(row, sizes, grad_strides)[:, None] + at[None, :] * grad_strides[3],
            mask=mask,
            other=0.0,
        ).to(tl.float32)
        centred, rstd = _row_statistics(x, cols, n, eps, CENTER, 1)
        xhat = centred * rstd[:, None]
        if weight_partial_ptr is not None:
            # rows beyond the end: grad is 0 there, xhat finite unless eps is 0
            weight_acc += tl.where(mask, grad * xhat, 0.0)
        if bias_partial_ptr is not None:
            bias_acc += grad
        if grad_x_ptr is not None:
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + at * weight_stride, mask=inside, other=0.0).to(tl.float32)
                grad = grad * (weight + weight_offset)[None, :]
            along = tl.sum(grad * xhat, axis=1) / n
            delta = grad - xhat * along[:, None]
            if CENTER:
                delta -= (tl.sum(grad, axis=1) / n)[:, None]
            delta *= rstd[:, None]
            if grad_sum_ptr is not None:
                delta += tl.load(
                    grad_sum_ptr
                    + loop_offset(row, sizes, grad_sum_strides)[:, None]
                    + at[None, :] * grad_sum_strides[3],
                    mask=mask,
                    other=0.0,
                ).to(tl.float32)
            tl.store(
                grad_x_ptr + loop_offset(row, sizes, grad_x_strides)[:, None] + at[None, :] * grad_x_strides[3],
                delta.to(grad_x_ptr.dtype.element_ty),
                mask=mask,
            )
    if weight_partial_ptr is not None:
        tl.store(weight_partial_ptr + pid.to(tl.int64) * n + cols, tl.sum(weight_acc, axis=0), mask=inside)
    if bias_partial_ptr is not None:
        tl.store(bias_partial_ptr + pid.to(tl.int64) * n + cols, tl.sum(bias_acc, axis=0), mask=inside)


@triton.jit
def norm_backward_wide_kernel(
    grad_ptr,
    grad_sum_ptr,
    x_ptr,
    weight_ptr,
    grad_x_ptr,
    mean_ptr,
    rstd_ptr,
    grad_strides,
    grad_sum_strides,
    x_strides,
    grad_x_strides,
    weight_stride,
    sizes,
    n,
    eps,
    weight_offset,
    CENTER: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """grad_x of one wide row; leaves the row's statistics for the weight gradients."""
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK_N)
    x_row = x_ptr + loop_offset(row, sizes, x_strides)
    mean, rstd = _wide_statistics(x_row, x_strides[3], n, eps, CENTER, BLOCK_N, WIDE)
    if mean_ptr is not None:
        tl.store(mean_ptr + row, mean)
        tl.store(rstd_ptr + row, rstd)
    if grad_x_ptr is not None:
        grad_row = grad_ptr + loop_offset(row, sizes, grad_strides)
        along = tl.zeros([BLOCK_N], tl.float32)
        level = tl.zeros([BLOCK_N], tl.float32)
        for start in range(0, n, BLOCK_N):
            cols = start + lane
            at = cols.to(tl.int64) if WIDE else cols
            inside = cols < n
            x = tl.load(x_row + at * x_strides[3], mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_row + at * grad_strides[3], mask=inside, other=0.0).to(tl.float32)
            if weight_ptr is not None:
                grad *= tl.load(weight_ptr + at * weight_stride, mask=inside, other=0.0).to(tl.float32) + weight_offset
            along += tl.where(inside, grad * ((x - mean) * rstd), 0.0)
            level += grad
        along_mean = tl.sum(along, axis=0) / n
        level_mean = tl.sum(level, axis=0) / n
        out_row = grad_x_ptr + loop_offset(row, sizes, grad_x_strides)
        for start in range(0, n, BLOCK_N):
            cols = start + lane
            at = cols.to(tl.int64) if WIDE else cols
            inside = cols < n
            x = tl.load(x_row + at * x_strides[3], mask=inside, other=0.0).to(tl.float32)
            grad = tl.load(grad_row + at * grad_strides[3], mask=inside, other=0.0).to(tl.float32)
            if weight_ptr is not None:
                grad *= tl.load(weight_ptr + at * weight_stride, mask=inside, other=0.0).to(tl.float32) + weight_offset
            delta = grad - (x - mean) * rstd * along_mean
            if CENTER:
                delta -= level_mean
            delta *= rstd
            if grad_sum_ptr is not None:
                extra_row = grad_sum_ptr + loop_offset(row, sizes, grad_sum_strides)
                delta += tl.load(extra_row + at * grad_sum_strides[3], mask=inside, other=0.0).to(tl.float32)
            tl.store(out_row + at * grad_x_strides[3], delta.to(grad_x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def norm_backward_columns_kernel(
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_partial_ptr,
    bias_partial_ptr,
    grad_strides,
    x_strides,
    sizes,
    rows,
    n,
    PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Weight gradients of wide rows: one block of columns and every PARTS-th block of rows."""
    part = tl.program_id(0) % PARTS
    cols = (tl.program_id(0) // PARTS) * BLOCK_N + tl.arange(0, BLOCK_N)
    at = cols.to(tl.int64) if WIDE else cols
    inside = cols < n
    weight_acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    bias_acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for tile in range(part, tl.cdiv(rows, BLOCK_R), PARTS):
        row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
        mask = (row < rows)[:, None] & inside[None, :]
        grad = tl.load(
            grad_ptr + loop_offset(row, sizes, grad_strides)[:, None] + at[None, :] * grad_strides[3],
            mask=mask,
            other=0.0,
        ).to(tl.float32)
        if weight_partial_ptr is not None:
            mean = tl.load(mean_ptr + row, mask=row < rows, other=0.0)
            rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
            x = tl.load(
                x_ptr + loop_offset(row, sizes, x_strides)[:, None] + at[None, :] * x_strides[3], mask=mask, other=0.0
            ).to(tl.float32)
            weight_acc += tl.where(mask, grad * ((x - mean[:, None]) * rstd[:, None]), 0.0)
        if bias_partial_ptr is not None:
            bias_acc += grad
    if weight_partial_ptr is not None:
        tl.store(weight_partial_ptr + part * n.to(tl.int64) + cols, tl.sum(weight_acc, axis=0), mask=inside)
    if bias_partial_ptr is not None:
        tl.store(bias_partial_ptr + part * n.to(tl.int64) + cols, tl.sum(bias_acc, axis=0), mask=inside)


def _tile(n, most, elements):
    """Rows and columns of a register tile for rows of n, and warps for about 16 elements a thread."""
    block_n = next_power(n, 16)
    rows = max(1, min(elements // block_n, 64))
    return {
        "ROWS": rows,
        "BLOCK_N": block_n,
        "num_warps": max(1, min(16 if block_n < 32768 else 32, rows * block_n // most)),
    }


def supports(x, views):
    """Shared refusals; `views`: every other tensor by name."""
    rowwise = [v for v in (x, *views.values()) if v is not None and len(v.shape) == len(x.shape)]
    return refuse_dtypes({"x": x, **views}) or refuse_loops(rowwise, [1] * len(rowwise))


def forward_problem(x):
    return row_problem(x, whole_row(x.shape[-1], WHOLE_ROW, CHUNK))


def forward_candidates(problem, device):
    return row_candidates(problem, 4096, 32, 32) if problem["whole"] else chunk_candidates()


def backward_problem(x):
    return row_problem(x, x.shape[-1] <= WHOLE_ROW_BACKWARD)


def backward_candidates(problem, device):
    """Fewer parts mean fewer bytes of partial sums, but also fewer rows in flight."""
    if not problem["whole"]:
        return cheapest(
            (cost + 0.001 * abs(parts - 16), {**config, "PARTS": parts, "BLOCK_R": rows, "BLOCK_C": columns})
            for cost, config in chunk_candidates()[:3]
            for parts, rows, columns in ((16, 16, 128), (32, 16, 128), (16, 8, 256))
        )
    sms = units(device)
    return cheapest(
        (cost + 0.02 * i, {**config, "PARTS": parts})
        for cost, config in row_candidates(problem, 4096, 8, 16)
        for i, parts in enumerate((4 * sms, 2 * sms, sms) if problem["n"] <= 4096 else (2 * sms, 4 * sms, sms))
    )


def forward(center, x, weight, bias, residual, y, sum, eps, weight_offset, config):
    n = x.shape[-1]
    if y.numel() == 0:
        return []
    sizes, strides = loops([x, residual, y, sum], [1, 1, 1, 1])
    strides = [
        s + ((v.strides[-1],) if v is not None else (0,)) for s, v in zip(strides, [x, residual, y, sum], strict=True)
    ]
    rows = product(sizes)
    weight_stride = weight.strides[0] if weight is not None else 0
    bias_stride = bias.strides[0] if bias is not None else 0
    args = (x, residual, weight, bias, y, sum, *strides, weight_stride, bias_stride, sizes)
    is_wide = wide((n, weight_stride), (n, bias_stride), *((n, s[3]) for s in strides))
    if whole_row(n, WHOLE_ROW, CHUNK):
        meta = override(_tile(n, 1024, 4096), config)
        return [
            Launch(
                norm_kernel,
                (triton.cdiv(rows, meta["ROWS"]),),
                (*args, rows, n, eps, weight_offset),
                {"CENTER": center, "WIDE": is_wide, **meta},
            )
        ]
    meta = override({"BLOCK_N": CHUNK, "num_warps": 8}, config)
    if residual is not None and sum is None:
        sum = Scratch((*tuple(sizes), n), x.dtype)
        args = (*args[:5], sum, *args[6:9], sum.strides, *args[10:])
    return [
        Launch(norm_wide_kernel, (rows,), (*args, n, eps, weight_offset), {"CENTER": center, "WIDE": is_wide, **meta})
    ]


def backward(center, grad, grad_sum, x, weight, grad_x, grad_weight, grad_bias, eps, weight_offset, config):
    n = x.shape[-1]
    if n == 0:
        return []
    row_views = [grad, grad_sum, x, grad_x]
    if x.numel() == 0:
        sizes, rows = (1, 1, 1), 0
        strides = [(0, 0, 0, 0)] * 4
    else:
        sizes, strides = loops(row_views, [1] * 4)
        strides = [s + ((v.strides[-1],) if v is not None else (0,)) for s, v in zip(strides, row_views, strict=True)]
        rows = product(sizes)
    weight_stride = weight.strides[0] if weight is not None else 0
    is_wide = wide((n, weight_stride), *((n, s[3]) for s in strides))
    whole = n <= WHOLE_ROW_BACKWARD
    wanted = [g for g in (grad_weight, grad_bias) if g is not None]
    launches = []
    if whole:
        meta = override({**_tile(n, 256, 4096), "PARTS": 512 if n <= 4096 else 256}, config)
        parts = min(meta["PARTS"], triton.cdiv(rows, meta["ROWS"])) if wanted else triton.cdiv(rows, meta["ROWS"])
    else:
        meta = override({"BLOCK_N": CHUNK, "num_warps": 8, "PARTS": 16, "BLOCK_R": 16, "BLOCK_C": 128}, config)
        parts = min(meta["PARTS"], triton.cdiv(rows, meta["BLOCK_R"]))
    partials = {id(g): Scratch((max(parts, 1), n), torch.float32) for g in wanted}
    weight_partial, bias_partial = partials.get(id(grad_weight)), partials.get(id(grad_bias))
    if rows and whole:
        launches.append(
            Launch(
                norm_backward_kernel,
                (parts,),
                (
                    grad,
                    grad_sum,
                    x,
                    weight,
                    grad_x,
                    weight_partial,
                    bias_partial,
                    *strides,
                    weight_stride,
                    sizes,
                    rows,
                    n,
                    eps,
                    weight_offset,
                ),
                {**meta, "PARTS": parts, "CENTER": center, "WIDE": is_wide},
            )
        )
    elif rows:
        statistics = [Scratch((rows,), torch.float32) if grad_weight is not None else None for _ in range(2)]
        if grad_x is not None or grad_weight is not None:
            launches.append(
                Launch(
                    norm_backward_wide_kernel,
                    (rows,),
                    (
                        grad,
                        grad_sum,
                        x,
                        weight,
                        grad_x,
                        *statistics,
                        *strides,
                        weight_stride,
                        sizes,
                        n,
                        eps,
                        weight_offset,
                    ),
                    {"CENTER": center, "WIDE": is_wide, "BLOCK_N": meta["BLOCK_N"], "num_warps": meta["num_warps"]},
                )
            )
        if wanted:
            launches.append(
                Launch(
                    norm_backward_columns_kernel,
                    (parts * triton.cdiv(n, meta["BLOCK_C"]),),
                    (grad, x, *statistics, weight_partial, bias_partial, strides[0], strides[2], sizes, rows, n),
                    {
                        "PARTS": parts,
                        "BLOCK_R": meta["BLOCK_R"],
                        "BLOCK_N": meta["BLOCK_C"],
                        "WIDE": is_wide,
                        "num_warps": 4,
                    },
                )
            )
    return launches + [sum_partials(partials[id(out)], out, parts if rows else 0, n) for out in wanted]


def sum_partials(partial, out, parts, n):
    """The second stage of a column sum: out[c] = sum of partial[:parts, c]."""
    return Launch(
        sum_partials_kernel,
        (triton.cdiv(n, 32),),
        (partial, out, parts, n, n, out.strides[0]),
        {"BLOCK_P": 128, "BLOCK_N": 32, "WIDE": wide((n, out.strides[0])), "num_warps": 4},
    )
