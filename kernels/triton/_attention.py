"""What attention's forward and backward kernels share: scores, visibility, dropout, ranges, host analysis.

Tiles of scores are [queries, keys] in the forward pass and in grad_query, [keys, queries] in grad_key/grad_value; the
functions here take indices that broadcast to the tile, so they serve both.
"""

import math
from dataclasses import dataclass

import torch

import triton
import triton.language as tl

from ._layout import architecture, dtype_name, loops, next_power, product, refuse_dtypes
from ._tiles import tanh

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def scores(
    raw,
    query,
    key,
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
    MASKED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_SLOPES: tl.constexpr,
    WIDE: tl.constexpr,
    BARE: tl.constexpr = False,
):
    """Scores in units of log 2, hidden ones -inf; the derivative of the softcap (1.0 without); what is visible.

    MASKED: some index rule (length, causal, window) may hide part of this tile. A mask tensor may hide in any tile.
    BARE: there are no more than index rules, and the caller multiplies by scale * LOG2E, which is positive.
    """
    slack = 1.0
    plain: tl.constexpr = not HAS_SOFTCAP and not HAS_SLOPES and mask_base is None
    if BARE:
        s = raw
    elif plain:
        s = raw * (scale * LOG2E)
    else:
        s = raw * scale
        if HAS_SOFTCAP:
            t = tanh(s / softcap)
            slack = 1.0 - t * t
            s = softcap * t
        if HAS_SLOPES:
            s -= slope * tl.abs(query + offset - key).to(tl.float32)
    visible = (key < keys) & (query < sq)
    if mask_base is not None:
        query_at = query.to(tl.int64) if WIDE else query
        key_at = key.to(tl.int64) if WIDE else key
        at = mask_base + query_at * mask_query_stride + key_at * mask_key_stride
        if mask_base.dtype.element_ty == tl.int1:
            shown = tl.load(at, mask=visible, other=0).to(tl.int1)
            s = tl.where(shown, s, -float("inf"))
            visible &= shown
        else:
            bias = tl.load(at, mask=visible, other=0.0).to(tl.float32)
            s = tl.where(bias == -float("inf"), bias, s + bias)
            visible &= bias != -float("inf")
    if not plain:
        s *= LOG2E
    if MASKED:
        if HAS_RIGHT:
            visible &= key <= query + offset + right
        if HAS_LEFT:
            visible &= key >= query + offset - left
        s = tl.where(visible, s, -float("inf"))
    return s, slack, visible


@triton.jit
def kept(seed_ptr, query, key, head, threshold):
    """Dropout's keep mask; the indices broadcast to the tile. threshold = ceil(p * 2**24), an exact comparison."""
    zero = (query + key) * 0
    word, _, _, _ = tl.philox(tl.load(seed_ptr), key + zero, query + zero, head + zero, zero, 10)
    return (word >> 8).to(tl.int32) >= threshold


@triton.jit
def key_range(
    first, last, keys, offset, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """Keys that queries first..last can see: (start, first whole, end of whole, end); starts are multiples of BLOCK.

    Blocks between the middle two are visible to every one of these queries.
    """
    start = 0
    end = keys
    whole_start = 0
    whole_end = (keys // BLOCK) * BLOCK
    if HAS_RIGHT:
        end = tl.minimum(keys, tl.maximum(last + offset + right + 1, 0))
        whole_end = tl.minimum(whole_end, (tl.maximum(first + offset + right + 1, 0) // BLOCK) * BLOCK)
    if HAS_LEFT:
        start = (tl.maximum(first + offset - left, 0) // BLOCK) * BLOCK
        whole_start = tl.cdiv(tl.maximum(last + offset - left, 0), BLOCK) * BLOCK
    top = tl.cdiv(end, BLOCK) * BLOCK
    whole_start = tl.minimum(tl.maximum(whole_start, start), tl.maximum(top, start))
    whole_end = tl.maximum(tl.minimum(whole_end, top), whole_start)
    return start, whole_start, whole_end, end


@triton.jit
def query_range(
    first, last, keys, sq, offset, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """Queries that can see keys first..last, as key_range. Nothing is whole if some key is beyond the length."""
    start = 0
    end = sq
    whole_start = 0
    whole_end = (sq // BLOCK) * BLOCK
    if HAS_RIGHT:
        start = (tl.maximum(first - offset - right, 0) // BLOCK) * BLOCK
        whole_start = tl.cdiv(tl.maximum(last - offset - right, 0), BLOCK) * BLOCK
    if HAS_LEFT:
        end = tl.minimum(sq, tl.maximum(last - offset + left + 1, 0))
        whole_end = tl.minimum(whole_end, (tl.maximum(first - offset + left + 1, 0) // BLOCK) * BLOCK)
    if last >= keys:
        whole_end = whole_end * 0
    if first >= keys:
        end = end * 0
    top = tl.cdiv(end, BLOCK) * BLOCK
    whole_start = tl.minimum(tl.maximum(whole_start, start), tl.maximum(top, start))
    whole_end = tl.maximum(tl.minimum(whole_end, top), whole_start)
    return start, whole_start, whole_end, end


@triton.jit
def finite_part(x):
    """x with NaN and infinities replaced by 0."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, x * 0 if x.dtype.is_int() else tl.zeros_like(x))


@triton.jit
def nonfinite(x):
    return (x != x) | (tl.abs(x) == float("inf"))


@triton.jit
def add_nonfinite(acc, weight, visible, x, x_base, row_stride, col_stride, cols, begin, stop, BLOCK: tl.constexpr):
    """acc + weight @ x over the NaN and infinite elements of x alone, visible pairs only; a weight of 0 makes a NaN.

    x holds rows begin.. of the matrix at x_base. Its rows are taken one by one, since a product of tiles would mix in
    hidden pairs, and without the matrix units, so that this rare path adds nothing to the memory that they need.
    """
    if tl.max(tl.max(nonfinite(x.to(tl.float32)).to(tl.int32), axis=1), axis=0) > 0:
        lane = tl.arange(0, BLOCK)
        col = tl.arange(0, x.shape[1])
        for row in tl.range(begin, tl.minimum(begin + BLOCK, stop), num_stages=1):
            at = x_base + tl.cast(row, tl.int64) * row_stride + col * col_stride
            own = tl.load(at, mask=col < cols, other=0.0).to(tl.float32)
            bad = nonfinite(own)
            if tl.max(bad.to(tl.int32), axis=0) > 0:
                pairs = visible & (lane == row - begin)[None, :]
                factor = tl.sum(tl.where(pairs, weight, 0.0), axis=1)
                seen = tl.max(pairs.to(tl.int32), axis=1) > 0
                acc += tl.where(seen[:, None] & bad[None, :], factor[:, None] * own[None, :], 0.0)
    return acc


@dataclass(frozen=True)
class Options:
    """The scalars of the kernel form as the kernels take them."""

    scale: float
    softcap: float
    left: int
    right: int
    has_left: bool
    has_right: bool
    bottom_right: bool
    dropout: bool
    threshold: int
    keep_scale: float

    @classmethod
    def make(cls, dropout_p, is_causal, scale, bottom_right, window_left, window_right, softcap, sq, sk):
        left, right = int(window_left), int(window_right)
        if is_causal:
            right = 0  # causal is a window to the right of width 0, and no window is narrower
        limit = sq + sk + 1  # wider windows hide nothing; keeps the index arithmetic in 32 bits
        has_left, has_right = 0 <= left < limit, 0 <= right < limit
        keep = 1.0 - float(dropout_p)
        return cls(
            float(scale),
            float(softcap),
            left if has_left else 0,
            right if has_right else 0,
            has_left,
            has_right,
            bool(bottom_right),
            float(dropout_p) > 0,
            math.ceil(float(dropout_p) * 2**24),
            1.0 / keep if keep > 0 else 0.0,
        )


def walk(views, core):
    """Loop sizes padded to three and the full strides (loops, then core dims) of each view; zeros for absent ones."""
    sizes, strides = loops(views, core)
    return sizes, [
        s + (tuple(v.strides[len(v.strides) - c :]) if v is not None else (0,) * c)
        for v, s, c in zip(views, strides, core, strict=True)
    ]


def spans_wide(*pairs):
    """True if an offset inside one head can exceed 32 bits; pairs of (sizes, strides)."""
    return any(
        sum((size - 1) * abs(stride) for size, stride in zip(sizes, strides, strict=True)) >= 2**31 - 2**24
        for sizes, strides in pairs
    )


def block_d(d):
    return next_power(d, 16)


def family():
    kind, arch = architecture()
    if kind == "interpreter":
        return "interpreter"
    if kind == "hip":
        return "cdna"
    return {80: "ampere", 90: "hopper", 100: "hopper", 103: "hopper"}.get(arch, "consumer")


def lookup(table, dtype, d):
    """The table's row for this architecture and head size: rows are (largest d, numbers...)."""
    name = family()
    rows = table["float32"] if dtype == torch.float32 and name != "interpreter" else table[name]
    return next(row[1:] for row in rows if d <= row[0])


def refuse(query, key, value, others):
    reason = refuse_dtypes({"query": query, "key": key, "value": value, **others})
    if reason is None and max(query.shape[-1], value.shape[-1]) > 512:
        reason = f"head size {max(query.shape[-1], value.shape[-1])}; the Triton kernels hold at most 512"
    if reason is None and max(query.shape[-2], key.shape[-2]) >= 2**30:
        reason = "more than 2**30 queries or keys in one head"
    return reason


def rich(dropout_p, softcap, attn_mask, alibi_slopes):
    """Whether a score needs more live values than its exponent: such tiles are halved rather than spilled."""
    return dropout_p > 0 or softcap > 0 or attn_mask is not None or alibi_slopes is not None


def attention_problem(query, key, value, attn_mask, alibi_slopes, scalars):
    """What a tuned configuration depends on: words and truths must be equal, numbers near."""
    heads, sq = query.shape[-3:-1]
    return {
        "dtype": dtype_name(query.dtype),
        "tf32": bool(scalars.get("allow_tf32", False)),
        "d": max(block_d(query.shape[-1]), block_d(value.shape[-1])),
        "ranged": bool(scalars["is_causal"]) or scalars["window_left"] >= 0 or scalars["window_right"] >= 0,
        "rich": rich(scalars["dropout_p"], scalars["softcap"], attn_mask, alibi_slopes),
        "programs": product(query.shape[:-3]) * heads,
        "queries": sq,
        "keys": key.shape[-2],
    }


#: Share of the matrix units' speed that a tile of scores reaches, by its area.
_SHARE = ((128 * 128, 1.0), (128 * 64, 0.88), (64 * 64, 0.7), (64 * 32, 0.5), (0, 0.35))


def tile_cost(problem, block_m, block_n, sms):
    """Modelled time of all tiles of scores: waves of programs, in each the steps over the other dimension."""
    share = next(share for area, share in _SHARE if block_m * block_n >= area)
    programs = problem["programs"] * triton.cdiv(problem["queries"], block_m)
    steps = triton.cdiv(problem["keys"], block_n)
    waves = max(programs / sms, 1.0)
    return waves * (steps * block_m * block_n * problem["d"] / share + 60000)
