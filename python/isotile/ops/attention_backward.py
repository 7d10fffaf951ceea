"""The gradients of attention."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch

from ..precision import accumulator, stored
from ..spec import Case, ErrorModel, OpSpec, Result, Scalar, Tensor, growth
from . import attention as forward


def attention_backward(
    grad_out, grad_lse, query, key, value, out, lse, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None,
    causal_alignment="top_left", window_left=None, window_right=None, softcap=None, sinks=None, alibi_slopes=None,
    seqlens_k=None, dropout_seed=None, need_mask=False, need_sinks=False,
):  # fmt: skip
    """Gradients of `attention`; probabilities are taken again from lse.

    With P = exp(scores - lse), dP = (grad_out @ value.T) * dropout's factor and D = sum(grad_out * out) - grad_lse for
    each row: dS = P * (dP - D); grad_value = (P * factor).T @ grad_out; grad_query and grad_key follow from dS through
    softcap's slope and the scale; grad_attn_mask = dS; grad_sinks = -sum over rows of exp(sink - lse) * D.
    Dao, FlashAttention-2, 2023 (arXiv:2307.08691), section 3.

    Args:
        grad_out: [..., query_heads, queries, value_dim], the gradient of out.
        grad_lse: [..., query_heads, queries] or None, the gradient of lse.
        query, key, value, attn_mask, sinks, alibi_slopes, seqlens_k, dropout_seed: as in the forward pass.
        out, lse: its results.
        need_mask, need_sinks: whether those gradients are wanted; else they are returned empty.

    Returns:
        (grad_query, grad_key, grad_value, grad_attn_mask [..., query_heads, queries, keys], grad_sinks [query_heads]).
    """
    a = SimpleNamespace(**locals())
    wide = accumulator(query.dtype)
    heads, groups = query.shape[-3], query.shape[-3] // max(key.shape[-3], 1)
    raw, scores, visible = forward.scores_of(a, wide)
    row_lse = lse.to(wide)[..., None]
    p = forward.probabilities(scores, row_lse, visible)
    kept = forward.kept_of(a, p.shape, wide)
    upstream = grad_out.to(wide)
    values = forward.visible_values(a, visible, wide)
    dp = torch.where(visible, upstream @ values.mT, 0.0)
    if kept is not None:
        dp = torch.where(kept > 0, dp * kept, 0.0)  # a dropped pair has no gradient, whatever its value
    delta = (upstream * out.to(wide)).sum(-1, keepdim=True)
    # The 0 of a row with no visible key is a constant: what comes back through it, infinite or not, goes nowhere.
    delta = torch.where(visible.any(-1, keepdim=True), delta, 0.0)
    if grad_lse is not None:
        delta = delta - grad_lse.to(wide)[..., None]
    ds = torch.where(visible, p * (dp - delta), 0.0)
    slope = ds if softcap is None else torch.where(visible, ds * (1 - torch.tanh(raw / softcap).square()), 0.0)
    slope = slope * forward.default_scale(a)
    grad_query = forward.weighted(slope, forward.expand_heads(key.to(wide), heads), visible)
    grad_key = forward.weighted(slope.mT, query.to(wide), visible.mT)
    grad_value = forward.weighted((p if kept is None else p * kept).mT, upstream, visible.mT)

    def per_head(grad):
        loop = grad.shape[:-3]
        return grad.reshape(*loop, key.shape[-3], groups, *grad.shape[-2:]).sum(-3)

    result = {
        "grad_query": stored(grad_query, query.dtype),
        "grad_key": stored(per_head(grad_key), key.dtype),
        "grad_value": stored(per_head(grad_value), value.dtype),
    }
    if need_mask:
        result["grad_attn_mask"] = stored(ds, attn_mask.dtype)
    if need_sinks:
        column = sinks.to(wide)[:, None, None]
        none = (row_lse == -math.inf) | (column == -math.inf)  # a sink of -inf is no sink
        weight = torch.where(none, 0.0, torch.exp(column - row_lse))
        total = -(weight * delta).squeeze(-1)
        result["grad_sinks"] = stored(total.sum(-1).reshape(-1, heads).sum(0), sinks.dtype)
    return result


def _error(args, truth, dims):
    raw, scores, visible = forward.scores_of(args, torch.float64)
    lse = args.lse.double()[..., None]
    p, _, relative = forward.score_error(args, scores, visible, lse)
    relative = relative + forward.compounded(torch.where(lse.isfinite(), lse, 0.0).abs(), args.query.dtype)
    kept = forward.kept_of(args, p.shape, torch.float64)
    heads, groups = args.query.shape[-3], args.query.shape[-3] // max(args.key.shape[-3], 1)
    upstream = args.grad_out.double().abs()
    values = forward.visible_values(args, visible, torch.float64).abs()
    dp = upstream @ values.mT
    if kept is not None:
        dp = dp * kept
    delta = (upstream * args.out.double().abs()).sum(-1, keepdim=True)
    if args.grad_lse is not None:
        delta = delta + args.grad_lse.double().abs()[..., None]
    queries, keys, dv = args.query.shape[-2], args.key.shape[-2], args.value.shape[-1]
    size = torch.where(visible, p * (dp + delta), 0.0)
    lost = forward.vanished(visible, args.query.dtype)
    error = score_error = torch.where(visible, (p * (relative + growth(dv) + 4) + lost) * (dp + delta), 0.0)
    scale = abs(forward.default_scale(args))
    cap: torch.Tensor | float = 1.0
    if args.softcap is not None:
        # The slope 1 - tanh^2 moves by at most 2 / softcap for each unit that the raw score moves, and cancels near 1.
        cap = 1 - torch.tanh(raw / args.softcap).square()
        magnitude = scale * (args.query.double().abs() @ forward.expand_heads(args.key.double().abs(), heads).mT)
        error = error * cap + size * (2 * magnitude * (growth(args.query.shape[-1]) + 3) / args.softcap + 8)
    slope, slope_error = size * cap * scale, error * scale
    key = forward.expand_heads(args.key.double().abs(), heads)
    query = args.query.double().abs()

    def per_head(grad):
        loop = grad.shape[:-3]
        return grad.reshape(*loop, args.key.shape[-3], groups, *grad.shape[-2:]).sum(-3)

    dropped, lost = (p, lost) if kept is None else (p * kept, lost * kept)
    slope_operand = forward.operand_size(slope, visible, args.query.dtype, scale)
    dropped_operand = forward.operand_size(dropped, visible, args.query.dtype)
    terms = {
        "grad_query": (slope_error @ key + growth(keys) * (slope @ key), slope_operand @ key),
        "grad_key": (
            per_head(slope_error.mT @ query + growth(queries * groups) * (slope.mT @ query)),
            per_head(slope_operand.mT @ query),
        ),
        "grad_value": (
            per_head((dropped * (relative + growth(queries * groups)) + lost).mT @ upstream),
            per_head(dropped_operand.mT @ upstream),
        ),
    }
    if "grad_attn_mask" in truth:
        terms["grad_attn_mask"] = (score_error, 0.0)
    if "grad_sinks" in truth:
        weight = torch.where(lse == -math.inf, 0.0, torch.exp(args.sinks.double()[:, None, None] - lse))
        rows = math.prod(args.query.shape[:-3]) * queries
        slack = (
            growth(rows)
            + growth(dv)
            + lse.nan_to_num(0.0, 0.0, 0.0).abs()
            + args.sinks.double().abs()[:, None, None]
            + 8
        )
        total = (weight * delta * slack).squeeze(-1).sum(-1).reshape(-1, heads).sum(0)
        terms["grad_sinks"] = (total, 0.0)
    return terms


ORDER = (
    "grad_out", "grad_lse", "query", "key", "value", "attn_mask", "sinks", "alibi_slopes", "seqlens_k", "dropout_seed",
    "out", "lse",
)  # fmt: skip


def _lower(tensors, outs, scalars):
    return (
        "attention_backward",
        {n: tensors[n] for n in ORDER},
        outs,
        forward.numbers_of(scalars, scalars.dims.d),
    )


SPEC = OpSpec(
    reference=attention_backward,
    args={
        "grad_out": Tensor("... hq sq dv", same_as="query"),
        "grad_lse": Tensor("... hq sq", optional=True, autocast=False),
        **forward.ARGS,
        "out": Tensor("... hq sq dv", same_as="query"),
        "lse": Tensor("... hq sq", autocast=False),
        "need_mask": Scalar("bool"),
        "need_sinks": Scalar("bool"),
    },
    results={
        "grad_query": Result("... hq sq d", ("query",)),
        "grad_key": Result("... hk sk d", ("key",)),
        "grad_value": Result("... hk sk dv", ("value",)),
        "grad_attn_mask": Result("... hq sq sk", ("attn_mask",), needs="need_mask"),
        "grad_sinks": Result("hq", ("sinks",), needs="need_sinks"),
    },
    requires=forward.REQUIRES,
    lower=_lower,
    error=ErrorModel(_error),
    flops=lambda d, s: 2.5 * forward.flops(d, s),
    laws=("deterministic",),
    # A probability that underflows in float32 but not in float64 turns an infinite gradient into NaN, or the reverse.
    nonfinite=False,
    internal=True,
    cases=tuple(
        Case(
            c.name,
            c.tags,
            {
                **c.args,
                "grad_out": (*c.args["query"][:-1], c.args["value"][-1]),
                "out": (*c.args["query"][:-1], c.args["value"][-1]),
                "lse": c.args["query"][:-1],
            },
        )
        for c in forward.CASES
    ),
)
