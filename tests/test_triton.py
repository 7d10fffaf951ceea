"""The Triton kernels in the same property tests as every backend, in Triton's interpreter or on a GPU.

The interpreter takes milliseconds for each step of a kernel's inner loop, so fewer and smaller examples are drawn here.
Triton decides at import whether it interprets: run this file with TRITON_INTERPRET=1, as tests/run.py does.
"""

from __future__ import annotations

import os

import hypothesis
import pytest
import torch

import isotile
from isotile import registry
from isotile.__main__ import kernel_of
from isotile.testing import check_recipe, recipes

DEVICE = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
pytestmark = pytest.mark.skipif(
    DEVICE == "cuda" and not torch.cuda.is_available(),
    reason="no GPU, and Triton's interpreter needs TRITON_INTERPRET=1 when the process starts",
)


@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=lambda d: str(d).removeprefix("torch.")
)
@pytest.mark.parametrize(
    "op", [n for n, s in registry.specs().items() if kernel_of(s) in registry.kernel_names("triton")]
)
def test_agrees_with_the_float64_truth(op, dtype):
    served = 0

    @hypothesis.settings(max_examples=20 if DEVICE == "cpu" else 100)
    @hypothesis.given(recipes(registry.spec(op), dtype))
    def agrees(recipe):
        nonlocal served
        try:
            check_recipe(recipe, "triton", DEVICE)
        except isotile.BackendError as refusal:
            assert "float64" in str(refusal) or "dimensions" in str(refusal) or "loop" in str(refusal)
            return
        served += 1

    agrees()
    assert served >= 10
