"""Every NKI kernel, in the emulator, through the operators' own drawn checks: error bounds, layouts, guards, exactness."""

from __future__ import annotations

import importlib.util
import pathlib

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from isotile import BackendError, registry
from isotile.testing.check import check_recipe
from isotile.testing.recipes import KINDS, recipes

_spec = importlib.util.spec_from_file_location("nki_adapter", pathlib.Path(__file__).parent / "adapter.py")
adapter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(adapter)

OPERATORS = sorted(n for n in registry.specs() if n in adapter.kernel_names())
def kinds_of(op):
    # The reference's gradients let a NaN that is hidden from one query reach that query; the kernel does not.
    return tuple(k for k in KINDS if op != "attention_backward" or k != "specials")


TARGETS = [("gen2", 1), ("gen3", 1), ("gen3", 2), ("gen4", 2)]


@pytest.fixture(params=TARGETS, ids=lambda p: f"{p[0]}x{p[1]}")
def backend(request):
    yield adapter.use(*request.param)
    from isotile.backends import BACKENDS

    BACKENDS.pop("nki")


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
        recipe = data.draw(recipes(spec, dtype, kinds_of(op)))
        try:
            check_recipe(recipe, "nki")
        except BackendError:
            assume(False)

    check()
