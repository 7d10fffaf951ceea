"""grad_x = grad @ weight with a quantised weight.

quantized_linear.py's kernel dequantises the weight once to grad's dtype, 2 bytes written and read for each element;
matmul.py's kernels multiply. Where grad is float16, which may not hold what scales give, both are float32.
"""

import torch

import triton
import triton.language as tl

from . import matmul as product_kernels
from ._launch import Launch, Scratch
from ._layout import loops, product, read_config, refuse_dtypes, refuse_loops
from ._tiles import loop_offset
from .quantized_linear import FORMATS, dequantize_launch, format_constants


@triton.jit
def widen_rows_kernel(grad_ptr, wide_ptr, strides, sizes, m, n, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr):
    """wide [m, n], contiguous, in its pointer's dtype."""
    columns = tl.cdiv(n, BLOCK_N)
    rows = tl.program_id(0) // columns * BLOCK_R + tl.arange(0, BLOCK_R)
    cols = tl.program_id(0) % columns * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    at = loop_offset(rows, sizes, strides)[:, None] + (cols.to(tl.int64) * strides[4])[None, :]
    grad = tl.load(grad_ptr + at, mask=mask, other=0.0)
    tl.store(wide_ptr + rows.to(tl.int64)[:, None] * n + cols[None, :], grad.to(wide_ptr.dtype.element_ty), mask=mask)


def supports(
    grad, packed, scales, zeros=None, global_scale=None, grad_x=None, *, scheme, group_size, k, allow_tf32=False
):
    return refuse_dtypes({"grad": grad, "grad_x": grad_x}) or refuse_loops([grad, grad_x], [1, 1])


def prepare(
    grad, packed, scales, zeros=None, global_scale=None, grad_x=None, *, scheme, group_size, k, allow_tf32=False,
    config=None,
):  # fmt: skip
    """config: numbers of matmul.py's tile; "batch_invariant" asks for one tile shape whatever the size."""
    if grad_x.numel() == 0:
        return []
    n, k = packed.shape[0], int(k)
    sizes, strides = loops([grad, grad_x], [1, 1])
    left, (grad_strides, out_strides) = (
        grad,
        ((*s, 0, v.strides[-1]) for s, v in zip(strides, (grad, grad_x), strict=True)),
    )
    dtype = torch.float32 if grad.dtype == torch.float16 else grad.dtype
    launches = []
    if dtype != grad.dtype and n > 0:
        m, block_n = product(sizes), 128
        left = Scratch((m, n), dtype)
        launches.append(
            Launch(
                widen_rows_kernel,
                (triton.cdiv(m, 8) * triton.cdiv(n, block_n),),
                (grad, left, grad_strides, sizes, m, n),
                {"BLOCK_R": 8, "BLOCK_N": block_n, "num_warps": 4},
            )
        )
        grad_strides = (sizes[1] * sizes[2] * n, sizes[2] * n, n, 0, 1)
    stride = triton.cdiv(k, 8) * 8
    weight = Scratch((n, stride), dtype)
    constants = format_constants(FORMATS[int(scheme)], max(0, int(group_size)), zeros, dtype.itemsize)
    if n > 0:
        launches.append(dequantize_launch(packed, scales, zeros, global_scale, weight, k, constants))
    # the innermost loop is m, the others are a batch that shares the weight
    grad_strides, out_strides = ((0, *s[:3], s[4]) for s in (grad_strides, out_strides))
    absent = (0, 0, 0, 0, 0)
    numbers, invariant = read_config(config)
    return [
        *launches,
        *product_kernels.folded_launches(
            left, weight, None, None, grad_x, None, (1, *sizes[:2]), sizes[2], k, n,
            [grad_strides, (0, 0, 0, stride, 1), absent, out_strides, absent], 0, bool(allow_tf32),
            {**numbers, "batch_invariant": invariant},
        ),
    ]  # fmt: skip
