"""Every operator on every backend, on drawn inputs, against the float64 truth within the derived bound."""

from __future__ import annotations

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
