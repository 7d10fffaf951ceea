"""Every NKI kernel, in the emulator, through the operators' own drawn checks: error bounds, layouts, guards,
exactness.
"""

from __future__ import annotations

import copy
import importlib.util
import pathlib

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import isotile
from isotile import BackendError, dispatch, library, registry
from isotile.state import use_backend
from isotile.testing.check import check_recipe
from isotile.testing.compare import bounds, compare
from isotile.testing.recipes import recipes

_spec = importlib.util.spec_from_file_location("nki_adapter", pathlib.Path(__file__).parent / "adapter.py")
adapter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(adapter)

OPERATORS = sorted(n for n in registry.specs() if n in adapter.kernel_names())


TARGETS = [("gen2", 1), ("gen3", 1), ("gen3", 2), ("gen4", 2)]


@pytest.fixture(params=TARGETS, ids=lambda p: f"{p[0]}x{p[1]}")
def backend(request):
    adapter.use(*request.param)
    yield
    adapter.restore()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("op", OPERATORS)
def test_agrees_with_the_float64_reference(backend, op, dtype):
    spec = registry.spec(op)

    @settings(
        max_examples=12,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.data())
    def check(data):
        recipe = data.draw(recipes(spec, dtype))
        try:
            check_recipe(recipe, "nki")
        except BackendError:
            assume(False)

    check()


# -- named cases: what the drawn sizes do not reach -----------------------------------------------------------------


def check(name, *args, **kwargs):
    """An operator on the NKI backend against its float64 truth, within the spec's own bound."""
    operator = library.operator(name)
    ordered = operator.bind(args, kwargs)
    overload = operator.overload_of(ordered)
    spec, values = operator.spec, dict(zip(operator.parameters, ordered, strict=True))
    dims = dispatch.bind_call(spec, values)
    places = [o for o in dispatch.out_specs(spec, overload, values, dims) if o is not None]
    outs = [torch.full(o.shape, float("nan"), dtype=o.dtype) for o in places]
    with use_backend("nki"), torch.no_grad():
        operator.execute(overload, ordered, outs)
    expected = bounds(spec, overload, values)
    for (result, bound), out in zip(expected.items(), outs, strict=True):
        compare(result, out, bound)


@pytest.fixture
def draw():
    generator = torch.Generator().manual_seed(7)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator).to(dtype)


def test_layer_norm_of_wide_rows(backend, draw):
    x = draw(130, 4608) * 0.01 + 3
    check("layer_norm", x, (4608,), draw(4608), draw(4608), 1e-3, residual=draw(130, 4608) * 0.01)
    check("layer_norm", x[:5, :1500], (1500,), None, None, 1e-3)


def test_rms_norm_of_wide_rows(backend, draw):
    check("rms_norm", draw(129, 4608) * 0.01, (4608,), draw(4608), 1e-3, weight_offset=1.0)


def test_norm_gradients_over_several_row_tiles(backend, draw):
    x, g = draw(300, 2500), draw(300, 2500)
    check("layer_norm_backward", g, x, (2500,), draw(2500), 1e-5, grad_sum=draw(300, 2500))
    check("rms_norm_backward", g, x, (2500,), draw(2500), 1e-5)


def test_norms_of_rows_wider_than_sbuf_keeps(backend, draw):
    x, other, g = (draw(131, 17000) for _ in range(3))
    w = draw(17000)
    check("layer_norm", x, (17000,), w, draw(17000), 1e-5, residual=other)
    check("rms_norm", x[:3], (17000,), None, 1e-5)
    check("layer_norm_backward", g, x, (17000,), w, 1e-5, grad_sum=other)
    check("rms_norm_backward", g[:5, :8200], x[:5, :8200], (8200,), w[:8200], 1e-5, weight_offset=1.0)


def test_softmax_of_rows_wider_than_sbuf_keeps(backend, draw):
    check("softmax", draw(3, 9000) * 40, -1)
    check("softmax", draw(130, 5000) * 40, -1)
    check("softmax_backward", draw(3, 9000), torch.softmax(draw(3, 9000), -1), -1)


@pytest.mark.parametrize("activation", [None, "relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh"])
def test_matmul_epilogue(backend, draw, activation):
    x, w = draw(2, 140, 300), draw(300, 530)
    check("matmul", x, w, bias=draw(530), activation=activation, residual=draw(2, 140, 530))
    if activation is not None:
        check("matmul_epilogue_backward", draw(140, 530), draw(140, 530), activation)


def test_matmul_layouts_and_streaming(backend, draw):
    a, b = draw(600, 260, dtype=torch.bfloat16), draw(260, 1100, dtype=torch.bfloat16)
    check("matmul", a.T.contiguous().T, b)
    check("matmul", a, b.T.contiguous().T)
    long_a, long_b = draw(5, 17000), draw(17000, 40)
    check("matmul", long_a, long_b)
    check("linear", draw(7, 300), draw(200, 300), draw(200), activation="silu")


def test_grouped_matmul_with_empty_and_cut_groups(backend, draw):
    ends = torch.tensor([0, 130, 130, 290], dtype=torch.int32)
    check("grouped_matmul", draw(300, 200), draw(4, 200, 260), ends)
    check("grouped_matmul_backward", draw(300, 260), draw(300, 200), draw(4, 200, 260), ends)


def test_grouped_matmul_of_a_contraction_wider_than_sbuf_keeps(backend, draw):
    ends = torch.tensor([3, 7], dtype=torch.int32)
    a, b = draw(9, 16600), draw(2, 16600, 40)
    check("grouped_matmul", a, b, ends)
    check("grouped_matmul_backward", draw(9, 40), a, b, ends)
    check("grouped_matmul_backward", draw(3, 16400), draw(3, 5), draw(1, 5, 16400), ends[:1])


def test_attention_over_several_sections(backend, draw):
    q, k, v = draw(1, 2, 140, 40), draw(1, 1, 2300, 40), draw(1, 1, 2300, 24)
    check("attention", q * 3, k, v, is_causal=True, causal_alignment="bottom_right")
    check("attention", q * 3, k, v, window_left=100, window_right=9, causal_alignment="bottom_right")


def test_attention_decode_packs_the_heads_of_a_group(backend, draw):
    q, k, v = draw(3, 8, 1, 64), draw(3, 2, 700, 64), draw(3, 2, 700, 64)
    lengths = torch.tensor([700, 0, 129], dtype=torch.int32)
    for i, n in enumerate(lengths.tolist()):
        k[i, :, n:] = float("nan")
        v[i, :, n:] = float("inf")
    check("attention", q, k, v, seqlens_k=lengths)
    check(
        "attention", q, k, v, seqlens_k=lengths, sinks=draw(8), alibi_slopes=draw(8).abs(), is_causal=True,
        causal_alignment="bottom_right",
    )  # fmt: skip


def test_attention_head_dim_above_128(backend, draw):
    check("attention", draw(1, 2, 33, 160), draw(1, 2, 65, 160), draw(1, 2, 65, 192), softcap=4.0)


def test_attention_hidden_values_never_leak(backend, draw):
    q, k, v = draw(1, 1, 130, 16), draw(1, 1, 130, 16), draw(1, 1, 130, 16)
    k[0, 0, 128] = float("nan")
    v[0, 0, 100] = float("inf")
    v[0, 0, 129, 3] = float("nan")
    check("attention", q, k, v, is_causal=True)


def test_attention_gradients(backend, draw):
    q, k, v = draw(2, 4, 150, 32), draw(2, 2, 600, 32), draw(2, 2, 600, 16)
    options = {
        "is_causal": True, "causal_alignment": "bottom_right", "window_left": 300, "softcap": 6.0, "sinks": draw(4),
        "alibi_slopes": draw(4).abs() / 50, "attn_mask": draw(2, 4, 150, 600),
        "seqlens_k": torch.tensor([600, 410], dtype=torch.int32),
    }  # fmt: skip
    with use_backend("reference"), torch.no_grad():
        out, lse = library.call("attention", q, k, v, **options)
    check(
        "attention_backward", draw(*out.shape), draw(*lse.shape), q, k, v, out, lse, **options, need_mask=True,
        need_sinks=True,
    )  # fmt: skip


def test_attention_dropout_draws_the_mask_of_every_backend(backend, draw):
    seed = torch.tensor([-(2**40) - 12345])
    q, k, v = draw(2, 2, 20, 16), draw(2, 1, 530, 16), draw(2, 1, 530, 16)
    options = {"is_causal": True, "causal_alignment": "bottom_right", "dropout_p": 0.3, "dropout_seed": seed}
    check("attention", q, k, v, **options)
    check("attention", draw(2, 4, 1, 16), k, v, dropout_p=0.4, dropout_seed=seed)  # decoding packs the heads
    with use_backend("reference"), torch.no_grad():
        out, lse = library.call("attention", q, k, v, **options)
    check("attention_backward", draw(*out.shape), None, q, k, v, out, lse, **options)


def test_attention_gradients_in_key_sections_and_split_over_cores(backend, draw, monkeypatch):
    module = registry.kernel_module("nki", "attention_backward")
    monkeypatch.setattr(module, "SBUF_BYTES", 8192)  # sections of 512 keys
    q, k, v = draw(1, 2, 150, 16), draw(1, 1, 1300, 16), draw(1, 1, 1300, 8)
    options = {"is_causal": True, "causal_alignment": "bottom_right", "sinks": draw(2)}
    with use_backend("reference"), torch.no_grad():
        out, lse = library.call("attention", q, k, v, **options)
    check("attention_backward", draw(*out.shape), draw(*lse.shape), q, k, v, out, lse, **options, need_sinks=True)


class _Block(torch.nn.Module):
    """One transformer block over isotile's public functions."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.norm = torch.nn.Parameter(torch.ones(width))
        self.qkv = torch.nn.Parameter(torch.randn(3 * width, width) / width**0.5)
        self.up = torch.nn.Parameter(torch.randn(2 * width, width) / width**0.5)
        self.down = torch.nn.Parameter(torch.randn(width, 2 * width) / width**0.5)

    def forward(self, x):
        batch, tokens, width = x.shape
        h = isotile.rms_norm(x, (width,), self.norm, 1e-6)
        q, k, v = isotile.linear(h, self.qkv).reshape(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed = isotile.attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, tokens, width)
        x = x + mixed
        return isotile.linear(isotile.linear(x, self.up, activation="gelu_tanh"), self.down, residual=x)


def test_a_model_and_its_gradients_run_on_the_backend(backend):
    torch.manual_seed(3)
    model = _Block(64, 4)
    x = torch.randn(2, 40, 64)

    def gradients(name, module, data):
        module.zero_grad()
        data = data.clone().requires_grad_()
        with use_backend(name):
            loss = module(data).square().mean()
            loss.backward()
        return [loss.detach(), data.grad, *(p.grad.clone() for p in module.parameters())]

    got = gradients("nki", model, x)
    other = gradients("cpu", model, x)
    exact = gradients("reference", copy.deepcopy(model).double(), x.double())
    for a, b, truth in zip(got, other, exact, strict=True):
        # Float32 rounding through two dozen operations: both backends stand equally near the float64 truth.
        scale = truth.abs().max()
        assert (a - truth).abs().max() <= 1e-5 * scale
        assert (a - b).abs().max() <= 2e-5 * scale
