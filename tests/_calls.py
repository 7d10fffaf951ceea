"""Small calls of every public operator, for tests of the machinery around the kernels."""

from __future__ import annotations

import torch

import isotile


def randn(*shape, dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(sum(shape) + 1)
    return torch.randn(shape, generator=generator).to(dtype).requires_grad_(requires_grad)


def calls(dtype=torch.float32, grad=False):
    """name -> (function of its tensors, tensors)."""

    def t(*shape):
        return randn(*shape, dtype=dtype, requires_grad=grad)

    packed = isotile.quantize(randn(5, 8), "int4", group_size=32, symmetric=False)
    offsets = torch.tensor([2, 2, 5], dtype=torch.int32)
    return {
        "matmul": (lambda a, b: isotile.matmul(a, b), (t(3, 6, 8), t(8, 5))),
        "matmul_epilogue": (
            lambda a, b, c, r: isotile.matmul(a, b, bias=c, activation="gelu", residual=r),
            (t(6, 8), t(8, 5), t(5), t(6, 5)),
        ),
        "linear": (lambda x, w, b: isotile.linear(x, w, b, activation="silu"), (t(2, 6, 8), t(5, 8), t(5))),
        "quantized_linear": (
            lambda x, b, r: isotile.quantized_linear(x, packed, b, activation="silu", residual=r),
            (t(2, 6, 8), t(5), t(2, 6, 5)),
        ),
        "grouped_matmul": (lambda a, b: isotile.grouped_matmul(a, b, offsets), (t(6, 8), t(3, 8, 5))),
        "layer_norm": (lambda x, w, b: isotile.layer_norm(x, 8, w, b), (t(3, 6, 8), t(8), t(8))),
        "layer_norm_residual": (
            lambda x, w, b, r: isotile.layer_norm(x, 8, w, b, residual=r),
            (t(3, 6, 8), t(8), t(8), t(3, 6, 8)),
        ),
        "rms_norm": (lambda x, w: isotile.rms_norm(x, 8, w), (t(3, 6, 8), t(8))),
        "rms_norm_residual": (
            lambda x, w, r: isotile.rms_norm(x, 8, w, residual=r, weight_offset=1.0),
            (t(3, 6, 8), t(8), t(3, 6, 8)),
        ),
        "softmax": (lambda x: isotile.softmax(x, 1), (t(3, 6, 8),)),
        "attention": (
            lambda q, k, v: isotile.attention(q, k, v, is_causal=True, enable_gqa=True),
            (t(2, 4, 6, 8), t(2, 2, 6, 8), t(2, 2, 6, 5)),
        ),
        "attention_options": (
            lambda q, k, v, s, m: isotile.attention(
                q, k, v, m, sinks=s, softcap=5.0, window=(3, None), causal_alignment="bottom_right", return_lse=True
            ),
            (t(2, 4, 6, 8), t(2, 4, 7, 8), t(2, 4, 7, 8), t(4), t(6, 7)),
        ),
    }


NAMES = tuple(calls())


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)
