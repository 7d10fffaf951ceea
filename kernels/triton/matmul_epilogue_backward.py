"""grad_z = grad * activation'(preactivation), elementwise: one read of each, one write."""

import triton
import triton.language as tl

from ._launch import Launch
from ._layout import merge_loops, next_power, override, product, refuse_dtypes, wide
from ._tiles import activation_slope, loop_offset


@triton.jit
def matmul_epilogue_backward_kernel(
    grad_ptr,
    preactivation_ptr,
    grad_z_ptr,
    grad_strides,
    preactivation_strides,
    grad_z_strides,
    sizes,
    rows,
    n,
    ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    blocks = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    row = (pid // blocks) * ROWS + tl.arange(0, ROWS)
    block = (pid % blocks).to(tl.int64) if WIDE else pid % blocks
    cols = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (row < rows)[:, None] & (cols < n)[None, :]
    grad = tl.load(
        grad_ptr + loop_offset(row, sizes, grad_strides)[:, None] + cols[None, :] * grad_strides[3],
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    z = tl.load(
        preactivation_ptr
        + loop_offset(row, sizes, preactivation_strides)[:, None]
        + cols[None, :] * preactivation_strides[3],
        mask=mask,
        other=0.0,
    ).to(tl.float32)
    if ACTIVATION == 1:
        grad = tl.where(z <= 0, 0.0, grad)  # a gate, so that an infinite gradient stays hidden
    else:
        grad = grad * activation_slope(z, ACTIVATION)
    tl.store(
        grad_z_ptr + loop_offset(row, sizes, grad_z_strides)[:, None] + cols[None, :] * grad_z_strides[3],
        grad.to(grad_z_ptr.dtype.element_ty),
        mask=mask,
    )


def _merged(grad, preactivation, grad_z):
    sizes, strides = merge_loops(grad_z.shape, [v.strides for v in (grad, preactivation, grad_z)])
    pad = 4 - len(sizes)
    return (1,) * pad + sizes, [(0,) * pad + s for s in strides], len(sizes)


def supports(grad, preactivation=None, grad_z=None, *, activation=0):
    reason = refuse_dtypes({"grad": grad, "preactivation": preactivation, "grad_z": grad_z})
    if reason is None and grad_z.numel() and _merged(grad, preactivation, grad_z)[2] > 4:
        reason = "more than four dimensions remain after merging"
    return reason


def prepare(grad, preactivation, grad_z, *, activation=0, config=None):
    if grad_z.numel() == 0:
        return []
    sizes, strides, _ = _merged(grad, preactivation, grad_z)
    n, rows = sizes[3], product(sizes[:3])
    block_n = min(next_power(n, 16), 1024)
    meta = override({"ROWS": max(1, min(1024 // block_n, 64)), "BLOCK_N": block_n, "num_warps": 4}, config)
    grid = triton.cdiv(rows, meta["ROWS"]) * triton.cdiv(n, meta["BLOCK_N"])
    is_wide = n >= 2**31 - 2**20 or wide(*((n, s[3]) for s in strides))
    return [
        Launch(
            matmul_epilogue_backward_kernel,
            (grid,),
            (grad, preactivation, grad_z, *strides, sizes[:3], rows, n),
            {"ACTIVATION": int(activation), "WIDE": is_wide, **meta},
        )
    ]
