"""The references themselves, which every other test takes for the truth: against PyTorch's own operators, defaults
included, and attention's options against their definition, pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import isotile
from isotile.ops import _philox
from isotile.spec import FLOATS


@pytest.fixture(autouse=True)
def _reference():
    with isotile.use_backend("reference"):
        yield


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def randn(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def close(got, want, dtype=torch.float64, ulps=4):
    """Both sides round once from an accumulator that is wider, or is float64."""
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, rtol=ulps * eps, atol=16 * eps, check_dtype=True)


ACTIVATIONS = {
    None: lambda z: z,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_matmul_and_linear_are_pytorchs_with_an_epilogue(activation):
    a, b, bias, residual = randn(2, 5, 7), randn(2, 7, 3), randn(3), randn(5, 1)
    want = ACTIVATIONS[activation](torch.matmul(a, b) + bias) + residual
    close(isotile.matmul(a, b, bias=bias, activation=activation, residual=residual), want)
    weight = randn(3, 7, seed=1)
    want = ACTIVATIONS[activation](F.linear(a, weight, bias)) + residual
    close(isotile.linear(a, weight, bias, activation=activation, residual=residual), want)


@pytest.mark.parametrize(
    ("a", "b"),
    [((7,), (7,)), ((7,), (7, 3)), ((5, 7), (7,)), ((2, 1, 5, 7), (4, 7, 3)), ((2, 5, 7), (7,)), ((0, 7), (7, 3))],
)
def test_matmul_has_torch_matmuls_shapes(a, b):
    close(isotile.matmul(randn(*a), randn(*b)), torch.matmul(randn(*a), randn(*b)))


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_dtypes_of_products(dtype):
    a, b = randn(5, 7, dtype=dtype), randn(7, 3, dtype=dtype)
    close(isotile.matmul(a, b), (a.double() @ b.double()).to(dtype), dtype)
    assert isotile.matmul(a, b, out_dtype=torch.float32).dtype == torch.float32


def test_grouped_matmul_is_a_product_for_each_group():
    a, b, ends = randn(9, 7), randn(4, 7, 3), [2, 2, 6, 8]
    want = torch.cat([a[0:2] @ b[0], a[2:6] @ b[2], a[6:8] @ b[3], torch.zeros(1, 3, dtype=a.dtype)])
    close(isotile.grouped_matmul(a, b, torch.tensor(ends, dtype=torch.int32)), want)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_norms_are_pytorchs_with_its_defaults(dtype):
    x, w, b, r = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate([(3, 4, 6), (4, 6), (4, 6), (3, 4, 6)]))
    x = x * 1e-3  # so that eps counts
    wide = [t.double() for t in (x, w, b)]
    close(isotile.layer_norm(x, (4, 6)), F.layer_norm(wide[0], (4, 6)).to(dtype), dtype)
    close(isotile.layer_norm(x, (4, 6), w, b, 1e-3), F.layer_norm(wide[0], (4, 6), *wide[1:], 1e-3).to(dtype), dtype)
    close(isotile.layer_norm(x, 6), F.layer_norm(wide[0], (6,)).to(dtype), dtype)
    close(isotile.rms_norm(x, (4, 6), w), F.rms_norm(x, (4, 6), w), dtype)  # eps: what PyTorch takes by default
    want = F.rms_norm(wide[0], (4, 6), wide[1] + 1, 1e-6).to(dtype)
    close(isotile.rms_norm(x, (4, 6), w, 1e-6, weight_offset=1.0), want, dtype)
    for norm in (isotile.layer_norm, isotile.rms_norm):
        y, total = norm(x, 6, residual=r)
        assert torch.equal(total, x + r)
        assert torch.equal(y, norm(x + r, 6))


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
def test_softmax_is_pytorchs(dtype):
    x = randn(3, 4, 5, dtype=dtype) * 5
    for dim in (-1, 0, 1, -3):
        close(isotile.softmax(x, dim), F.softmax(x.double(), dim).to(dtype), dtype)
    assert torch.equal(isotile.softmax(x), isotile.softmax(x, -1))
    close(isotile.softmax(x, 1, dtype=torch.float64 if dtype == torch.float64 else torch.float32).double(),
          F.softmax(x.double(), 1), torch.float64 if dtype == torch.float64 else torch.float32)  # fmt: skip


MASKS = {
    "none": {},
    "causal": {"is_causal": True},
    "boolean": {"attn_mask": torch.ones(5, 6, dtype=torch.bool).tril(1)},
    "additive": {"attn_mask": randn(2, 1, 5, 6, seed=9)},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("options", MASKS.values(), ids=list(MASKS))
def test_attention_is_scaled_dot_product_attention(options):
    q, k, v = randn(2, 4, 5, 8), randn(2, 4, 6, 8), randn(2, 4, 6, 3)
    close(isotile.attention(q, k, v, **options), F.scaled_dot_product_attention(q, k, v, **options), ulps=64)
    k, v = k[:, :2], v[:, :2]
    want = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    close(isotile.attention(q, k, v, enable_gqa=True, **options), want, ulps=64)


def pair_by_pair(q, k, v, *, is_causal=False, bottom_right=False, window=(None, None), softcap=None, sinks=None,
                 slopes=None, lengths=None, mask=None):  # fmt: skip
    """Attention as the contract states it, one score at a time: (out, lse)."""
    batch, heads, queries, d = q.shape
    out = torch.zeros(batch, heads, queries, v.shape[-1], dtype=q.dtype)
    lse = torch.zeros(batch, heads, queries, dtype=q.dtype)
    for b in range(batch):
        keys = k.shape[-2] if lengths is None else lengths[b]
        for h in range(heads):
            g = h // (heads // k.shape[1])
            for i in range(queries):
                at = i + (keys - queries if bottom_right else 0)
                scores, values = [], []
                for j in range(keys):
                    if is_causal and j > at:
                        continue
                    if window[0] is not None and j < at - window[0]:
                        continue
                    if window[1] is not None and j > at + window[1]:
                        continue
                    score = float(q[b, h, i] @ k[b, g, j]) / math.sqrt(d)
                    score = softcap * math.tanh(score / softcap) if softcap else score
                    score -= slopes[h] * abs(at - j) if slopes is not None else 0.0
                    score += float(mask[i, j]) if mask is not None else 0.0
                    scores.append(score)
                    values.append(v[b, g, j])
                total = sum(math.exp(s) for s in scores) + (math.exp(sinks[h]) if sinks is not None else 0.0)
                lse[b, h, i] = math.log(total) if total else -math.inf
                for s, value in zip(scores, values, strict=True):
                    out[b, h, i] += math.exp(s) / total * value
    return out, lse


OPTIONS = {
    "plain": {},
    "bottom_right": {"is_causal": True, "bottom_right": True},
    "causal_with_more_queries": {"is_causal": True, "bottom_right": True, "keys": 3},
    "window": {"window": (2, 1)},
    "left_window_bottom_right": {"window": (1, None), "bottom_right": True},
    "softcap": {"softcap": 0.7},
    "sinks": {"sinks": [0.3, -2.0, 1.5, 0.0]},
    "alibi": {"slopes": [0.5, 0.25, 0.0, 1.0]},
    "alibi_bottom_right": {"slopes": [0.5, 0.25, 0.0, 1.0], "bottom_right": True},
    "lengths": {"lengths": [4, 0]},
    "lengths_bottom_right": {"lengths": [4, 6], "bottom_right": True, "is_causal": True},
    "everything": {
        "is_causal": True, "bottom_right": True, "window": (3, None), "softcap": 1.1, "sinks": [0.3, -2.0, 1.5, 0.0],
        "slopes": [0.5, 0.25, 0.0, 1.0], "lengths": [4, 6], "mask": randn(5, 6, seed=4),
    },
}  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
def test_attentions_options_are_what_the_contract_says(options):
    options = dict(options)
    keys = options.pop("keys", 6)
    q, k, v = randn(2, 4, 5, 8), randn(2, 2, keys, 8), randn(2, 2, keys, 3)
    want, want_lse = pair_by_pair(q, k, v, **options)

    def tensor(name, dtype=torch.float64):
        return None if name not in options else torch.tensor(options[name], dtype=dtype)

    out, lse = isotile.attention(
        q, k, v, options.get("mask"), is_causal=options.get("is_causal", False), enable_gqa=True,
        causal_alignment="bottom_right" if options.get("bottom_right") else "top_left", window=options.get("window"),
        softcap=options.get("softcap"), sinks=tensor("sinks"), alibi_slopes=tensor("slopes"),
        seqlens_k=tensor("lengths", torch.int32), return_lse=True,
    )  # fmt: skip
    close(out, want, ulps=64)
    close(lse, want_lse, ulps=64)


def test_philox_gives_the_published_words():
    """Random123's known answer for philox4x32-10 with counter and key 0."""
    zero = torch.zeros((), dtype=torch.int64)
    assert int(_philox.first_word(zero, zero, zero, zero)) == 0x6627E8D5


def test_attentions_loop_dimensions_broadcast_between_all_its_tensors():
    """Only value, or only seqlens_k, has the batch: scores, lse and the dropout mask have it too."""
    q, k, v = randn(4, 5, 8), randn(4, 6, 8), randn(3, 4, 6, 2)
    lengths = torch.tensor([[6, 2, 0]], dtype=torch.int32)
    whole = [t.expand(1, 3, *t.shape[-3:]) for t in (q, k, v)]
    for p in (0.0, 0.4):
        torch.manual_seed(0)
        want = isotile.attention(*whole, seqlens_k=lengths, return_lse=True, dropout_p=p)
        torch.manual_seed(0)
        got = isotile.attention(q, k, v, seqlens_k=lengths, return_lse=True, dropout_p=p)
        for g, w in zip(got, want, strict=True):
            assert torch.equal(g, w)
