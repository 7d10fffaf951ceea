"""The operators that the demo's models need, in plain PyTorch: the other side of the comparison.

Same names and arguments as `isotile`'s functions, so that a model written once runs on either namespace. Each uses the
function of `torch.nn.functional` that a PyTorch user would call.
"""

import torch
import torch.nn.functional as F

_ACTIVATIONS = {
    None: lambda z: z,
    "gelu": F.gelu,
    "silu": F.silu,
}


def linear(x, weight, bias=None, *, activation=None, residual=None):
    y = _ACTIVATIONS[activation](F.linear(x, weight, bias))
    return y if residual is None else y + residual


def matmul(a, b):
    return torch.matmul(a, b)


def softmax(x, dim=-1):
    return F.softmax(x, dim)


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5, *, residual=None):
    if residual is None:
        return F.layer_norm(x, normalized_shape, weight, bias, eps)
    total = x + residual
    return F.layer_norm(total, normalized_shape, weight, bias, eps), total


def rms_norm(x, normalized_shape, weight=None, eps=None, *, residual=None):
    if residual is None:
        return F.rms_norm(x, normalized_shape, weight, eps)
    total = x + residual
    return F.rms_norm(total, normalized_shape, weight, eps), total


def attention(query, key, value, *, is_causal=False, enable_gqa=False, seqlens_k=None):
    mask = None
    if seqlens_k is not None:
        positions = torch.arange(key.shape[-2], device=key.device)
        mask = (positions < seqlens_k[:, None])[:, None, None, :]  # [batch, 1, 1, keys]
    return F.scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, enable_gqa=enable_gqa)
