"""Gradients of attention; probabilities are taken again from the lse, nothing else is saved.

    delta = sum(grad_out * out) - grad_lse          one number a row
    dS = P * (grad_out v^T [dropout] - delta)       gradient of the masked score; grad_attn_mask
    grad_query = scale * dS' k,  grad_key = scale * dS'^T q,  grad_value = P^T grad_out,  dS' = dS * softcap's slope
    grad_sinks = -sum over rows of exp(sink - lse) * delta

Three kernels: delta (and the sinks' partial sums), then grad_key and grad_value by blocks of keys (all query heads of
the group in turn, so no sums between programs), then grad_query by blocks of queries. The scores are computed twice;
in return every sum has one owner and a fixed order, without atomics.

As in the forward pass a tile with a NaN is computed again with cleaned operands, for 0 * NaN at hidden places.
"""

import torch

import triton
import triton.language as tl

from ._attention import (
    LOG2E,
    Options,
    add_nonfinite,
    attention_problem,
    block_d,
    finite_part,
    kept,
    key_range,
    lookup,
    query_range,
    refuse,
    rich,
    scores,
    spans_wide,
    tile_cost,
    walk,
)
from ._launch import Launch, Scratch
from ._layout import architecture, cheapest, next_power, override, product, read_config, refuse_loops, units
from ._tiles import loop_offset, sum_partials_kernel


@triton.jit
def attention_delta_kernel(
    grad_out_ptr,
    grad_lse_ptr,
    out_ptr,
    lse_ptr,
    sinks_ptr,
    delta_ptr,
    partial_ptr,
    grad_out_strides,
    grad_lse_strides,
    out_strides,
    lse_strides,
    sinks_stride,
    sizes,
    heads,
    sq,
    dv,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    tiles = tl.cdiv(sq, BLOCK_M)
    pid = tl.program_id(0)
    tile = pid % tiles
    head = (pid // tiles) % heads
    batch = (pid // tiles) // heads
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < sq
    row_at = row.to(tl.int64)
    dims = tl.arange(0, BLOCK_V)
    mask = inside[:, None] & (dims < dv)[None, :]
    grad_at = (
        grad_out_ptr
        + loop_offset(batch, sizes, grad_out_strides)
        + head.to(tl.int64) * grad_out_strides[3]
        + row_at * grad_out_strides[4]
    )
    out_at = (
        out_ptr + loop_offset(batch, sizes, out_strides) + head.to(tl.int64) * out_strides[3] + row_at * out_strides[4]
    )
    grad = tl.load(grad_at[:, None] + dims[None, :] * grad_out_strides[5], mask=mask, other=0.0).to(tl.float32)
    out = tl.load(out_at[:, None] + dims[None, :] * out_strides[5], mask=mask, other=0.0).to(tl.float32)
    delta = tl.sum(grad * out, axis=1)
    if grad_lse_ptr is not None:
        delta -= tl.load(
            grad_lse_ptr
            + loop_offset(batch, sizes, grad_lse_strides)
            + head.to(tl.int64) * grad_lse_strides[3]
            + row_at * grad_lse_strides[4],
            mask=inside,
            other=0.0,
        ).to(tl.float32)
    lse = tl.load(
        lse_ptr + loop_offset(batch, sizes, lse_strides) + head.to(tl.int64) * lse_strides[3] + row_at * lse_strides[4],
        mask=inside,
        other=-float("inf"),
    ).to(tl.float32)
    # a row that sees nothing has no gradient, whatever arrives for its result
    delta = tl.where(lse == -float("inf"), 0.0, delta)
    tl.store(delta_ptr + (batch * heads + head).to(tl.int64) * sq + row, delta, mask=inside)
    if partial_ptr is not None:
        sink = tl.load(sinks_ptr + head * sinks_stride).to(tl.float32)
        weight = tl.where(lse == -float("inf"), 0.0, tl.exp(sink - lse))
        # [batch, tile, head], so that the sum over rows of this table is each head's gradient
        tl.store(partial_ptr + (batch.to(tl.int64) * tiles + tile) * heads + head, -tl.sum(weight * delta, axis=0))


@triton.jit
def _gather_key_value(
    grad_k,
    grad_v,
    k,
    v,
    q_ptr,
    grad_out_ptr,
    q_strides,
    grad_out_strides,
    mask_base,
    seed_ptr,
    lse_at,
    lse_stride,
    delta_at,
    key,
    head_index,
    slope,
    start,
    stop,
    keys,
    sq,
    d,
    dv,
    offset,
    scale,
    softcap,
    left,
    right,
    threshold,
    keep_scale,
    mask_query_stride,
    mask_key_stride,
    MASKED: tl.constexpr,
    SAFE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One stretch of queries for one block of keys; tiles are [keys, queries]."""
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_V)
    for begin in tl.range(start, stop, BLOCK_M, num_stages=1 if SAFE else None):
        query = begin + tl.arange(0, BLOCK_M)
        inside = query < sq
        query_at = query.to(tl.int64) if WIDE else query
        q_at = q_ptr + query_at[:, None] * q_strides[4] + dims[None, :] * q_strides[5]
        g_at = grad_out_ptr + query_at[:, None] * grad_out_strides[4] + dims_v[None, :] * grad_out_strides[5]
        if MASKED or not EVEN_D:
            q = tl.load(q_at, mask=inside[:, None] & (dims < d)[None, :], other=0.0)
        else:
            q = tl.load(q_at)
        if MASKED or not EVEN_V:
            grad = tl.load(g_at, mask=inside[:, None] & (dims_v < dv)[None, :], other=0.0)
        else:
            grad = tl.load(g_at)
        lse = tl.load(lse_at + query_at * lse_stride, mask=inside, other=0.0).to(tl.float32) * LOG2E
        lse = tl.where(lse == -float("inf"), 0.0, lse)
        delta = tl.load(delta_at + query, mask=inside, other=0.0)
        raw = tl.dot(k, q.T, input_precision=PRECISION)
        s, slack, visible = scores(
            raw,
            query[None, :],
            key[:, None],
            keys,
            sq,
            offset,
            mask_base,
            slope,
            scale,
            softcap,
            left,
            right,
            mask_query_stride,
            mask_key_stride,
            MASKED,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_SLOPES,
            WIDE,
        )
        p = tl.exp2(s - lse[None, :])
        if MASKED or mask_base is not None:
            p = tl.where(visible, p, 0.0)  # also where the query's lse is NaN
        grad_p = tl.dot(v, grad.T, input_precision=PRECISION)
        dropped = p
        if DROPOUT:
            keep = kept(seed_ptr, query[None, :], key[:, None], head_index, threshold)
            dropped = p * tl.where(keep, keep_scale, 0.0)  # a NaN stays one when dropped
            grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
        grad_s = p * (grad_p - delta[None, :])
        if MASKED or mask_base is not None:
            grad_s = tl.where(visible, grad_s, 0.0)
        grad_s = grad_s * slack
        if SAFE:
            grad_v = add_nonfinite(
                grad_v,
                dropped,
                visible,
                grad,
                grad_out_ptr,
                grad_out_strides[4],
                grad_out_strides[5],
                dv,
                begin,
                sq,
                BLOCK_M,
            )
            grad = finite_part(grad)
            q = finite_part(q)  # a visible NaN or infinity is already in grad_s
        grad_v = tl.dot(dropped.to(grad.dtype), grad, grad_v, input_precision=PRECISION)
        grad_k = tl.dot(grad_s.to(q.dtype), q, grad_k, input_precision=PRECISION)
    return grad_k, grad_v


@triton.jit
def attention_grad_key_value_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    slopes_ptr,
    lengths_ptr,
    seed_ptr,
    lse_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    lse_strides,
    grad_k_strides,
    grad_v_strides,
    lengths_strides,
    slopes_stride,
    sizes,
    heads,
    group,
    sq,
    sk,
    d,
    dv,
    scale,
    softcap,
    left,
    right,
    threshold,
    keep_scale,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    HAS_SLOPES: tl.constexpr = slopes_ptr is not None
    pid = tl.program_id(0)
    tiles = tl.cdiv(sk, BLOCK_N)
    key_heads = heads // group
    tile = pid % tiles
    key_head = (pid // tiles) % key_heads
    batch = (pid // tiles) // key_heads
    first = tile * BLOCK_N
    key = first + tl.arange(0, BLOCK_N)
    keys = sk
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + loop_offset(batch, sizes, lengths_strides)).to(tl.int32)
        keys = tl.maximum(tl.minimum(length, sk), 0)
    offset = keys - sq if BOTTOM_RIGHT else 0
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_V)
    key_at = key.to(tl.int64) if WIDE else key
    k = tl.load(
        k_ptr
        + loop_offset(batch, sizes, k_strides)
        + key_head.to(tl.int64) * k_strides[3]
        + (key_at[:, None] * k_strides[4] + dims[None, :] * k_strides[5]),
        mask=(key < keys)[:, None] & (dims < d)[None, :],
        other=0.0,
    )
    v = tl.load(
        v_ptr
        + loop_offset(batch, sizes, v_strides)
        + key_head.to(tl.int64) * v_strides[3]
        + (key_at[:, None] * v_strides[4] + dims_v[None, :] * v_strides[5]),
        mask=(key < keys)[:, None] & (dims_v < dv)[None, :],
        other=0.0,
    )
    start, whole_start, whole_end, end = query_range(
        first, first + BLOCK_N - 1, keys, sq, offset, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_M
    )
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for member in range(group):
        head = key_head * group + member
        head_index = batch * heads + head
        slope = 0.0
        if HAS_SLOPES:
            slope = tl.load(slopes_ptr + head * slopes_stride).to(tl.float32)
        mask_base = mask_ptr
        if mask_ptr is not None:
            mask_base = mask_ptr + loop_offset(batch, sizes, mask_strides) + head.to(tl.int64) * mask_strides[3]
        q_head = q_ptr + loop_offset(batch, sizes, q_strides) + head.to(tl.int64) * q_strides[3]
        g_head = grad_out_ptr + loop_offset(batch, sizes, grad_out_strides) + head.to(tl.int64) * grad_out_strides[3]
        lse_at = lse_ptr + loop_offset(batch, sizes, lse_strides) + head.to(tl.int64) * lse_strides[3]
        delta_at = delta_ptr + head_index.to(tl.int64) * sq
        if HAS_RIGHT:
            grad_k, grad_v = _gather_key_value(
                grad_k,
                grad_v,
                k,
                v,
                q_head,
                g_head,
                q_strides,
                grad_out_strides,
                mask_base,
                seed_ptr,
                lse_at,
                lse_strides[4],
                delta_at,
                key,
                head_index,
                slope,
                start,
                whole_start,
                keys,
                sq,
                d,
                dv,
                offset,
                scale,
                softcap,
                left,
                right,
                threshold,
                keep_scale,
                mask_strides[4],
                mask_strides[5],
                True,
                False,
                HAS_LEFT,
                HAS_RIGHT,
                HAS_SOFTCAP,
                HAS_SLOPES,
                DROPOUT,
                PRECISION,
                EVEN_D,
                EVEN_V,
                WIDE,
                BLOCK_M,
                BLOCK_D,
                BLOCK_V,
            )
        grad_k, grad_v = _gather_key_value(
            grad_k,
            grad_v,
            k,
            v,
            q_head,
            g_head,
            q_strides,
            grad_out_strides,
            mask_base,
            seed_ptr,
            lse_at,
            lse_strides[4],
            delta_at,
            key,
            head_index,
            slope,
            whole_start,
            whole_end,
            keys,
            sq,
            d,
            dv,
            offset,
            scale,
            softcap,
            left,
            right,
            threshold,
            keep_scale,
            mask_strides[4],
            mask_strides[5],
            False,
            False,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_SLOPES,
            DROPOUT,
            PRECISION,
            EVEN_D,
            EVEN_V,
            WIDE,
            BLOCK_M,
            BLOCK_D,
            BLOCK_V,
        )
        if HAS_LEFT or TAIL or lengths_ptr is not None:
            grad_k, grad_v = _gather_key_value(
                grad_k,
                grad_v,
                k,
                v,
                q_head,
                g_head,
                q_strides,
                grad_out_strides,
                mask_base,
                seed_ptr,
                lse_at,
                lse_strides[4],
                delta_at,
                key,
                head_index,
                slope,
                whole_end,
                end,
                keys,
                sq,
                d,
                dv,
                offset,
                scale,
                softcap,
                left,
                right,
                threshold,
                keep_scale,
                mask_strides[4],
                mask_strides[5],
                True,
                False,
                HAS_LEFT,
                HAS_RIGHT,
                HAS_SOFTCAP,
                HAS_SLOPES,
                DROPOUT,
                PRECISION,
                EVEN_D,
                EVEN_V,
                WIDE,
                BLOCK_M,
                BLOCK_D,
                BLOCK_V,
            )
    if HAS_LEFT or HAS_RIGHT or mask_ptr is not None or lengths_ptr is not None:
        bad = tl.max(tl.max((grad_k != grad_k).to(tl.int32), axis=1), axis=0)
        bad += tl.max(tl.max((grad_v != grad_v).to(tl.int32), axis=1), axis=0)
        if bad > 0:
            grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            grad_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
            for member in range(group):
                head = key_head * group + member
                head_index = batch * heads + head
                slope = 0.0
                if HAS_SLOPES:
                    slope = tl.load(slopes_ptr + head * slopes_stride).to(tl.float32)
                mask_base = mask_ptr
                if mask_ptr is not None:
                    mask_base = mask_ptr + loop_offset(batch, sizes, mask_strides) + head.to(tl.int64) * mask_strides[3]
                grad_k, grad_v = _gather_key_value(
                    grad_k,
                    grad_v,
                    k,
                    v,
                    q_ptr + loop_offset(batch, sizes, q_strides) + head.to(tl.int64) * q_strides[3],
                    grad_out_ptr
                    + loop_offset(batch, sizes, grad_out_strides)
                    + head.to(tl.int64) * grad_out_strides[3],
                    q_strides,
                    grad_out_strides,
                    mask_base,
                    seed_ptr,
                    lse_ptr + loop_offset(batch, sizes, lse_strides) + head.to(tl.int64) * lse_strides[3],
                    lse_strides[4],
                    delta_ptr + head_index.to(tl.int64) * sq,
                    key,
                    head_index,
                    slope,
                    start,
                    end,
                    keys,
                    sq,
                    d,
                    dv,
                    offset,
                    scale,
                    softcap,
                    left,
                    right,
                    threshold,
                    keep_scale,
                    mask_strides[4],
                    mask_strides[5],
                    True,
                    True,
                    HAS_LEFT,
                    HAS_RIGHT,
                    HAS_SOFTCAP,
                    HAS_SLOPES,
                    DROPOUT,
                    PRECISION,
                    EVEN_D,
                    EVEN_V,
                    WIDE,
                    BLOCK_M,
                    BLOCK_D,
                    BLOCK_V,
                )
    tl.store(
        grad_k_ptr
        + loop_offset(batch, sizes, grad_k_strides)
        + key_head.to(tl.int64) * grad_k_strides[3]
        + (key_at[:, None] * grad_k_strides[4] + dims[None, :] * grad_k_strides[5]),
        (grad_k * scale).to(grad_k_ptr.dtype.element_ty),
        mask=(key < sk)[:, None] & (dims < d)[None, :],
    )
    tl.store(
        grad_v_ptr
        + loop_offset(batch, sizes, grad_v_strides)
        + key_head.to(tl.int64) * grad_v_strides[3]
        + (key_at[:, None] * grad_v_strides[4] + dims_v[None, :] * grad_v_strides[5]),
        grad_v.to(grad_v_ptr.dtype.element_ty),
        mask=(key < sk)[:, None] & (dims_v < dv)[None, :],
    )


@triton.jit
def _gather_query(
    grad_q,
    q,
    grad,
    lse,
    delta,
    k_head,
    v_head,
    k_strides,
    v_strides,
    mask_base,
    grad_mask_base,
    seed_ptr,
    query,
    head_index,
    slope,
    start,
    stop,
    keys,
    sq,
    sk,
    d,
    dv,
    offset,
    scale,
    softcap,
    left,
    right,
    threshold,
    keep_scale,
    mask_query_stride,
    mask_key_stride,
    grad_mask_query_stride,
    grad_mask_key_stride,
    MASKED: tl.constexpr,
    SAFE: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    DROPOUT: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One stretch of keys for one block of queries; tiles are [queries, keys]. Stores the mask's gradient if wanted."""
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_V)
    for begin in tl.range(start, stop, BLOCK_N, num_stages=1 if SAFE else None):
        key = begin + tl.arange(0, BLOCK_N)
        key_at = key.to(tl.int64) if WIDE else key
        k_at = k_head + key_at[:, None] * k_strides[4] + dims[None, :] * k_strides[5]
        v_at = v_head + key_at[:, None] * v_strides[4] + dims_v[None, :] * v_strides[5]
        if MASKED or not EVEN_D:
            k = tl.load(k_at, mask=(key < keys)[:, None] & (dims < d)[None, :], other=0.0)
        else:
            k = tl.load(k_at)
        if MASKED or not EVEN_V:
            v = tl.load(v_at, mask=(key < keys)[:, None] & (dims_v < dv)[None, :], other=0.0)
        else:
            v = tl.load(v_at)
        raw = tl.dot(q, k.T, input_precision=PRECISION)
        s, slack, visible = scores(
            raw,
            query[:, None],
            key[None, :],
            keys,
            sq,
            offset,
            mask_base,
            slope,
            scale,
            softcap,
            left,
            right,
            mask_query_stride,
            mask_key_stride,
            MASKED,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_SLOPES,
            WIDE,
        )
        p = tl.exp2(s - lse[:, None])
        grad_p = tl.dot(grad, v.T, input_precision=PRECISION)
        if DROPOUT:
            keep = kept(seed_ptr, query[:, None], key[None, :], head_index, threshold)
            grad_p = tl.where(keep, grad_p * keep_scale, 0.0)
        grad_s = p * (grad_p - delta[:, None])
        if MASKED or mask_base is not None:
            grad_s = tl.where(visible, grad_s, 0.0)
        if grad_mask_base is not None:
            query_at = query.to(tl.int64) if WIDE else query
            tl.store(
                grad_mask_base + query_at[:, None] * grad_mask_query_stride + key_at[None, :] * grad_mask_key_stride,
                grad_s.to(grad_mask_base.dtype.element_ty),
                mask=(query < sq)[:, None] & (key < sk)[None, :],
            )
        grad_s = grad_s * slack
        if SAFE:
            k = finite_part(k)  # a visible NaN or infinity is already in grad_s
        grad_q = tl.dot(grad_s.to(k.dtype), k, grad_q, input_precision=PRECISION)
    return grad_q


@triton.jit
def attention_grad_query_kernel(
    grad_out_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    mask_ptr,
    slopes_ptr,
    lengths_ptr,
    seed_ptr,
    lse_ptr,
    delta_ptr,
    grad_q_ptr,
    grad_mask_ptr,
    grad_out_strides,
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    lse_strides,
    grad_q_strides,
    grad_mask_strides,
    lengths_strides,
    slopes_stride,
    sizes,
    heads,
    group,
    sq,
    sk,
    d,
    dv,
    scale,
    softcap,
    left,
    right,
    threshold,
    keep_scale,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    BOTTOM_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    DROPOUT: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    HAS_SLOPES: tl.constexpr = slopes_ptr is not None
    pid = tl.program_id(0)
    tiles = tl.cdiv(sq, BLOCK_M)
    tile = tiles - 1 - pid % tiles
    head = (pid // tiles) % heads
    batch = (pid // tiles) // heads
    key_head = head // group
    head_index = batch * heads + head
    first = tile * BLOCK_M
    last = tl.minimum(first + BLOCK_M, sq) - 1
    query = first + tl.arange(0, BLOCK_M)
    inside = query < sq
    keys = sk
    if lengths_ptr is not None:
        length = tl.load(lengths_ptr + loop_offset(batch, sizes, lengths_strides)).to(tl.int32)
        keys = tl.maximum(tl.minimum(length, sk), 0)
    offset = keys - sq if BOTTOM_RIGHT else 0
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_V)
    query_at = query.to(tl.int64) if WIDE else query
    q = tl.load(
        q_ptr
        + loop_offset(batch, sizes, q_strides)
        + head.to(tl.int64) * q_strides[3]
        + (query_at[:, None] * q_strides[4] + dims[None, :] * q_strides[5]),
        mask=inside[:, None] & (dims < d)[None, :],
        other=0.0,
    )
    grad = tl.load(
        grad_out_ptr
        + loop_offset(batch, sizes, grad_out_strides)
        + head.to(tl.int64) * grad_out_strides[3]
        + (query_at[:, None] * grad_out_strides[4] + dims_v[None, :] * grad_out_strides[5]),
        mask=inside[:, None] & (dims_v < dv)[None, :],
        other=0.0,
    )
    lse = (
        tl.load(
            lse_ptr
            + loop_offset(batch, sizes, lse_strides)
            + head.to(tl.int64) * lse_strides[3]
            + query_at * lse_strides[4],
            mask=inside,
            other=0.0,
        ).to(tl.float32)
        * LOG2E
    )
    lse = tl.where(lse == -float("inf"), 0.0, lse)
    delta = tl.load(delta_ptr + head_index.to(tl.int64) * sq + query, mask=inside, other=0.0)
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + head * slopes_stride).to(tl.float32)
    mask_base = mask_ptr
    if mask_ptr is not None:
        mask_base = mask_ptr + loop_offset(batch, sizes, mask_strides) + head.to(tl.int64) * mask_strides[3]
    grad_mask_base = grad_mask_ptr
    if grad_mask_ptr is not None:
        grad_mask_base = (
            grad_mask_ptr + loop_offset(batch, sizes, grad_mask_strides) + head.to(tl.int64) * grad_mask_strides[3]
        )
    k_head = k_ptr + loop_offset(batch, sizes, k_strides) + key_head.to(tl.int64) * k_strides[3]
    v_head = v_ptr + loop_offset(batch, sizes, v_strides) + key_head.to(tl.int64) * v_strides[3]
    start, whole_start, whole_end, end = key_range(first, last, keys, offset, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    if grad_mask_ptr is not None:
        # every element of the mask's gradient has to be written: hidden blocks too
        start = start * 0
        end = end * 0 + sk
        whole_start = tl.minimum(whole_start, tl.cdiv(sk, BLOCK_N) * BLOCK_N)
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_LEFT or grad_mask_ptr is not None:
        grad_q = _gather_query(
            grad_q,
            q,
            grad,
            lse,
            delta,
            k_head,
            v_head,
            k_strides,
            v_strides,
            mask_base,
            grad_mask_base,
            seed_ptr,
            query,
            head_index,
            slope,
            start,
            whole_start,
            keys,
            sq,
            sk,
            d,
            dv,
            offset,
            scale,
            softcap,
            left,
            right,
            threshold,
            keep_scale,
            mask_strides[4],
            mask_strides[5],
            grad_mask_strides[4],
            grad_mask_strides[5],
            True,
            False,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_SLOPES,
            DROPOUT,
            PRECISION,
            EVEN_D,
            EVEN_V,
            WIDE,
            BLOCK_N,
            BLOCK_D,
            BLOCK_V,
        )
    grad_q = _gather_query(
        grad_q,
        q,
        grad,
        lse,
        delta,
        k_head,
        v_head,
        k_strides,
        v_strides,
        mask_base,
        grad_mask_base,
        seed_ptr,
        query,
        head_index,
        slope,
        whole_start,
        whole_end,
        keys,
        sq,
        sk,
        d,
        dv,
        offset,
        scale,
        softcap,
        left,
        right,
        threshold,
        keep_scale,
        mask_strides[4],
        mask_strides[5],
        grad_mask_strides[4],
        grad_mask_strides[5],
        False,
        False,
        HAS_LEFT,
        HAS_RIGHT,
        HAS_SOFTCAP,
        HAS_SLOPES,
        DROPOUT,
        PRECISION,
        EVEN_D,
        EVEN_V,
        WIDE,
        BLOCK_N,
        BLOCK_D,
        BLOCK_V,
    )
    if HAS_RIGHT or TAIL or lengths_ptr is not None or grad_mask_ptr is not None:
        grad_q = _gather_query(
            grad_q,
            q,
            grad,
            lse,
            delta,
            k_head,
            v_head,
            k_strides,
            v_strides,
            mask_base,
            grad_mask_base,
            seed_ptr,
            query,
            head_index,
            slope,
            whole_end,
            end,
            keys,
            sq,
            sk,
            d,
            dv,
            offset,
            scale,
            softcap,
            left,
            right,
            threshold,
            keep_scale,
            mask_strides[4],
            mask_strides[5],
            grad_mask_strides[4],
            grad_mask_strides[5],
            True,
            False,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_SLOPES,
            DROPOUT,
            PRECISION,
            EVEN_D,
            EVEN_V,
            WIDE,
            BLOCK_N,
            BLOCK_D,
            BLOCK_V,
        )
    if HAS_LEFT or HAS_RIGHT or mask_ptr is not None:  # noqa: SIM102  (known when compiled; the next is not)
        if tl.max(tl.max((grad_q != grad_q).to(tl.int32), axis=1), axis=0) > 0:
            grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            grad_q = _gather_query(
                grad_q,
                q,
                grad,
                lse,
                delta,
                k_head,
                v_head,
                k_strides,
                v_strides,
                mask_base,
                None,
                seed_ptr,
                query,
                head_index,
                slope,
                start,
                end,
                keys,
                sq,
                sk,
                d,
                dv,
                offset,
                scale,
                softcap,
                left,
                right,
                threshold,
                keep_scale,
                mask_strides[4],
                mask_strides[5],
                grad_mask_strides[4],
                grad_mask_strides[5],
                True,
                True,
                HAS_LEFT,
                HAS_RIGHT,
                HAS_SOFTCAP,
                HAS_SLOPES,
                DROPOUT,
                PRECISION,
                EVEN_D,
                EVEN_V,
                WIDE,
                BLOCK_N,
                BLOCK_D,
                BLOCK_V,
            )
    tl.store(
        grad_q_ptr
        + loop_offset(batch, sizes, grad_q_strides)
        + head.to(tl.int64) * grad_q_strides[3]
        + (query_at[:, None] * grad_q_strides[4] + dims[None, :] * grad_q_strides[5]),
        (grad_q * scale).to(grad_q_ptr.dtype.element_ty),
        mask=inside[:, None] & (dims < d)[None, :],
    )


# (largest head size, BLOCK_M, BLOCK_N, warps, stages), queries and keys of a tile; first grad_key/grad_value's table.
KEY_TILES = {
    "hopper": ((64, 64, 128, 8, 2), (128, 64, 128, 8, 2), (256, 32, 64, 8, 1), (512, 16, 32, 8, 1)),
    "ampere": ((64, 64, 128, 8, 2), (128, 32, 128, 8, 2), (256, 32, 64, 8, 1), (512, 16, 32, 8, 1)),
    "consumer": ((64, 32, 128, 8, 2), (128, 32, 64, 4, 1), (256, 16, 32, 4, 1), (512, 16, 16, 4, 1)),
    "cdna": ((64, 32, 128, 4, 1), (128, 32, 64, 4, 1), (256, 16, 32, 4, 1), (512, 16, 16, 4, 1)),
    "float32": ((64, 32, 32, 4, 1), (128, 16, 32, 4, 1), (256, 16, 16, 4, 1), (512, 16, 16, 8, 1)),
    "interpreter": ((512, 64, 64, 4, 1),),
}
QUERY_TILES = {
    "hopper": ((64, 128, 64, 8, 2), (128, 128, 64, 8, 2), (256, 64, 32, 8, 1), (512, 32, 16, 8, 1)),
    "ampere": ((64, 128, 64, 8, 2), (128, 128, 32, 8, 2), (256, 64, 32, 8, 1), (512, 32, 16, 8, 1)),
    "consumer": ((64, 128, 32, 8, 2), (128, 64, 32, 4, 1), (256, 32, 16, 4, 1), (512, 16, 16, 4, 1)),
    "cdna": ((64, 128, 32, 4, 1), (128, 64, 32, 4, 1), (256, 32, 16, 4, 1), (512, 16, 16, 4, 1)),
    "float32": ((64, 32, 32, 4, 1), (128, 32, 16, 4, 1), (256, 16, 16, 4, 1), (512, 16, 16, 8, 1)),
    "interpreter": ((512, 64, 64, 4, 1),),
}


def supports(
    grad_out,
    grad_lse=None,
    query=None,
    key=None,
    value=None,
    attn_mask=None,
    sinks=None,
    alibi_slopes=None,
    seqlens_k=None,
    dropout_seed=None,
    out=None,
    lse=None,
    grad_query=None,
    grad_key=None,
    grad_value=None,
    grad_attn_mask=None,
    grad_sinks=None,
    *,
    dropout_p=0.0,
    is_causal=0,
    scale=1.0,
    bottom_right=0,
    window_left=-1,
    window_right=-1,
    softcap=0.0,
    allow_tf32=False,
):
    if attn_mask is not None and attn_mask.dtype == torch.float64:
        return "attn_mask is float64; Triton kernels take bool, float32, bfloat16, float16"
    others = {
        "grad_out": grad_out,
        "grad_lse": grad_lse,
        "sinks": sinks,
        "alibi_slopes": alibi_slopes,
        "out": out,
        "grad_query": grad_query,
        "grad_key": grad_key,
        "grad_value": grad_value,
        "grad_attn_mask": grad_attn_mask,
        "grad_sinks": grad_sinks,
    }
    if grad_out.dtype != query.dtype:
        return f"grad_out is {grad_out.dtype}, query {query.dtype}; the Triton kernels want one type"
    return refuse(query, key, value, others) or refuse_loops(
        *_walked(
            grad_out,
            grad_lse,
            query,
            key,
            value,
            attn_mask,
            seqlens_k,
            out,
            lse,
            grad_query,
            grad_key,
            grad_value,
            grad_attn_mask,
        )
    )


def _walked(
    grad_out,
    grad_lse,
    query,
    key,
    value,
    attn_mask,
    seqlens_k,
    out,
    lse,
    grad_query,
    grad_key,
    grad_value,
    grad_attn_mask,
):
    return (
        [
            grad_out,
            grad_lse,
            query,
            key,
            value,
            attn_mask,
            seqlens_k,
            out,
            lse,
            grad_query,
            grad_key,
            grad_value,
            grad_attn_mask,
        ],
        [3, 2, 3, 3, 3, 3, 0, 3, 2, 3, 3, 3, 3],
    )


def problem(query, key, value, attn_mask=None, alibi_slopes=None, **others):
    return attention_problem(query, key, value, attn_mask, alibi_slopes, others)


def candidates(problem, device):
    """[(modelled cost, config), ...] for `isotile tune`, least first: the same tile turned for the two kernels."""
    sms, d = units(device), problem["d"]
    turned = {**problem, "queries": problem["keys"], "keys": problem["queries"]}
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    found = []
    tiles = ((128, 128, 8), (128, 64, 8), (128, 64, 4), (128, 32, 8), (128, 32, 4), (64, 64, 4), (64, 32, 4))
    for wide, narrow, warps in (*tiles, (64, 32, 8), (32, 32, 8), (32, 16, 8), (32, 16, 4)):
        if 2 * wide * d > 128 * 128 * warps / 4:
            continue  # two accumulators of wide x d: more than 128 registers a thread
        for stages in (2, 3, 1):
            cost = tile_cost(turned, wide, narrow, sms) + tile_cost(problem, wide, narrow, sms)
            cost *= {1: 1.2, 2: 1.0, 3: 1.01}[stages]
            by_key = dict(zip(names, (narrow, wide, warps, stages), strict=True))
            by_query = dict(zip(names, (wide, narrow, warps, stages), strict=True))
            found.append((cost, {"key": by_key, "query": by_query}))
    return cheapest(found)


def prepare(
    grad_out,
    grad_lse=None,
    query=None,
    key=None,
    value=None,
    attn_mask=None,
    sinks=None,
    alibi_slopes=None,
    seqlens_k=None,
    dropout_seed=None,
    out=None,
    lse=None,
    grad_query=None,
    grad_key=None,
    grad_value=None,
    grad_attn_mask=None,
    grad_sinks=None,
    *,
    dropout_p=0.0,
    is_causal=0,
    scale=1.0,
    bottom_right=0,
    window_left=-1,
    window_right=-1,
    softcap=0.0,
    allow_tf32=False,
    config=None,
):
    """config: {"key": {...}, "query": {...}}, numbers of the two kernels' tiles."""
    heads, sq, d = query.shape[-3:]
    key_heads, sk, dv = value.shape[-3:]
    options = Options.make(dropout_p, is_causal, scale, bottom_right, window_left, window_right, softcap, sq, sk)
    batch = product(query.shape[:-3])
    if batch == 0 or heads == 0 or key_heads == 0:
        return [] if grad_sinks is None or grad_sinks.numel() == 0 else [_sum_rows(grad_sinks, grad_sinks, 0, heads)]
    group = heads // key_heads
    sizes, strides = walk(
        *_walked(
            grad_out,
            grad_lse,
            query,
            key,
            value,
            attn_mask,
            seqlens_k,
            out,
            lse,
            grad_query,
            grad_key,
            grad_value,
            grad_attn_mask,
        )
    )
    (
        grad_out_strides,
        grad_lse_strides,
        q_strides,
        k_strides,
        v_strides,
        mask_strides,
        lengths_strides,
        out_strides,
        lse_strides,
        grad_q_strides,
        grad_k_strides,
        grad_v_strides,
        grad_mask_strides,
    ) = strides
    config, _ = read_config(config)  # rows never share a sum across the batch, so nothing changes
    widest = max(block_d(d), block_d(dv))
    names = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
    key_tile = dict(zip(names, lookup(KEY_TILES, query.dtype, widest), strict=True))
    query_tile = dict(zip(names, lookup(QUERY_TILES, query.dtype, widest), strict=True))
    if rich(dropout_p, softcap, attn_mask, alibi_slopes):
        # more live values a score: halve the tiles rather than spill
        key_tile["BLOCK_M"] = max(key_tile["BLOCK_M"] // 2, 16)
        query_tile["BLOCK_N"] = max(query_tile["BLOCK_N"] // 2, 16)
    key_meta = override(key_tile, config.pop("key", None))
    query_meta = override(query_tile, config.pop("query", None))
    override({}, config)
    tf32 = bool(allow_tf32) and architecture()[0] == "cuda"
    is_wide = spans_wide(
        ((sq, d), q_strides[4:]),
        ((sk, d), k_strides[4:]),
        ((sk, dv), v_strides[4:]),
        ((sq, dv), grad_out_strides[4:]),
        ((sq, sk), mask_strides[4:]),
        ((sq, sk), grad_mask_strides[4:]),
        ((sq, d), grad_q_strides[4:]),
        ((sk, d), grad_k_strides[4:]),
        ((sk, dv), grad_v_strides[4:]),
        ((sq,), lse_strides[4:]),
    )
    block_v = block_d(dv)
    block_m = max(1, min(4096 // block_v, 64))
    tiles = triton.cdiv(sq, block_m)
    delta = Scratch((batch * heads, sq), torch.float32)
    partial = Scratch((batch * tiles, heads), torch.float32) if grad_sinks is not None else None
    launches = []
    if sq:
        launches.append(
            Launch(
                attention_delta_kernel,
                (batch * heads * tiles,),
                (
                    grad_out,
                    grad_lse,
                    out,
                    lse,
                    sinks,
                    delta,
                    partial,
                    grad_out_strides,
                    grad_lse_strides,
                    out_strides,
                    lse_strides,
                    sinks.strides[0] if sinks is not None else 0,
                    sizes,
                    heads,
                    sq,
                    dv,
                ),
                {"BLOCK_M": block_m, "BLOCK_V": block_v, "num_warps": 4},
            )
        )
    if grad_sinks is not None:
        launches.append(_sum_rows(partial, grad_sinks, batch * tiles, heads))
    constants = {
        "HAS_LEFT": options.has_left,
        "HAS_RIGHT": options.has_right,
        "BOTTOM_RIGHT": options.bottom_right,
        "HAS_SOFTCAP": options.softcap > 0,
        "DROPOUT": options.dropout,
        "PRECISION": "tf32" if tf32 else "ieee",
        "EVEN_D": d == block_d(d),
        "EVEN_V": dv == block_v,
        "WIDE": is_wide,
        "BLOCK_D": block_d(d),
        "BLOCK_V": block_v,
    }
    slopes_stride = alibi_slopes.strides[0] if alibi_slopes is not None else 0
    shared = (
        sizes,
        heads,
        group,
        sq,
        sk,
        d,
        dv,
        options.scale,
        options.softcap,
        options.left,
        options.right,
        options.threshold,
        options.keep_scale,
    )
    inputs = (grad_out, query, key, value, attn_mask, alibi_slopes, seqlens_k, dropout_seed, lse, delta)
    common = (grad_out_strides, q_strides, k_strides, v_strides, mask_strides, lse_strides)
    if sk and (d or dv):
        launches.append(
            Launch(
                attention_grad_key_value_kernel,
                (batch * key_heads * triton.cdiv(sk, key_meta["BLOCK_N"]),),
                (
                    *inputs,
                    grad_key,
                    grad_value,
                    *common,
                    grad_k_strides,
                    grad_v_strides,
                    lengths_strides,
                    slopes_stride,
                    *shared,
                ),
                {**constants, **key_meta, "TAIL": sk % key_meta["BLOCK_N"] != 0 or sq % key_meta["BLOCK_M"] != 0},
            )
        )
    if sq and (d or grad_attn_mask is not None):
        launches.append(
            Launch(
                attention_grad_query_kernel,
                (batch * heads * triton.cdiv(sq, query_meta["BLOCK_M"]),),
                (
                    *inputs,
                    grad_query,
                    grad_attn_mask,
                    *common,
                    grad_q_strides,
                    grad_mask_strides,
                    lengths_strides,
                    slopes_stride,
                    *shared,
                ),
                {**constants, **query_meta, "TAIL": sk % query_meta["BLOCK_N"] != 0},
            )
        )
    return launches


def _sum_rows(partial, out, parts, n):
    block = min(next_power(n, 16), 32)
    return Launch(
        sum_partials_kernel,
        (triton.cdiv(n, block),),
        (partial, out, parts, n, n, out.strides[0]),
        {"BLOCK_P": 64, "BLOCK_N": block, "WIDE": False, "num_warps": 4},
    )
