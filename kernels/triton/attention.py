"""out = softmax(scores) v by online softmax (Milakov, Gimelshein 2018; Dao et al. 2022), lse = log of its denominator.

A program owns BLOCK_M query rows of one head and walks the keys that they can see in blocks: first those at the left
edge of the window, then the blocks that every row sees whole, which skip all masking, then the right edge.
Numbers live in units of log 2 and float32; probabilities are rounded to v's type for the product with v.

Few rows (decode): all query heads of one key head are packed into the rows of one tile, so that keys are read once,
and the keys are split over SPLITS programs whose float32 parts a second kernel merges in order.

0 * NaN is NaN, so a hidden NaN or infinity in v would reach the result through its probability 0. The loop does not
guard against that; if the finished tile holds a NaN it is computed again with v cleaned, which costs nothing otherwise.
"""

import torch

import triton
import triton.language as tl

from ._attention import (
    LN2,
    LOG2E,
    Options,
    add_nonfinite,
    attention_problem,
    block_d,
    finite_part,
    kept,
    key_range,
    lookup,
    refuse,
    rich,
    scores,
    spans_wide,
    tile_cost,
    walk,
)
from ._launch import Descriptor, Launch, Scratch
from ._layout import architecture, cheapest, next_power, override, product, read_config, refuse_loops, units
from ._tiles import loop_offset


@triton.jit
def _attend(
    acc,
    total,
    top,
    q,
    k_source,
    v_source,
    k_head,
    v_head,
    k_strides,
    v_strides,
    mask_base,
    seed_ptr,
    query,
    head_index,
    slope,
    start,
    stop,
    keys,
    sq,
    d,
    dv,
    batch_index,
    key_head,
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
    LENGTHS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BARE: tl.constexpr,
    PRECISION: tl.constexpr,
    EVEN_D: tl.constexpr,
    EVEN_V: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """One stretch of the walk over keys: updates (acc, total, top)."""
    dims = tl.arange(0, BLOCK_D)
    dims_v = tl.arange(0, BLOCK_V)
    for begin in tl.range(start, stop, BLOCK_N, num_stages=1 if SAFE else None):
        key = begin + tl.arange(0, BLOCK_N)
        if DESCRIPTORS:
            k = tl.reshape(k_source.load([batch_index, key_head, begin, 0]), (BLOCK_N, BLOCK_D)).T
        else:
            key_at = key.to(tl.int64) if WIDE else key
            k_at = k_head + key_at[None, :] * k_strides[4] + dims[:, None] * k_strides[5]
            if MASKED or not EVEN_D:
                k = tl.load(k_at, mask=(key < keys)[None, :] & (dims < d)[:, None], other=0.0)
            else:
                k = tl.load(k_at)
        raw = tl.dot(q, k, input_precision=PRECISION)
        s, _, visible = scores(
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
            BARE,
        )
        if BARE:
            higher = tl.maximum(top, tl.max(s, axis=1) * (scale * LOG2E))
        else:
            higher = tl.maximum(top, tl.max(s, axis=1))
        if MASKED or mask_base is not None:
            base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing seen yet: -inf - -inf would be NaN
        else:
            base = higher
        if BARE:
            p = tl.exp2(s * (scale * LOG2E) - base[:, None])  # one multiply-add for each score
        else:
            p = tl.exp2(s - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(p, axis=1)
        acc = acc * decay[:, None]
        top = higher
        if DROPOUT:
            p = tl.where(kept(seed_ptr, query[:, None], key[None, :], head_index, threshold), p * keep_scale, 0.0)
        if DESCRIPTORS:
            v = tl.reshape(v_source.load([batch_index, key_head, begin, 0]), (BLOCK_N, BLOCK_V))
            if MASKED and LENGTHS:
                v = tl.where((key < keys)[:, None], v, tl.zeros_like(v))
        else:
            v_at = v_head + key_at[:, None] * v_strides[4] + dims_v[None, :] * v_strides[5]
            if MASKED or not EVEN_V:
                v = tl.load(v_at, mask=(key < keys)[:, None] & (dims_v < dv)[None, :], other=0.0)
            else:
                v = tl.load(v_at)
        if SAFE:
            acc = add_nonfinite(acc, p, visible, v, v_head, v_strides[4], v_strides[5], dv, begin, keys, BLOCK_N)
            v = finite_part(v)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, total, top


@triton.jit
def attention_forward_kernel(
    q_ptr,
    v_ptr,
    k_source,
    v_source,
    mask_ptr,
    sinks_ptr,
    slopes_ptr,
    lengths_ptr,
    seed_ptr,
    out_ptr,
    lse_ptr,
    part_ptr,
    part_lse_ptr,
    q_strides,
    k_strides,
    v_strides,
    mask_strides,
    out_strides,
    lse_strides,
    lengths_strides,
    sinks_stride,
    slopes_stride,
    sizes,
    heads,
    group,
    sq,
    sk,
    d,
    dv,
    splits,
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
    HIDES: tl.constexpr,
    PACK: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BARE: tl.constexpr,
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
    LENGTHS: tl.constexpr = lengths_ptr is not None
    pid = tl.program_id(0)
    split = 0
    if SPLIT:
        split = pid % splits
        pid = pid // splits
    total_rows = sq * group if PACK else sq
    tiles = tl.cdiv(total_rows, BLOCK_M)
    tile = tiles - 1 - pid % tiles  # under a causal mask the last rows have the most work: start with them
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    if PACK:
        key_heads = heads // group
        key_head = (pid // tiles) % key_heads
        batch = (pid // tiles) // key_heads
        # rows beyond the last head would belong to the next one: their query index is put out of range
        head = key_head * group + tl.minimum(row // sq, group - 1)
        query = tl.where(row < total_rows, row % sq, sq)
        head_index = (batch * heads + head)[:, None]
        first = 0
        last = sq - 1
    else:
        head = (pid // tiles) % heads
        batch = (pid // tiles) // heads
        key_head = head // group
        query = row
        head_index = batch * heads + head
        first = tile * BLOCK_M
        last = tl.minimum(first + BLOCK_M, sq) - 1
    keys = sk
    if LENGTHS:
        length = tl.load(lengths_ptr + loop_offset(batch, sizes, lengths_strides)).to(tl.int32)
        keys = tl.maximum(tl.minimum(length, sk), 0)
    offset = keys - sq if BOTTOM_RIGHT else 0
    inside = query < sq

    query_at = query.to(tl.int64) if WIDE else query
    dims = tl.arange(0, BLOCK_D)
    q_at = q_ptr + loop_offset(batch, sizes, q_strides) + head.to(tl.int64) * q_strides[3] + query_at * q_strides[4]
    if EVEN_D:
        q = tl.load(q_at[:, None] + dims[None, :] * q_strides[5], mask=inside[:, None], other=0.0)
    else:
        q = tl.load(q_at[:, None] + dims[None, :] * q_strides[5], mask=inside[:, None] & (dims < d)[None, :], other=0.0)
    k_head = 0
    if not DESCRIPTORS:
        k_head = k_source + loop_offset(batch, sizes, k_strides) + key_head.to(tl.int64) * k_strides[3]
    v_head = v_ptr + loop_offset(batch, sizes, v_strides) + key_head.to(tl.int64) * v_strides[3]
    mask_base = mask_ptr
    if mask_ptr is not None:
        mask_base = mask_ptr + loop_offset(batch, sizes, mask_strides) + head.to(tl.int64) * mask_strides[3]
        if PACK:
            mask_base = mask_base[:, None]
    slope = 0.0
    if HAS_SLOPES:
        slope = tl.load(slopes_ptr + head * slopes_stride).to(tl.float32)
        if PACK:
            slope = slope[:, None]

    start, whole_start, whole_end, end = key_range(first, last, keys, offset, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N)
    if SPLIT:
        span = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), BLOCK_N), splits) * BLOCK_N
        start = start + split * span
        end = tl.minimum(end, start + span)
        top_block = tl.maximum(tl.cdiv(end, BLOCK_N) * BLOCK_N, start)
        whole_start = tl.minimum(tl.maximum(whole_start, start), top_block)
        whole_end = tl.maximum(tl.minimum(whole_end, top_block), whole_start)

    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    if HAS_LEFT:
        acc, total, top = _attend(
            acc,
            total,
            top,
            q,
            k_source,
            v_source,
            k_head,
            v_head,
            k_strides,
            v_strides,
            mask_base,
            seed_ptr,
            query,
            head_index,
            slope,
            start,
            whole_start,
            keys,
            sq,
            d,
            dv,
            batch,
            key_head,
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
            LENGTHS,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_SLOPES,
            DROPOUT,
            DESCRIPTORS,
            BARE,
            PRECISION,
            EVEN_D,
            EVEN_V,
            WIDE,
            BLOCK_N,
            BLOCK_D,
            BLOCK_V,
        )
    acc, total, top = _attend(
        acc,
        total,
        top,
        q,
        k_source,
        v_source,
        k_head,
        v_head,
        k_strides,
        v_strides,
        mask_base,
        seed_ptr,
        query,
        head_index,
        slope,
        whole_start,
        whole_end,
        keys,
        sq,
        d,
        dv,
        batch,
        key_head,
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
        LENGTHS,
        HAS_LEFT,
        HAS_RIGHT,
        HAS_SOFTCAP,
        HAS_SLOPES,
        DROPOUT,
        DESCRIPTORS,
        BARE,
        PRECISION,
        EVEN_D,
        EVEN_V,
        WIDE,
        BLOCK_N,
        BLOCK_D,
        BLOCK_V,
    )
    if HIDES:
        acc, total, top = _attend(
            acc,
            total,
            top,
            q,
            k_source,
            v_source,
            k_head,
            v_head,
            k_strides,
            v_strides,
            mask_base,
            seed_ptr,
            query,
            head_index,
            slope,
            whole_end,
            end,
            keys,
            sq,
            d,
            dv,
            batch,
            key_head,
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
            LENGTHS,
            HAS_LEFT,
            HAS_RIGHT,
            HAS_SOFTCAP,
            HAS_SLOPES,
            DROPOUT,
            DESCRIPTORS,
            BARE,
            PRECISION,
            EVEN_D,
            EVEN_V,
            WIDE,
            BLOCK_N,
            BLOCK_D,
            BLOCK_V,
        )
    if HAS_LEFT or HAS_RIGHT or mask_ptr is not None:  # noqa: SIM102  (known when compiled; the next is not)
        if tl.max(tl.max((acc != acc).to(tl.int32), axis=1), axis=0) > 0:
            acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            top = tl.full([BLOCK_M], -float("inf"), tl.float32)
            acc, total, top = _attend(
                acc,
                total,
                top,
                q,
                k_source,
                v_source,
                k_head,
                v_head,
                k_strides,
                v_strides,
                mask_base,
                seed_ptr,
                query,
                head_index,
                slope,
                start,
                end,
                keys,
                sq,
                d,
                dv,
                batch,
                key_head,
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
                LENGTHS,
                HAS_LEFT,
                HAS_RIGHT,
                HAS_SOFTCAP,
                HAS_SLOPES,
                DROPOUT,
                DESCRIPTORS,
                BARE,
                PRECISION,
                EVEN_D,
                EVEN_V,
                WIDE,
                BLOCK_N,
                BLOCK_D,
                BLOCK_V,
            )

    dims_v = tl.arange(0, BLOCK_V)
    if SPLIT:
        batches = sizes[0] * sizes[1] * sizes[2]
        flat = ((split.to(tl.int64) * batches + batch) * heads + head) * sq + query
        shift = tl.where(total == 0.0, 1.0, total)
        tl.store(
            part_ptr + flat[:, None] * dv + dims_v[None, :],
            acc / shift[:, None],
            mask=inside[:, None] & (dims_v < dv)[None, :],
        )
        tl.store(part_lse_ptr + flat, tl.where(total == 0.0, -float("inf"), top + tl.log2(total)), mask=inside)
    else:
        if sinks_ptr is not None:
            sink = tl.load(sinks_ptr + head * sinks_stride).to(tl.float32) * LOG2E
            higher = tl.maximum(top, sink)
            base = tl.where(higher == -float("inf"), 0.0, higher)
            decay = tl.exp2(top - base)
            total = total * decay + tl.exp2(sink - base)
            acc = acc * decay[:, None]
            top = higher
        shift = tl.where(total == 0.0, 1.0, total)
        out_at = (
            out_ptr
            + loop_offset(batch, sizes, out_strides)
            + head.to(tl.int64) * out_strides[3]
            + query_at * out_strides[4]
        )
        tl.store(
            out_at[:, None] + dims_v[None, :] * out_strides[5],
            (acc / shift[:, None]).to(out_ptr.dtype.element_ty),
            mask=inside[:, None] & (dims_v < dv)[None, :],
        )
        lse = tl.where(total == 0.0, -float("inf"), (top + tl.log2(total)) * LN2)
        tl.store(
            lse_ptr
            + loop_offset(batch, sizes, lse_strides)
            + head.to(tl.int64) * lse_strides[3]
            + query_at * lse_strides[4],
            lse,
            mask=inside,
        )


@triton.jit
def attention_combine_kernel(
    part_ptr,
    part_lse_ptr,
    sinks_ptr,
    out_ptr,
    lse_ptr,
    out_strides,
    lse_strides,
    sinks_stride,
    sizes,
    rows,
    heads,
    sq,
    dv,
    splits,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """Merges the parts of each row (batch, head, query), in order of the keys."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    query = row % sq
    head = (row // sq) % heads
    batch = (row // sq) // heads
    dims = tl.arange(0, BLOCK_V)
    step = tl.cast(rows, tl.int64)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for part in range(splits):
        top = tl.maximum(top, tl.load(part_lse_ptr + part * step + row, mask=inside, other=-float("inf")))
    if sinks_ptr is not None:
        sink = tl.load(sinks_ptr + head * sinks_stride, mask=inside, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(top, sink)
    base = tl.where(top == -float("inf"), 0.0, top)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    for part in range(splits):
        log = tl.load(part_lse_ptr + part * step + row, mask=inside, other=-float("inf"))
        weight = tl.exp2(log - base)
        total += weight
        value = tl.load(
            part_ptr + (part * step + row)[:, None] * dv + dims[None, :],
            mask=inside[:, None] & (dims < dv)[None, :],
            other=0.0,
        )
        # a part without visible keys has weight 0 and value 0
        acc += weight[:, None] * value
    if sinks_ptr is not None:
        total += tl.exp2(sink - base)
    shift = tl.where(total == 0.0, 1.0, total)
    out_at = (
        out_ptr
        + loop_offset(batch, sizes, out_strides)
        + head.to(tl.int64) * out_strides[3]
        + query.to(tl.int64) * out_strides[4]
    )
    tl.store(
        out_at[:, None] + dims[None, :] * out_strides[5],
        (acc / shift[:, None]).to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (dims < dv)[None, :],
    )
    tl.store(
        lse_ptr
        + loop_offset(batch, sizes, lse_strides)
        + head.to(tl.int64) * lse_strides[3]
        + query.to(tl.int64) * lse_strides[4],
        tl.where(total == 0.0, -float("inf"), (top + tl.log2(total)) * LN2),
        mask=inside,
    )


# (largest head size, BLOCK_M, BLOCK_N, warps, stages) by architecture.
TILES = {
    "hopper": ((64, 128, 128, 8, 3), (128, 128, 128, 8, 3), (256, 128, 64, 8, 2), (512, 64, 32, 8, 2)),
    "ampere": ((64, 128, 64, 4, 3), (128, 128, 64, 8, 3), (256, 64, 64, 8, 2), (512, 32, 32, 8, 1)),
    "consumer": ((64, 128, 64, 4, 3), (128, 128, 32, 8, 3), (256, 64, 32, 4, 2), (512, 32, 16, 8, 1)),
    "cdna": ((64, 128, 64, 4, 1), (128, 128, 64, 4, 1), (256, 64, 32, 4, 1), (512, 32, 16, 4, 1)),
    "float32": ((128, 32, 32, 4, 2), (256, 16, 32, 4, 1), (512, 16, 16, 8, 1)),
    "interpreter": ((512, 64, 64, 4, 1),),
}
PACKED = {  # decode: rows of a tile are at least 16
    "hopper": ((64, 128, 4, 4), (128, 64, 4, 3), (256, 64, 4, 2), (512, 32, 8, 2)),
    "ampere": ((64, 128, 4, 3), (128, 64, 4, 3), (256, 32, 4, 3), (512, 32, 8, 1)),
    "consumer": ((64, 64, 4, 3), (128, 32, 4, 3), (256, 32, 4, 2), (512, 16, 8, 2)),
    "cdna": ((64, 128, 4, 1), (128, 64, 4, 1), (256, 32, 4, 1), (512, 16, 4, 1)),
    "float32": ((64, 32, 4, 2), (128, 32, 4, 2), (256, 16, 4, 2), (512, 16, 8, 1)),
    "interpreter": ((512, 64, 4, 1),),
}
PACK_ROWS = 64


def supports(
    query,
    key=None,
    value=None,
    attn_mask=None,
    sinks=None,
    alibi_slopes=None,
    seqlens_k=None,
    dropout_seed=None,
    out=None,
    lse=None,
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
    reason = refuse(query, key, value, {"sinks": sinks, "alibi_slopes": alibi_slopes, "out": out})
    return reason or refuse_loops([query, key, value, attn_mask, seqlens_k, out, lse], [3, 3, 3, 3, 0, 3, 2])


def problem(query, key=None, value=None, attn_mask=None, alibi_slopes=None, **others):
    found = attention_problem(query, key, value, attn_mask, alibi_slopes, others)
    return {**found, "packed": query.shape[-2] * (query.shape[-3] // key.shape[-3]) <= PACK_ROWS}


def candidates(problem, device):
    """[(modelled cost, config), ...] for `isotile tune`, least first."""
    sms, item = units(device), 4 if problem["dtype"] == "float32" else 2
    dtype, d = getattr(torch, problem["dtype"]), problem["d"]
    found = []
    if problem["packed"]:
        block_n, warps, stages = lookup(PACKED, dtype, d)
        for splits in (1, 2, 4, 8, 16, 32, 64):
            if splits > 1 and problem["keys"] // splits < 256:
                break
            # bytes are the same for all; too few programs leave bandwidth unused, each part costs a merge
            cost = max(1.0, 2 * sms / (problem["programs"] * splits)) + 0.02 * splits
            for n, w in ((block_n, warps), (block_n // 2, warps), (2 * block_n, warps), (block_n, 2 * warps)):
                worse = 1.0 + 0.01 * (n != block_n) + 0.01 * (w != warps)
                found.append(
                    (cost * worse, {"BLOCK_N": max(n, 16), "num_warps": w, "num_stages": stages, "SPLITS": splits})
                )
        return cheapest(found)
    own = lookup(TILES, dtype, d)
    for m, n, w in ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4), (128, 32, 4), (64, 32, 4)):
        for stages in (2, 3, 4):
            if item * d * (m + 2 * n * stages) > 232448 or m * d > 128 * 64 * w:
                continue
            cost = tile_cost(problem, m, n, sms) * (1.0 if stages >= 3 else 1.04)
            cost *= 0.999 if (m, n, w, stages) == own else 1.0  # ties go to the family's own choice
            found.append((cost, {"BLOCK_M": m, "BLOCK_N": n, "num_warps": w, "num_stages": stages}))
    return cheapest(found)


def prepare(
    query,
    key,
    value,
    attn_mask=None,
    sinks=None,
    alibi_slopes=None,
    seqlens_k=None,
    dropout_seed=None,
    out=None,
    lse=None,
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
    """config: numbers of the tile, "SPLITS" of the keys; "batch_invariant" fixes the split whatever the batch."""
    heads, sq, d = query.shape[-3:]
    key_heads, sk, dv = value.shape[-3:]
    if lse.numel() == 0:
        return []
    options = Options.make(dropout_p, is_causal, scale, bottom_right, window_left, window_right, softcap, sq, sk)
    sizes, strides = walk([query, key, value, attn_mask, seqlens_k, out, lse], [3, 3, 3, 3, 0, 3, 2])
    q_strides, k_strides, v_strides, mask_strides, lengths_strides, out_strides, lse_strides = strides
    batch, group = product(sizes), heads // key_heads
    config, invariant = read_config(config)
    forced = config.pop("descriptors", None)
    pack = config.pop("PACK", sq * group <= PACK_ROWS)
    widest = max(block_d(d), block_d(dv))
    if pack:
        block_n, warps, stages = lookup(PACKED, query.dtype, widest)
        block_m = min(next_power(sq * group, 16), 64 if widest <= 256 else 16)
    else:
        block_m, block_n, warps, stages = lookup(TILES, query.dtype, widest)
    if rich(dropout_p, softcap, attn_mask, alibi_slopes):
        block_n = max(block_n // 2, 16)  # more live values a score: halve the tile rather than spill
    meta = override(
        {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages, "SPLITS": 0}, config
    )
    tiles = triton.cdiv(sq * group, meta["BLOCK_M"]) * key_heads if pack else triton.cdiv(sq, meta["BLOCK_M"]) * heads
    splits = meta.pop("SPLITS")
    if splits == 0:
        splits = 1
        wanted = 4 * units(query.device)
        # a fixed length of keys for each part makes the result independent of the batch
        while (
            pack
            and sk // (2 * splits) >= 256
            and (sk // splits > 1024 if invariant else batch * tiles * splits < wanted)
        ):
            splits *= 2
    tf32 = bool(allow_tf32) and architecture()[0] == "cuda"
    is_wide = spans_wide(
        ((sq, d), q_strides[4:]),
        ((sk, d), k_strides[4:]),
        ((sk, dv), v_strides[4:]),
        ((sq, dv), out_strides[4:]),
        ((sq, sk), mask_strides[4:]),
    )
    parts = (
        [Scratch((splits, batch * heads * sq, dv), torch.float32), Scratch((splits, batch * heads * sq), torch.float32)]
        if splits > 1
        else [None, None]
    )
    hides = options.has_left or options.has_right or seqlens_k is not None or sk % meta["BLOCK_N"] != 0
    constants = {
        "HAS_LEFT": options.has_left,
        "HAS_RIGHT": options.has_right,
        "BOTTOM_RIGHT": options.bottom_right,
        "HAS_SOFTCAP": options.softcap > 0,
        "DROPOUT": options.dropout,
        "HIDES": hides,
        "PACK": pack,
        "SPLIT": splits > 1,
        "BARE": not rich(0.0, options.softcap, attn_mask, alibi_slopes) and options.scale > 0,
        "PRECISION": "tf32" if tf32 else "ieee",
        "EVEN_D": d == block_d(d),
        "EVEN_V": dv == block_d(dv),
        "WIDE": is_wide,
        "BLOCK_D": block_d(d),
        "BLOCK_V": block_d(dv),
        **meta,
    }
    grid = (batch * tiles * splits,)

    def launch(key_source, value_source, fallback=()):
        return Launch(
            attention_forward_kernel,
            grid,
            (
                query,
                value,
                key_source,
                value_source,
                attn_mask,
                sinks,
                alibi_slopes,
                seqlens_k,
                dropout_seed,
                out,
                lse,
                *parts,
                q_strides,
                k_strides,
                v_strides,
                mask_strides,
                out_strides,
                lse_strides,
                lengths_strides,
                sinks.strides[0] if sinks is not None else 0,
                alibi_slopes.strides[0] if alibi_slopes is not None else 0,
                sizes,
                heads,
                group,
                sq,
                sk,
                d,
                dv,
                splits,
                options.scale,
                options.softcap,
                options.left,
                options.right,
                options.threshold,
                options.keep_scale,
            ),
            {**constants, "DESCRIPTORS": key_source is not key},
            fallback,
        )

    main = launch(key, value)
    described = descriptors(
        key, value, k_strides, v_strides, sizes, key_heads, sk, d, dv, meta["BLOCK_N"], forced, pack, tf32
    )
    if described is not None:
        main = launch(*described, fallback=(main,))
    if splits == 1:
        return [main]
    rows = batch * heads * sq
    block_v = block_d(dv)
    block_m = max(1, min(1024 // block_v, next_power(rows)))
    return [
        main,
        Launch(
            attention_combine_kernel,
            (triton.cdiv(rows, block_m),),
            (
                *parts,
                sinks,
                out,
                lse,
                out_strides,
                lse_strides,
                sinks.strides[0] if sinks is not None else 0,
                sizes,
                rows,
                heads,
                sq,
                dv,
                splits,
            ),
            {"BLOCK_M": block_m, "BLOCK_V": block_v, "num_warps": 4},
        ),
    ]


def descriptors(key, value, k_strides, v_strides, sizes, key_heads, sk, d, dv, block_n, forced, pack, tf32):
    """TMA descriptors of key and value as [batch, heads, keys, size], or None where they cannot or should not serve."""
    kind, arch = architecture()
    if not ((kind == "cuda" and arch in (90, 100, 103)) or (forced and kind == "interpreter")) or forced is False:
        return None
    if sizes[0] * sizes[1] != 1 or sk == 0 or d == 0 or dv == 0 or (pack and not forced):
        return None
    if key.dtype == torch.float32 and not tf32 and not forced:
        return None
    made = []
    for view, strides, size in ((key, k_strides, d), (value, v_strides, dv)):
        item = view.dtype.itemsize
        if strides[5] != 1 or any(s * item % 16 for s in strides[2:5]) or block_d(size) > 256:
            return None
        # a size of 1 leaves its stride free, but a descriptor wants a positive one
        steps = [s if s > 0 else 16 for s in strides[2:5]]
        if any(s == 0 and extent > 1 for s, extent in zip(strides[2:5], (sizes[2], key_heads, sk), strict=True)):
            return None
        made.append(Descriptor(view, (sizes[2], key_heads, sk, size), (*steps, 1), (1, 1, block_n, block_d(size))))
    return made
