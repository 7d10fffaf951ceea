"""Device functions that several kernels share."""

import triton
import triton.language as tl


@triton.jit
def loop_offset(index, sizes, strides):
    """Element offset, in 64 bits, of flat loop index `index` over three loop dimensions."""
    offset = (index % sizes[2]).to(tl.int64) * strides[2]
    if sizes[0] * sizes[1] != 1:
        outer = index // sizes[2]
        offset += (outer % sizes[1]).to(tl.int64) * strides[1]
        offset += (outer // sizes[1]).to(tl.int64) * strides[0]
    return offset


@triton.jit
def tile_position(pid, tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """Row and column of tile `pid`: down GROUP_M rows, then the next column, so that neighbours share operands."""
    per_group = GROUP_M * tiles_n
    group = pid // per_group
    first = group * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    return first + (pid % per_group) % height, (pid % per_group) // height


@triton.jit
def tanh(x):
    """tanh to a few units in the last place: odd polynomial near zero, exponential elsewhere."""
    square = x * x
    near = 3.5921280e-03
    near = near * square - 8.8632356e-03
    near = near * square + 2.1869489e-02
    near = near * square - 5.3968254e-02
    near = near * square + 1.3333333e-01
    near = near * square - 3.3333333e-01
    near = x + x * square * near
    decay = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - decay) / (1.0 + decay)
    far = tl.where(x < 0, -far, far)
    return tl.where(square < 0.09, near, far)


@triton.jit
def normal_cdf(z):
    """Phi(z) with small relative error in the lower tail too, where (1 + erf) / 2 cancels.

    Complementary error function by the Chebyshev fit of Press et al., Numerical Recipes, section 6.2 (1.2e-7 relative).
    """
    x = tl.abs(z) * 0.7071067811865476
    t = 1.0 / (1.0 + 0.5 * x)
    p = 0.17087277
    p = p * t - 0.82215223
    p = p * t + 1.48851587
    p = p * t - 1.13520398
    p = p * t + 0.27886807
    p = p * t - 0.18628806
    p = p * t + 0.09678418
    p = p * t + 0.37409196
    p = p * t + 1.00002368
    tail = 0.5 * t * tl.exp(p * t - 1.26551223 - x * x)
    return tl.where(z < 0, tail, 1.0 - tail)


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """0 none, 1 relu, 2 gelu, 3 gelu_tanh, 4 silu, 5 sigmoid, 6 tanh; z in float32."""
    if ACTIVATION == 1:
        z = tl.where(z <= 0, 0.0, z)  # keeps NaN, which maximum would drop
    elif ACTIVATION == 2:
        z = z * normal_cdf(z)
    elif ACTIVATION == 3:
        z = 0.5 * z * (1.0 + tanh(0.7978845608028654 * (z + 0.044715 * z * z * z)))
    elif ACTIVATION == 4:
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == 5:
        z = 1.0 / (1.0 + tl.exp(-z))
    elif ACTIVATION == 6:
        z = tanh(z)
    return z


@triton.jit
def epilogue(
    acc,
    bias_ptr,
    residual_base,
    preactivation_base,
    residual_strides,
    preactivation_strides,
    bias_stride,
    rows,
    cols,
    m,
    n,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """acc with bias, activation and residual; stores the preactivation. The bases point at the matrix of the batch."""
    mask = (rows < m)[:, None] & (cols < n)[None, :]
    row_at = rows.to(tl.int64) if WIDE else rows
    col_at = cols.to(tl.int64) if WIDE else cols
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + col_at * bias_stride, mask=cols < n, other=0.0).to(tl.float32)[None, :]
    if preactivation_base is not None:
        tl.store(
            preactivation_base
            + row_at[:, None] * preactivation_strides[3]
            + col_at[None, :] * preactivation_strides[4],
            acc.to(preactivation_base.dtype.element_ty),
            mask=mask,
        )
    acc = activate(acc, ACTIVATION)
    if residual_base is not None:
        acc += tl.load(
            residual_base + row_at[:, None] * residual_strides[3] + col_at[None, :] * residual_strides[4],
            mask=mask,
            other=0.0,
        ).to(tl.float32)
    return acc


@triton.jit
def store_epilogue(
    acc,
    bias_ptr,
    residual_base,
    y_base,
    preactivation_base,
    residual_strides,
    y_strides,
    preactivation_strides,
    bias_stride,
    rows,
    cols,
    m,
    n,
    ACTIVATION: tl.constexpr,
    WIDE: tl.constexpr,
):
    """`epilogue`, and the result stored."""
    acc = epilogue(
        acc,
        bias_ptr,
        residual_base,
        preactivation_base,
        residual_strides,
        preactivation_strides,
        bias_stride,
        rows,
        cols,
        m,
        n,
        ACTIVATION,
        WIDE,
    )
    row_at = rows.to(tl.int64) if WIDE else rows
    col_at = cols.to(tl.int64) if WIDE else cols
    tl.store(
        y_base + row_at[:, None] * y_strides[3] + col_at[None, :] * y_strides[4],
        acc.to(y_base.dtype.element_ty),
        mask=(rows < m)[:, None] & (cols < n)[None, :],
    )


@triton.jit
def activation_slope(z, ACTIVATION: tl.constexpr):
    """Derivative of `activate`."""
    if ACTIVATION == 1:
        slope = tl.where(z != z, z, tl.where(z <= 0, 0.0, 1.0))
    elif ACTIVATION == 2:
        # beyond 20 the density is 0; an infinite z would give inf * 0
        z = tl.where(z > 20.0, 20.0, tl.where(z < -20.0, -20.0, z))
        slope = normal_cdf(z) + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    elif ACTIVATION == 3:
        # beyond 20 the slope is 0 or 1; an infinite z would give 0 * inf
        z = tl.where(z > 20.0, 20.0, tl.where(z < -20.0, -20.0, z))
        t = tanh(0.7978845608028654 * (z + 0.044715 * z * z * z))
        inner = 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * z * z)
        slope = 0.5 * (1.0 + t) + 0.5 * z * (1.0 - t * t) * inner
    elif ACTIVATION == 4:
        z = tl.where(z > 200.0, 200.0, tl.where(z < -200.0, -200.0, z))  # an infinite z would give inf * 0
        s = 1.0 / (1.0 + tl.exp(-z))
        slope = s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == 5:
        s = 1.0 / (1.0 + tl.exp(-z))
        slope = s * (1.0 - s)
    elif ACTIVATION == 6:
        t = tanh(z)
        slope = 1.0 - t * t
    else:
        slope = z * 0.0 + 1.0
    return slope


@triton.jit
def sum_partials_kernel(
    partial_ptr,
    out_ptr,
    parts,
    n,
    part_stride,
    out_stride,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WIDE: tl.constexpr,
):
    """out[c] = sum over p of partial[p, c], always in the same order; parts may be 0."""
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, parts, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)
        mask = (p < parts)[:, None] & (cols < n)[None, :]
        acc += tl.load(partial_ptr + p.to(tl.int64)[:, None] * part_stride + cols[None, :], mask=mask, other=0.0)
    where = cols.to(tl.int64) if WIDE else cols
    tl.store(out_ptr + where * out_stride, tl.sum(acc, axis=0), mask=cols < n)
