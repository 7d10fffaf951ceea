"""Drawn inputs are the same bits on every machine: what two reports of `isotile verify` are compared on."""

from __future__ import annotations

import hashlib
import json

import pytest
import torch

from isotile import registry
from isotile.spec import FLOATS
from isotile.testing import build, draw_recipe
from isotile.testing.draws import Random, Seeded
from isotile.testing.recipes import KINDS, dtype_name


def digest(tensors):
    found = hashlib.sha256()
    for t in tensors:
        found.update(t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if t.numel() else b"")
    return found.hexdigest()[:16]


def test_the_stream_is_pinned():
    """PCG64 seeded with 0: a change here makes reports of other versions incomparable."""
    random = Random(0)
    assert random.integers(0, 1000, (6,)).tolist() == PINNED["integers"]
    assert random.uniform((3,)).tolist() == PINNED["uniform"]
    assert digest([random.normal((1000,)), random.powers(-9, 9, (5,))]) == PINNED["normal"]
    assert random.permutation(6) == PINNED["permutation"]


PINNED = {
    "integers": [271, 617, 24, 533, 971, 894],
    "uniform": [0.6066357757671799, 0.7294965609839984, 0.5436249914654229],
    "normal": "b814393d99c45841",
    "permutation": [0, 2, 1, 4, 5, 3],
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_values_of_every_kind_are_pinned(kind):
    spec = registry.spec("matmul")
    found = []
    for dtype in FLOATS:
        recipe = draw_recipe(Seeded(7), spec, dtype, wanted={"kind": kind})
        recipe["sizes"] = {"m": 5, "k": 33, "n": 7}
        recipe["absent"] = []
        found.append(digest(v for v in build(recipe).values.values() if isinstance(v, torch.Tensor)))
    assert found == PINNED_VALUES[kind]


PINNED_VALUES = {
    "normal": ["6dbeb5444e4ca38b", "47c9ebd5fa18b967", "1bab465c409e81b6", "e2620005ffdb0c2e"],
    "large": ["b0724ce658b8ddda", "9b0d3c11472fd428", "24197123dd8cff2e", "456c4e858c9703c4"],
    "tiny": ["787c583d28306a66", "1b6a28a7c455544f", "b306f32b202d2377", "98e089b7cca2ad4d"],
    "mixed": ["4e56ea1454b35f8e", "4c39b4463bc2e1f8", "473043ebee6d0fb8", "44de308e50b1cce1"],
    "integers": ["e6331de4dadd5a13", "972c29c6ccc20afe", "1bc969f0ee809c41", "212a64a65eb95183"],
    "specials": ["ec97a2b6df26016c", "0ae9429f3721b7ed", "825f01c56946fe8f", "228868027de0f2fb"],
}


def test_a_million_normals_look_normal():
    x = Random(3).normal((1_000_000,))
    assert abs(float(x.mean())) < 0.004
    assert abs(float(x.var()) - 1) < 0.006
    inside = [float((x.abs() < s).double().mean()) for s in (1, 2, 3)]
    assert inside == pytest.approx([0.6827, 0.9545, 0.9973], abs=0.005)
    assert len(x.unique()) == len(x)  # all bits of a float64 are in use, not 16 of them
    assert x.float().unique().numel() > 950_000


def test_chunks_do_not_show(monkeypatch):
    from isotile.testing import draws

    whole = Random(1).normal((1000,))
    assert torch.equal(whole[:400].reshape(20, 20), Random(1).normal((1000,))[:400].reshape(20, 20))
    monkeypatch.setattr(draws, "CHUNK", 300)
    assert Random(1).normal((1000,)).shape == whole.shape


def test_integers_cover_their_range():
    drawn = Random(2).integers(-3, 4, (10_000,))
    assert sorted(drawn.unique().tolist()) == [-3, -2, -1, 0, 1, 2, 3]
    wide = Random(2).integers(-(2**63), 2**63 - 1, (1000,))
    assert (wide < 0).any()
    assert (wide > 0).any()


@pytest.mark.parametrize("op", registry.specs())
def test_what_is_wanted_is_drawn_and_the_rest_is_the_seeds(op):
    spec = registry.spec(op)
    recipe = draw_recipe(Seeded(1, 2), spec, torch.float32, wanted={"kind": "normal"})
    assert recipe["kind"] == "normal"
    again = draw_recipe(Seeded(1, 2), spec, torch.float32, wanted={"kind": "normal"})
    assert json.dumps(again) == json.dumps(recipe)
    assert dtype_name(torch.float32) == recipe["dtype"]
    for name, scalar in spec.scalars.items():
        if scalar.choices and not name.startswith("need") and spec.complete is None:
            for value in scalar.choices:
                got = draw_recipe(Seeded(1, 2), spec, torch.float32, wanted={name: value})["scalars"][name]
                assert got == (dtype_name(value) if isinstance(value, torch.dtype) else value)
