"""Attention in float64 as the kernel form states it, with its gradients by autograd; Philox in integers."""

import numpy as np
import torch


def philox(seed, key, query, head):
    """First word of Philox-4x32-10 for counter (key, query, head, 0)."""
    mask = np.uint64(0xFFFFFFFF)
    c = [np.broadcast_arrays(key, query, head, np.uint64(0))[i].astype(np.uint64) for i in range(4)]
    k = [np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)]
    for _ in range(10):
        low, high = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(high >> np.uint64(32)) ^ c[1] ^ k[0], high & mask, (low >> np.uint64(32)) ^ c[3] ^ k[1], low & mask]
        k = [(k[0] + np.uint64(0x9E3779B9)) & mask, (k[1] + np.uint64(0xBB67AE85)) & mask]
    return c[0]


def attention(
    q,
    k,
    v,
    attn_mask=None,
    sinks=None,
    alibi_slopes=None,
    seqlens_k=None,
    dropout_seed=None,
    *,
    dropout_p=0.0,
    is_causal=0,
    scale=1.0,
    bottom_right=0,
    window_left=-1,
    window_right=-1,
    softcap=0.0,
):
    """q [b, hq, sq, d], k [b, hk, sk, d], v [b, hk, sk, dv], all float64 -> out, lse."""
    b, hq, sq, _ = q.shape
    hk, sk = k.shape[1], k.shape[2]
    k, v = (t.repeat_interleave(hq // hk, 1) for t in (k, v))
    keys = torch.full((b,), sk) if seqlens_k is None else seqlens_k
    i, j = torch.arange(sq)[None, None, :, None], torch.arange(sk)[None, None, None, :]
    keys = keys[:, None, None, None]
    position = i + (keys - sq if bottom_right else 0)
    visible = (j < keys).expand(b, hq, sq, sk)
    if is_causal:
        visible = visible & (j <= position)
    if window_left >= 0:
        visible = visible & (j >= position - window_left)
    if window_right >= 0:
        visible = visible & (j <= position + window_right)
    s = scale * (q @ k.transpose(-1, -2))
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s - alibi_slopes.double()[None, :, None, None] * (position - j).abs()
    if attn_mask is not None:
        visible = visible & (attn_mask if attn_mask.dtype == torch.bool else attn_mask != -float("inf"))
        if attn_mask.dtype != torch.bool:
            s = s + attn_mask.masked_fill(~visible, 0.0).double()
    s = s.masked_fill(~visible, -float("inf"))
    whole = s
    if sinks is not None:
        whole = torch.cat([s, sinks.double()[None, :, None, None].expand(b, hq, sq, 1)], -1)
    empty = (whole == -float("inf")).all(-1, keepdim=True) if whole.shape[-1] else torch.ones(b, hq, sq, 1, dtype=bool)
    lse = whole.masked_fill(empty, 0.0).logsumexp(-1) if whole.shape[-1] else torch.zeros(b, hq, sq, dtype=q.dtype)
    p = (s - lse[..., None]).exp().masked_fill(empty | ~visible, 0.0)
    if dropout_p > 0:
        word = philox(
            int(dropout_seed),
            j.numpy().astype(np.uint64),
            i.numpy().astype(np.uint64),
            np.arange(b * hq, dtype=np.uint64).reshape(b, hq, 1, 1),
        )
        keep = torch.from_numpy((word >> np.uint64(8)).astype(np.int64)) * 2.0**-24 >= dropout_p
        p = p * keep / (1 - dropout_p)
    out = p @ v
    return out, lse.masked_fill(empty[..., 0], -float("inf"))
