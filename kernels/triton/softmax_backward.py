"""grad_x = y * (grad - sum(grad * y)) over the last dimension.

Rows up to WHOLE_ROW are read once; wider rows are walked twice, the second time out of the cache.
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

WHOLE_ROW = 16384
CHUNK = 4096


@triton.jit
def softmax_backward_kernel(
    grad_ptr,
    y_ptr,
    grad_x_ptr,
    grad_strides,
    y_strides,
    grad_x_strides,
    sizes,
    rows,
    n,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_N)
    at = cols.to(tl.int64) if WIDE else cols
    mask = (row < rows)[:, None] & (cols < n)[None, :]
    grad = tl.load(
        grad_ptr + loop_offset(row, sizes, grad_strides)[:, None] + at[None, :] * grad_strides[3], mask=mask, other=0.0
    ).to(tl.float32)
    y = tl.load(
        y_ptr + loop_offset(row, sizes, y_strides)[:, None] + at[None, :] * y_strides[3], mask=mask, other=0.0
    ).to(tl.float32)
    grad_x = y * (grad - tl.sum(grad * y, axis=1)[:, None])
    tl.store(
        grad_x_ptr + loop_offset(row, sizes, grad_x_strides)[:, None] + at[None, :] * grad_x_strides[3],
        grad_x.to(grad_x_ptr.dtype.element_ty),
        mask=mask,
    )


@triton.jit
def softmax_backward_wide_kernel(
    grad_ptr,
    y_ptr,
    grad_x_ptr,
    grad_strides,
    y_strides,
    grad_x_strides,
    sizes,
    n,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    row = tl.program_id(0)
    lane = tl.arange(0, BLOCK_N)
    grad_row = grad_ptr + loop_offset(row, sizes, grad_strides)
    y_row = y_ptr + loop_offset(row, sizes, y_strides)
    out_row = grad_x_ptr + loop_offset(row, sizes, grad_x_strides)
    along = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, n, BLOCK_N):
        cols = start + lane
        at = cols.to(tl.int64) if WIDE else cols
        grad = tl.load(grad_row + at * grad_strides[3], mask=cols < n, other=0.0).to(tl.float32)
        along += grad * tl.load(y_row + at * y_strides[3], mask=cols < n, other=0.0).to(tl.float32)
    total = tl.sum(along, axis=0)
    for start in range(0, n, BLOCK_N):
        cols = start + lane
        at = cols.to(tl.int64) if WIDE else cols
        grad = tl.load(grad_row + at * grad_strides[3], mask=cols < n, other=0.0).to(tl.float32)
        y = tl.load(y_row + at * y_strides[3], mask=cols < n, other=0.0).to(tl.float32)
        tl.store(out_row + at * grad_x_strides[3], (y * (grad - total)).to(grad_x_ptr.dtype.element_ty), mask=cols < n)


def supports(grad, y=None, grad_x=None):
    return refuse_dtypes({"grad": grad, "y": y, "grad_x": grad_x}) or refuse_loops([grad, y, grad_x], [1] * 3)


def problem(grad, y=None, grad_x=None):
    return row_problem(y, whole_row(y.shape[-1], WHOLE_ROW, CHUNK))


def candidates(problem, device):
    return row_candidates(problem, 2048, 16, 32) if problem["whole"] else chunk_candidates()


def prepare(grad, y, grad_x, *, config=None):
    n = y.shape[-1]
    if y.numel() == 0:
        return []
    sizes, strides = loops([grad, y, grad_x], [1] * 3)
    strides = [(*s, v.strides[-1]) for s, v in zip(strides, [grad, y, grad_x], strict=True)]
    rows = product(sizes)
    is_wide = wide(*((n, s[3]) for s in strides))
    args = (grad, y, grad_x, *strides, sizes)
    if whole_row(n, WHOLE_ROW, CHUNK):
        block_n = next_power(n, 16)
        tile = max(1, min(2048 // block_n, 64))
        meta = override({"ROWS": tile, "BLOCK_N": block_n, "num_warps": max(1, min(16, tile * block_n // 512))}, config)
        return [
            Launch(
                softmax_backward_kernel, (triton.cdiv(rows, meta["ROWS"]),), (*args, rows, n), {"WIDE": is_wide, **meta}
            )
        ]
    meta = override({"BLOCK_N": CHUNK, "num_warps": 8}, config)
    return [Launch(softmax_backward_wide_kernel, (rows,), (*args, n), {"WIDE": is_wide, **meta})]
