"""Laws beyond agreement: repeatable bits, independence of threads and of the batch, and of what is hidden."""

from __future__ import annotations

import hypothesis
import pytest
import torch

import isotile
from isotile import library, registry
from isotile.spec import FLOATS
from isotile.testing import build, recipes

LAWFUL = {law: [n for n, s in registry.specs().items() if law in s.laws] for law in
          ("deterministic", "row_independent", "hidden_keys_do_not_matter")}  # fmt: skip


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


def run(call, backend="cpu"):
    operator = library.operator(call.spec.name)
    values = tuple(call.values[p] for p in operator.parameters)
    with isotile.use_backend(backend), isotile.determinism(batch_invariant=True), torch.no_grad():
        return operator.execute(call.overload, values)


def bits(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor.reshape(1).view(torch.uint8)


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("op", LAWFUL["deterministic"])
def test_the_same_bits_again_and_on_any_number_of_threads(op, dtype):
    @hypothesis.settings(max_examples=15)
    @hypothesis.given(recipes(registry.spec(op), dtype, kinds=("normal", "mixed")))
    def holds(recipe):
        call = build(recipe)
        first = run(call)
        again = run(call)
        torch.set_num_threads(2)
        try:
            parallel = run(call)
        finally:
            torch.set_num_threads(1)
        for a, b, c in zip(first, again, parallel, strict=True):
            assert torch.equal(bits(a), bits(b))
            assert torch.equal(bits(a), bits(c))

    holds()


BATCHED = {
    "layer_norm": lambda x, w: isotile.layer_norm(x, x.shape[-1], w[: x.shape[-1], 0]),
    "rms_norm": lambda x, w: isotile.rms_norm(x, x.shape[-1], w[: x.shape[-1], 0]),
    "softmax": lambda x, w: isotile.softmax(x, -1),
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
def test_what_is_hidden_does_not_matter(dtype):
    spec = registry.spec("attention")

    @hypothesis.settings(max_examples=30)
    @hypothesis.given(recipes(spec, dtype, kinds=("normal",)))
    def holds(recipe):
        from types import SimpleNamespace

        from isotile.ops.attention import visibility

        for tensor in ("key", "value"):
            recipe["tensors"][tensor]["layout"] = "contiguous"
        call = build(recipe)
        before = run(call)
        visible, _ = visibility(SimpleNamespace(**call.values))
        query, key = call.values["query"], call.values["key"]
        if (
            key.numel() == 0
            or query.numel() == 0
            or len(key.shape) != len(query.shape)
            or key.shape[:-3] != query.shape[:-3]
        ):
            return
        full = visible.expand(*query.shape[:-1], key.shape[-2])
        groups = query.shape[-3] // key.shape[-3]
        seen = full.reshape(*full.shape[:-3], key.shape[-3], groups, *full.shape[-2:]).any(-3).any(-2)
        for name in ("key", "value"):
            poisoned = call.values[name].clone()
            if poisoned.shape[:-1] != seen.shape:
                return
            poisoned[~seen] = float("nan")
            call.values[name] = poisoned
        after = run(call)
        for a, b in zip(before, after, strict=True):
            assert torch.equal(bits(a), bits(b))

    holds()


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
