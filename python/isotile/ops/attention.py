"""Scaled dot-product attention with every common option."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from ..precision import accumulator, stored
from ..spec import MASKS, Case, ErrorModel, OpSpec, Result, Scalar, Tensor, Values, growth
from . import _philox

ALIGNMENTS = ("top_left", "bottom_right")


def door(
    query,
    key,
    value,
    attn_mask=None,
    dropout_p=0.0,
    is_causal=False,
    scale=None,
    enable_gqa=False,
    *,
    causal_alignment="top_left",
    window=None,
    softcap=None,
    sinks=None,
    alibi_slopes=None,
    seqlens_k=None,
    return_lse=False,
):
    """softmax(query @ key.T * scale) @ value, as `torch.nn.functional.scaled_dot_product_attention`, with more options.

    Blocked with an online softmax where the backend has a kernel, so memory is linear in the sequence length. Scores
    and sums in float32 (float64 for float64). Dao, FlashAttention-2, 2023 (arXiv:2307.08691); Milakov and Gimelshein,
    Online normalizer calculation for softmax, 2018 (arXiv:1805.02867).

    Query i stands at position i + offset: offset 0 for "top_left"; keys - queries for "bottom_right", where keys is
    seqlens_k of the batch entry if given. Causal, window and ALiBi use that position. Order: scale, softcap, then
    ALiBi and attn_mask added, then hidden keys removed. A hidden key never reaches the result, whatever it holds. A
    row with no visible key gives exactly 0, and zero gradients.

    Args:
        query: [..., query_heads, queries, head_dim]. float32, bfloat16, float16 or float64.
        key: [..., heads, keys, head_dim], of query's dtype.
        value: [..., heads, keys, value_dim], of query's dtype.
        attn_mask: broadcasts to [..., query_heads, queries, keys]. Boolean (True means visible), or added to the
            scores; -inf hides.
        dropout_p: probability of dropping a probability, in [0, 1). The mask is the same on every backend for one
            state of PyTorch's random generator.
        is_causal: hide keys after the query's position.
        scale: of the scores; 1 / sqrt(head_dim) if None.
        enable_gqa: allow query_heads to be a multiple of heads: query head h reads head h // (query_heads // heads).
        causal_alignment: "top_left" (PyTorch's) or "bottom_right" (decode).
        window: (left, right), each an int of at least 0, or None for unbounded:
            position - left <= key <= position + right.
        softcap: softcap * tanh(score / softcap); greater than 0.
        sinks: [query_heads], a learnable logit that joins the softmax's denominator and has no value.
        alibi_slopes: [query_heads]: -slope * |position - key| is added to the scores. Not differentiable.
        seqlens_k: [...] int32, the number of valid keys of each batch entry; the rest may hold anything.
        return_lse: also return the natural-log log-sum-exp of the scores (with the sink), differentiable.

    Returns:
        out: [..., query_heads, queries, value_dim] in query's dtype; with return_lse the pair (out, lse), lse
        [..., query_heads, queries] in float32 (float64 for float64), -inf (or the sink) for a row with no visible key.

    Raises:
        ValueError: a shape or option that does not fit.
        TypeError: a dtype or type that is not allowed.
    """
    if not isinstance(enable_gqa, bool):
        raise TypeError(f"isotile.attention: enable_gqa: wanted a bool, got {enable_gqa!r}")
    if not isinstance(return_lse, bool):
        raise TypeError(f"isotile.attention: return_lse: wanted a bool, got {return_lse!r}")
    if (
        not enable_gqa
        and isinstance(query, torch.Tensor)
        and isinstance(key, torch.Tensor)
        and query.ndim > 2
        and key.ndim > 2
        and query.shape[-3] != key.shape[-3]
    ):
        raise ValueError(
            f"isotile.attention: key: wanted {query.shape[-3]} heads (from query; or enable_gqa=True), "
            f"got {key.shape[-3]}"
        )
    left = right = None
    if window is not None:
        if not isinstance(window, tuple | list) or len(window) != 2:
            raise ValueError(f"isotile.attention: window: wanted a pair (left, right), got {window!r}")
        left, right = window
        for side in window:
            if side is not None and (not isinstance(side, int) or isinstance(side, bool)):
                raise TypeError(f"isotile.attention: window: wanted ints or None, got {window!r}")
            if side is not None and side < 0:
                raise ValueError(f"isotile.attention: window: wanted ints of at least 0 or None, got {window!r}")
    seed = None
    if dropout_p and isinstance(query, torch.Tensor):
        seed = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=query.device)
    values = (
        query, key, value, attn_mask, dropout_p, is_causal, scale, causal_alignment, left, right, softcap, sinks,
        alibi_slopes, seqlens_k, seed,
    )  # fmt: skip
    return values, ("out", "lse") if return_lse else ("out",)


def visibility(a):
    """Scores' positions: [..., queries, keys] True where a key may be seen, and |position - key|."""
    queries, keys = a.query.shape[-2], a.key.shape[-2]
    device = a.query.device
    column = torch.arange(keys, device=device)
    if a.seqlens_k is None:
        limit = torch.tensor(keys, device=device)
    else:
        limit = a.seqlens_k.to(torch.int64)[..., None, None, None].clamp(0, keys)
    offset = limit - queries if a.causal_alignment == "bottom_right" else torch.zeros_like(limit)
    position = torch.arange(queries, device=device)[:, None] + offset
    visible = (column < limit) & torch.ones_like(position, dtype=torch.bool)
    if a.is_causal:
        visible = visible & (column <= position)
    if a.window_left is not None:
        visible = visible & (column >= position - a.window_left)
    if a.window_right is not None:
        visible = visible & (column <= position + a.window_right)
    if a.attn_mask is not None:
        seen = a.attn_mask if a.attn_mask.dtype == torch.bool else a.attn_mask != -math.inf
        visible = visible & seen
    return visible, (position - column).abs()


def expand_heads(x, heads):
    """Key or value heads repeated for grouped queries."""
    return x if x.shape[-3] == heads else x.repeat_interleave(heads // x.shape[-3], dim=-3)


def default_scale(a):
    return 1 / math.sqrt(max(a.query.shape[-1], 1)) if a.scale is None else a.scale


def scores_of(a, wide):
    """(raw, scores, visible): scaled scores before and after softcap, ALiBi and mask; hidden ones are -inf.

    All three have the call's loop dimensions, also those that only value or seqlens_k has.
    """
    heads = a.query.shape[-3]
    raw = (a.query.to(wide) @ expand_heads(a.key.to(wide), heads).mT) * default_scale(a)
    scores = raw if a.softcap is None else a.softcap * torch.tanh(raw / a.softcap)
    visible, distance = visibility(a)
    if a.alibi_slopes is not None:
        scores = scores - a.alibi_slopes.to(wide)[:, None, None] * distance
    if a.attn_mask is not None and a.attn_mask.dtype != torch.bool:
        scores = scores + a.attn_mask.to(wide)
    shape = torch.broadcast_shapes(scores.shape, visible.shape, (*a.value.shape[:-3], 1, 1, 1))
    visible = visible.expand(shape)
    return raw.expand(shape), torch.where(visible, scores, -math.inf), visible


def kept_of(a, shape, wide):
    """Dropout's factor on each probability, or None."""
    if not a.dropout_p:
        return None
    keep = _philox.keep_mask(a.dropout_seed, math.prod(shape[:-2]), shape[-2], shape[-1], a.dropout_p)
    return keep.reshape(shape).to(wide) / (1 - a.dropout_p)


def lse_of(scores, sinks, wide):
    """log sum exp of each row with its sink: [..., heads, queries, 1]."""
    if sinks is not None:
        column = sinks.to(wide)[:, None, None].expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, column], -1)
    elif scores.shape[-1] == 0:
        return scores.new_full((*scores.shape[:-1], 1), -math.inf)
    top = scores.amax(-1, keepdim=True)
    base = torch.where(top == -math.inf, 0.0, top)  # keeps NaN and +inf
    total = (scores - base).exp().sum(-1, keepdim=True)
    return torch.where(top == -math.inf, top, base + total.log())


def probabilities(scores, lse, visible):
    return torch.where(visible, torch.exp(scores - torch.where(lse == -math.inf, 0.0, lse)), 0.0)


def visible_values(a, visible, wide):
    """Values with those that no query of the head may see set to 0, so that 0 * NaN cannot leak."""
    heads = a.query.shape[-3]
    value = expand_heads(a.value.to(wide), heads)
    seen = visible.any(-2)[..., None]
    return torch.where(seen, value, 0.0)


def weighted(weight, value, visible):
    """weight @ value where a hidden pair contributes exactly nothing, even if the value is not finite.

    `weight` is 0 where hidden. Infinite and NaN values are summed apart, by which signs meet in each element.
    """
    bad = ~value.isfinite()
    if not bool(bad.any()):
        return weight @ value
    wide = weight.dtype
    up, down = (value == math.inf).to(wide), (value == -math.inf).to(wide)
    positive, negative = (weight > 0).to(wide), (weight < 0).to(wide)
    rises = positive @ up + negative @ down > 0
    falls = positive @ down + negative @ up > 0
    undefined = visible.to(wide) @ value.isnan().to(wide) + (visible & (weight == 0)).to(wide) @ (up + down) > 0
    total = weight @ torch.where(bad, 0.0, value)
    total = torch.where(rises, total + math.inf, total)
    total = torch.where(falls, total - math.inf, total)
    return torch.where(undefined, math.nan, total)


def attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, causal_alignment="top_left",
    window_left=None, window_right=None, softcap=None, sinks=None, alibi_slopes=None, seqlens_k=None, dropout_seed=None,
):  # fmt: skip
    """The operator behind `isotile.attention`: a window side each, and the dropout seed, [1] int64, as arguments."""
    a = SimpleNamespace(**locals())
    wide = accumulator(query.dtype)
    _, scores, visible = scores_of(a, wide)
    lse = lse_of(scores, sinks, wide)
    p = probabilities(scores, lse, visible)
    kept = kept_of(a, p.shape, wide)
    if kept is not None:
        p = p * kept
    # A row whose scores are all -inf sums nothing and is 0, whatever the values hold.
    out = weighted(p, visible_values(a, visible, wide), visible & (lse != -math.inf))
    return {"out": stored(out, query.dtype), "lse": lse.squeeze(-1)}


def _gradient(saved, grads, needs):
    from ..library import call

    if grads["out"] is None and grads["lse"] is None:
        return {}
    grad_out = torch.zeros_like(saved.out) if grads["out"] is None else grads["out"]
    options = {n: getattr(saved, n) for n in OPTIONS}
    found = call(
        "attention_backward",
        grad_out,
        grads["lse"],
        saved.query,
        saved.key,
        saved.value,
        saved.out,
        saved.lse,
        **options,
        need_mask=needs["attn_mask"],
        need_sinks=needs["sinks"],
    )
    names = ("query", "key", "value", "attn_mask", "sinks")
    return dict(zip(names, found, strict=True))


OPTIONS = (
    "attn_mask", "dropout_p", "is_causal", "scale", "causal_alignment", "window_left", "window_right", "softcap",
    "sinks", "alibi_slopes", "seqlens_k", "dropout_seed",
)  # fmt: skip


def numbers_of(scalars, head_dim):
    """The scalars of both attention kernels, in their order."""
    left, right = scalars.window_left, scalars.window_right
    return {
        "dropout_p": scalars.dropout_p,
        "is_causal": scalars.is_causal,
        "scale": 1 / math.sqrt(max(head_dim, 1)) if scalars.scale is None else scalars.scale,
        "bottom_right": scalars.causal_alignment == "bottom_right",
        "window_left": -1 if left is None else left,
        "window_right": -1 if right is None else right,
        "softcap": scalars.softcap or 0,
    }


def score_error(a, scores, visible, lse):
    """Error of the scores, and of each probability relative to itself, in units of the accumulator."""
    q, k = a.query.double().abs(), a.key.double().abs()
    heads, d = q.shape[-3], q.shape[-1]
    magnitude = abs(default_scale(a)) * (q @ expand_heads(k, heads).mT)
    error = magnitude * (growth(d) + 3)
    if a.softcap is not None:
        error = error + 6 * a.softcap
    _, distance = visibility(a)
    if a.alibi_slopes is not None:
        error = error + 3 * a.alibi_slopes.double().abs()[:, None, None] * distance
    if a.attn_mask is not None and a.attn_mask.dtype != torch.bool:
        error = error + 2 * torch.where(a.attn_mask.isfinite(), a.attn_mask.double().abs(), 0.0)
    finite = torch.where(visible & scores.isfinite(), scores, 0.0)
    error = torch.where(visible, error + finite.abs(), 0.0)
    top = torch.where(lse.isfinite(), lse, 0.0)
    p = probabilities(scores, lse, visible)
    mean_error = (p * error).sum(-1, keepdim=True)
    if a.sinks is not None:
        mean_error = mean_error + a.sinks.double().abs()[:, None, None]
    relative = error + mean_error + torch.where(visible, (finite - top).abs(), 0.0) + growth(a.key.shape[-2]) + 8
    return p, mean_error, compounded(relative, a.query.dtype)


def kernel_accumulator(dtype):
    """The dtype in which a kernel accumulates, also where the truth is being taken in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def compounded(relative, dtype):
    """What an exponent's error of `relative` units makes of a probability: exp(error) - 1, in those units."""
    unit = torch.finfo(kernel_accumulator(dtype)).eps / 2
    return torch.expm1((relative * unit).clamp(max=300.0)) / unit


def vanished(visible, dtype):
    """A probability's absolute error, in units of the accumulator, where a kernel puts 0 for one that is below twice
    the smallest normal number."""
    facts = torch.finfo(kernel_accumulator(dtype))
    return torch.where(visible, 2 * facts.smallest_normal / (facts.eps / 2), 0.0)


def operand_size(size, visible, dtype, scale=1.0):
    """What the operands' unit multiplies where a kernel rounds an intermediate of this size to their dtype.

    Below the smallest normal number the error of a rounding no longer falls with the number; in bfloat16, whose matrix
    units take what is below as 0, it is that number itself. The kernel may apply `scale` after the rounding or, where
    `size` has it, before.
    """
    facts = torch.finfo(dtype)
    least = facts.smallest_normal * max(1.0, scale)
    if dtype == torch.bfloat16:
        least /= facts.eps / 2
    return torch.where(visible, size.clamp_min(least), 0.0)


def _error(args, truth, dims):
    _, scores, visible = scores_of(args, torch.float64)
    lse = lse_of(scores, args.sinks, torch.float64)
    p, mean_error, relative = score_error(args, scores, visible, lse)
    kept = kept_of(args, p.shape, torch.float64)
    lost = vanished(visible, args.query.dtype)
    if kept is not None:
        p, lost = p * kept, lost * kept
    value = visible_values(args, visible, torch.float64).abs().nan_to_num(0.0, 0.0, 0.0)
    size = p @ value
    accumulated = (p * relative + lost) @ value + growth(args.key.shape[-2]) * size
    top = torch.where(lse.isfinite(), lse, 0.0)
    lse_error = mean_error + growth(args.key.shape[-2]) + 8 + top.abs()
    operand = operand_size(p, visible, args.query.dtype) @ value
    return {"out": (accumulated, operand), "lse": (lse_error.squeeze(-1), 0.0)}


def flops(dims, scalars):
    full = 2 * dims.rows * dims.hq * dims.sq * dims.sk * (dims.d + dims.dv)
    return full / 2 if scalars.is_causal else full


def draw_lengths(random, dims, shape):
    return random.integers(0, dims.sk + 1, shape).to(torch.int32)


def draw_seed(random, dims, shape):
    return random.integers(-(2**63), 2**63 - 1, shape)


def _positive(value):
    return None if value > 0 else "wanted a number greater than 0"


def _at_least_zero(value):
    return None if value >= 0 else "wanted an int of at least 0"


ARGS: dict[str, Tensor | Scalar] = {
    "query": Tensor("... hq sq d"),
    "key": Tensor("... hk sk d", same_as="query"),
    "value": Tensor("... hk sk dv", same_as="query"),
    "attn_mask": Tensor("... hq sq sk", dtypes=MASKS, optional=True, broadcast=True, autocast=False),
    "dropout_p": Scalar(
        "float", samples=(0.0, 0.3), check=lambda v: None if 0 <= v < 1 else "wanted a probability in [0, 1)"
    ),
    "is_causal": Scalar("bool"),
    "scale": Scalar("float?", samples=(None, 0.3)),
    "causal_alignment": Scalar("str", choices=ALIGNMENTS),
    "window_left": Scalar("int?", samples=(None, 0, 3, 17), check=_at_least_zero),
    "window_right": Scalar("int?", samples=(None, 0, 3, 17), check=_at_least_zero),
    "softcap": Scalar("float?", samples=(None, 2.0, 30.0), check=_positive),
    "sinks": Tensor("hq", optional=True, autocast=False),
    "alibi_slopes": Tensor("hq", optional=True, differentiable=False, autocast=False, values=Values(low=0.0, high=0.5)),
    "seqlens_k": Tensor(
        "...",
        dtypes=(torch.int32,),
        optional=True,
        differentiable=False,
        autocast=False,
        values=Values(make=draw_lengths),
    ),
    "dropout_seed": Tensor(
        "one", dtypes=(torch.int64,), optional=True, differentiable=False, autocast=False, values=Values(make=draw_seed)
    ),
}

REQUIRES = (
    (
        "key",
        lambda d, s: f"a number of heads (dimension -3) that divides query's {d.hq}",
        lambda d, s: d.hq == d.hk or (d.hk != 0 and d.hq % d.hk == 0),
    ),
    ("dropout_seed", "a tensor where dropout_p > 0", lambda d, s: not s.dropout_p or s.dropout_seed is not None),
)


def _lower(tensors, outs, scalars):
    return "attention", tensors, outs, numbers_of(scalars, scalars.dims.d)


def _case(name, tags, batch, heads, kv_heads, queries, keys, d, **options):
    shapes = {
        "query": (batch, heads, queries, d), "key": (batch, kv_heads, keys, d), "value": (batch, kv_heads, keys, d),
    }  # fmt: skip
    return Case(name, tags, {**shapes, **options})


CASES = (
    _case("tiny", "smoke bench", 1, 2, 2, 16, 16, 32),
    _case("odd_tails_causal", "smoke", 2, 4, 2, 67, 131, 40, is_causal=True, causal_alignment="bottom_right"),
    _case("bert_base", "bench tune", 8, 12, 12, 128, 128, 64),
    _case("vit_base", "bench", 8, 12, 12, 197, 197, 64),
    _case("prefill_512", "bench tune", 1, 8, 8, 512, 512, 64),
    _case("prefill_512_causal", "bench tune", 1, 8, 8, 512, 512, 64, is_causal=True),
    _case("llama3_8b_prefill", "bench tune", 1, 32, 8, 1024, 1024, 128, is_causal=True),
    _case("llama3_8b_decode", "bench tune", 1, 32, 8, 1, 4096, 128),
    _case("deepseek_v3_mla_decode", "bench", 1, 128, 1, 1, 1024, 576, value=(1, 1, 1024, 512)),
)

SPEC = OpSpec(
    reference=attention,
    args=ARGS,
    results={
        "out": Result("... hq sq dv", ("query",)),
        "lse": Result("... hq sq", ("accumulator",)),
    },
    requires=REQUIRES,
    lower=_lower,
    error=ErrorModel(_error),
    flops=flops,
    laws=("deterministic", "hidden_keys_do_not_matter"),
    saves={
        "default": (
            "query",
            "key",
            "value",
            "attn_mask",
            "sinks",
            "alibi_slopes",
            "seqlens_k",
            "dropout_seed",
            "out",
            "lse",
        )
    },
    backward=_gradient,
    autocast="lower",
    door=door,
    cases=CASES,
)
