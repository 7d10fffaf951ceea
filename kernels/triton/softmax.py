"""y = exp(x - max) / sum over the last dimension.

One program owns some rows. Rows up to WHOLE_ROW stay in registers: one read, one write. Wider rows are read twice:
first a running maximum and sum in each lane (rescaled when the maximum grows), then the result. An all -inf row is NaN,
as exp(-inf - -inf) says.
"""

import triton
import triton.language as tl

from ._launch import Launch
from ._layout import (
    chunk_candidates,
    loops,
    next_power,
    override,
    product,
    refuse_dtypes,
    refuse_loops,
    row_candidates,
    row_problem,
    whole_row,
    wide,
)
from ._tiles import loop_offset

WHOLE_ROW = 32768
CHUNK = 4096


@triton.jit
def softmax_kernel(
    x_ptr, y_ptr, x_strides, y_strides, sizes, rows, n, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, WIDE: tl.constexpr
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    at = cols.to(tl.int64) if WIDE else cols
    mask = (row < rows)[:, None] & (cols < n)[None, :]
    x = tl.load(
        x_ptr + loop_offset(row, sizes, x_strides)[:, None] + at[None, :] * x_strides[3], mask=mask, other=-float("inf")
    ).to(tl.float32)
    top = tl.max(x, axis=1)
    power = tl.exp(x - top[:, None])
    power = tl.where(mask, power, 0.0)
    y = power / tl.sum(power, axis=1)[:, None]
    tl.store(
        y_ptr + loop_offset(row, sizes, y_strides)[:, None] + at[None, :] * y_strides[3],
        y.to(y_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def softmax_wide_kernel(x_ptr, y_ptr, x_strides, y_strides, sizes, n, BLOCK_N: tl.constexpr, WIDE: tl.constexpr):
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK_N)
    x_row = x_ptr + loop_offset(row, sizes, x_strides)
    y_row = y_ptr + loop_offset(row, sizes, y_strides)
    top = tl.full([BLOCK_N], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_N):
        cols = start + lane
        at = cols.to(tl.int64) if WIDE else cols
        x = tl.load(x_row + at * x_strides[3], mask=cols < n, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(top, x)
        # a lane that has seen only -inf has the maximum -inf, which must not be subtracted from itself
        base = tl.where(higher == -float("inf"), 0.0, higher)
        total = total * tl.exp(top - base) + tl.exp(x - base)
        top = higher
    peak = tl.max(top, axis=0)
    base = tl.where(peak == -float("inf"), 0.0, peak)
    whole = tl.sum(total * tl.exp(top - base), axis=0)
    for start in range(0, n, BLOCK_N):
        cols = start + lane
        at = cols.to(tl.int64) if WIDE else cols
        x = tl.load(x_row + at * x_strides[3], mask=cols < n, other=-float("inf")).to(tl.float32)
        tl.store(y_row + at * y_strides[3], (tl.exp(x - base) / whole).to(y_ptr.dtype.element_ty), mask=cols < n)


def supports(x, y=None):
    return refuse_dtypes({"x": x, "y": y}) or refuse_loops([x, y], [1, 1])


def problem(x, y=None):
    return row_problem(x, whole_row(x.shape[-1], WHOLE_ROW, CHUNK))


def candidates(problem, device):
    return row_candidates(problem, 4096, 32, 32) if problem["whole"] else chunk_candidates()


def prepare(x, y, *, config=None):
    n = x.shape[-1]
    if x.numel() == 0:
        return []
    sizes, strides = loops([x, y], [1, 1])
    strides = [(*s, v.strides[-1]) for s, v in zip(strides, [x, y], strict=True)]
    rows = product(sizes)
    is_wide = wide(*((n, s[3]) for s in strides))
    if whole_row(n, WHOLE_ROW, CHUNK):
        block_n = next_power(n, 16)
        tile = max(1, min(4096 // block_n, 64))
        meta = override(
            {
                "ROWS": tile,
                "BLOCK_N": block_n,
                "num_warps": max(1, min(16 if block_n < 32768 else 32, tile * block_n // 1024)),
            },
            config,
        )
        return [
            Launch(
                softmax_kernel,
                (triton.cdiv(rows, meta["ROWS"]),),
                (x, y, *strides, sizes, rows, n),
                {"WIDE": is_wide, **meta},
            )
        ]
    meta = override({"BLOCK_N": CHUNK, "num_warps": 8}, config)
    return [Launch(softmax_wide_kernel, (rows,), (x, y, *strides, sizes, n), {"WIDE": is_wide, **meta})]
