"""The Triton kernels in the same property tests as every backend, in Triton's interpreter or on a GPU.

The interpreter takes milliseconds for each step of a kernel's inner loop, so fewer and smaller examples are drawn here.
Triton decides at import whether it interprets: run this file with TRITON_INTERPRET=1, as tests/run.py does.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

import isotile
from isotile import registry
from isotile.__main__ import kernel_of
from isotile.testing import check_recipe, recipes

sys.path.insert(0, str(Path(__file__).parent))
import _whole_numbers

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


@pytest.mark.parametrize(
    "dtype", (torch.float32, torch.bfloat16, torch.float16), ids=lambda d: str(d).removeprefix("torch.")
)
def test_grouped_integers_are_exact_where_float32_is(dtype):
    @hypothesis.settings(max_examples=20 if DEVICE == "cpu" else 100)
    @hypothesis.given(_whole_numbers.calls(dtype))
    def agrees(call):
        x, q, want = call
        with isotile.use_backend("triton"):
            assert torch.equal(isotile.quantized_linear(x.to(DEVICE), q.to(DEVICE)).cpu(), want)

    agrees()


class EveryOperator(torch.nn.Module):
    """One layer that goes through each public operator once."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)

        def parameter(*shape):
            return torch.nn.Parameter(torch.randn(shape, generator=generator) / 8)

        self.gain, self.bias, self.weight, self.second = (
            parameter(32),
            parameter(32),
            parameter(96, 32),
            parameter(32, 32),
        )
        self.experts = parameter(2, 32, 32)
        self.quantized = isotile.quantize(torch.randn(32, 32, generator=generator) / 8, "int8")

    def forward(self, x):
        y, x = isotile.layer_norm(x, 32, self.gain, self.bias, residual=x)
        heads = isotile.linear(y, self.weight).unflatten(-1, (6, 16)).transpose(0, 1)
        x = x + isotile.attention(*heads.split(2), is_causal=True).transpose(0, 1).flatten(-2)
        y = isotile.matmul(
            isotile.rms_norm(x, 32, self.gain), self.second, bias=self.bias, activation="gelu", residual=x
        )
        y = isotile.quantized_linear(y, self.quantized)
        ends = torch.tensor([9, 20], dtype=torch.int32, device=x.device)
        return isotile.softmax(isotile.grouped_matmul(y, self.experts, ends), -1)


def test_a_module_of_every_operator_compiles_without_a_graph_break():
    module = EveryOperator().to(DEVICE)
    x = torch.randn(20, 32, device=DEVICE)
    public = {name for name, spec in registry.specs().items() if not spec.internal}
    assert public <= set(EveryOperator.forward.__code__.co_names), "an operator that this module leaves out"
    backend = "aot_eager" if DEVICE == "cpu" else "inductor"
    with isotile.use_backend("triton"):
        compiled = torch.compile(module, fullgraph=True, backend=backend)
        results = []
        for run in (module, compiled):
            module.zero_grad()
            y = run(x)
            (y * y).sum().backward()
            results.append([y.detach(), *(p.grad.clone() for p in module.parameters())])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager)
