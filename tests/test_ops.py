"""Every operator on every backend, on drawn inputs, against the float64 truth within the derived bound.

What a long run (`make deep`) finds joins `once_failed.jsonl`.
"""

from __future__ import annotations

import json
import pathlib

import hypothesis
import pytest
import torch

from isotile import registry
from isotile.backends import BACKENDS
from isotile.backends.cpu import CpuBackend, extension
from isotile.spec import FLOATS
from isotile.testing import check_recipe, recipes

module, _ = extension()
LOWER = [name for name, runs in module.instruction_sets() if runs][:-1]
for isa in LOWER:
    BACKENDS.setdefault(f"cpu[{isa}]", CpuBackend(isa))
UNDER_TEST = ["cpu", "reference", *[f"cpu[{isa}]" for isa in LOWER]]

FOUND = [json.loads(line) for line in pathlib.Path(__file__).with_name("once_failed.jsonl").read_text().splitlines()]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.mark.parametrize("dtype", FLOATS, ids=name_of)
@pytest.mark.parametrize("backend", UNDER_TEST)
@pytest.mark.parametrize("op", registry.specs())
def test_agrees_with_the_float64_truth(op, backend, dtype):
    @hypothesis.given(recipes(registry.spec(op), dtype))
    def agrees(recipe):
        check_recipe(recipe, backend)

    agrees()


@pytest.mark.parametrize("recipe", FOUND, ids=[recipe["op"] for recipe in FOUND])
@pytest.mark.parametrize("backend", UNDER_TEST)
def test_what_a_long_run_once_found(backend, recipe):
    check_recipe(recipe, backend)
