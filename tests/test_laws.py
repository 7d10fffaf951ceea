"""Laws beyond agreement: repeatable bits, independence of layout, threads and batch, of what is hidden; gradients.

The laws are those of `isotile.testing.laws`, which `isotile verify` checks too.
"""

from __future__ import annotations

import hypothesis
import pytest
import torch

import isotile
from isotile import registry
from isotile.spec import FLOATS
from isotile.testing import recipes
from isotile.testing.check import bits
from isotile.testing.laws import LAWS, Inapplicable, Subject

#: Gradients have tests of their own (test_grad.py), and agreement in every layout too (test_ops.py).
EXAMPLES = {"layout": 4, "deterministic": 8, "thread_invariant": 8, "batch_invariant": 20, "hidden_keys": 30,
            "dropout_mask": 3, "gradients": 4}  # fmt: skip


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize(
    ("op", "law"), [(op, law) for law in EXAMPLES for op, spec in registry.specs().items() if LAWS[law].applies(spec)]
)
def test_the_law_holds(op, law, dtype):
    @hypothesis.settings(max_examples=EXAMPLES[law])
    @hypothesis.given(recipes(registry.spec(op), dtype))
    def holds(recipe):
        try:
            LAWS[law].check(Subject(recipe, "cpu"))
        except Inapplicable:
            hypothesis.event("inapplicable")

    holds()


BATCHED = {
    "layer_norm": lambda x, w: isotile.layer_norm(x, x.shape[-1], w[: x.shape[-1], 0]),
    "rms_norm": lambda x, w: isotile.rms_norm(x, x.shape[-1], w[: x.shape[-1], 0]),
    "softmax": lambda x, w: isotile.softmax(x, -1),
    "softmax_of_columns": lambda x, w: isotile.softmax(x.mT.contiguous(), 0).mT,
    "linear": lambda x, w: isotile.linear(x, w, activation="silu"),
    "matmul": lambda x, w: isotile.matmul(x, w.mT),
}


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("op", BATCHED)
@pytest.mark.parametrize("rows, n, k", ((1, 5, 7), (3, 65, 129), (17, 33, 300), (70, 130, 700), (200, 64, 1030)))
def test_a_row_of_a_batch_has_the_bits_of_that_row_alone(op, dtype, rows, n, k):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, k, generator=generator, dtype=torch.float64).to(dtype)
    w = torch.randn(max(n, k) if op in ("layer_norm", "rms_norm") else n, k, generator=generator).to(dtype)
    with isotile.use_backend("cpu"), isotile.determinism(batch_invariant=True):
        whole = BATCHED[op](x, w)
        for i in (0, rows // 2, rows - 1):
            assert torch.equal(bits(whole[i : i + 1]), bits(BATCHED[op](x[i : i + 1], w))), f"row {i}"


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("queries", (1, 3, 70))
def test_an_attention_batch_entry_has_the_bits_of_that_entry_alone(dtype, queries):
    generator = torch.Generator().manual_seed(queries)
    q, k, v = (torch.randn(3, 4, n, 40, generator=generator).to(dtype) for n in (queries, 150, 150))
    with isotile.use_backend("cpu"), isotile.determinism(batch_invariant=True):
        whole = isotile.attention(q, k, v)
        for i in range(3):
            assert torch.equal(
                bits(whole[i : i + 1]), bits(isotile.attention(q[i : i + 1], k[i : i + 1], v[i : i + 1]))
            )


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("start", range(0, 40, 3))
def test_a_decoding_window_reads_nothing_before_its_start(dtype, start):
    """Keys and values before a window's first key, which share a vector with it, may hold NaN: 0 * NaN is NaN."""
    q, k, v = (torch.randn(2, h, n, 24).to(dtype) for h, n in ((8, 1), (2, 64), (2, 64)))
    hidden = (torch.arange(64) < start) | (torch.arange(64) > start + 3)
    lengths = torch.full((2,), start + 4, dtype=torch.int32)

    def run(key, value):
        return isotile.attention(q, key, value, enable_gqa=True, causal_alignment="bottom_right", window=(3, 0),
                                 seqlens_k=lengths)  # fmt: skip

    poisoned = [t.masked_fill(hidden[:, None], float("nan")) for t in (k, v)]
    with isotile.use_backend("cpu"):
        assert torch.equal(run(*poisoned), run(k, v))


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_dropout_drops_what_the_seed_says_on_every_backend(backend):
    q, k, v = (torch.randn(2, 3, 20, 8) for _ in range(3))
    torch.manual_seed(3)
    with isotile.use_backend("reference"):
        want = isotile.attention(q, k, v, dropout_p=0.4)
    torch.manual_seed(3)
    with isotile.use_backend(backend):
        got = isotile.attention(q, k, v, dropout_p=0.4)
        again = isotile.attention(q, k, v, dropout_p=0.4)
    torch.testing.assert_close(got, want)
    assert not torch.equal(got, again)


def test_batch_invariance_is_refused_where_it_is_not_promised():
    x = torch.randn(3, 8)
    invariant = isotile.determinism(batch_invariant=True)
    with isotile.use_backend("reference"), invariant, pytest.raises(isotile.BackendError, match="batch invariance"):
        isotile.softmax(x)
