"""quantized_linear in the emulator: sizes that drawn examples do not reach, and rows quantised to the same bits."""

from __future__ import annotations

import importlib
import importlib.util
import pathlib

import ml_dtypes
import numpy as np
import pytest
import torch

import isotile
from isotile import dispatch, library, nki_emulator
from isotile.nki_emulator import cost
from isotile.ops import _quantized
from isotile.state import use_backend
from isotile.testing.compare import bounds, compare

_spec = importlib.util.spec_from_file_location("nki_adapter", pathlib.Path(__file__).parent / "adapter.py")
adapter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(adapter)

FORMATS = (
    ("int8", -1, None),
    ("int8_dynamic", -1, None),
    ("int4", 128, None),
    ("int4", 64, "integer"),
    ("int4", 32, "float"),
    ("int4_dynamic", 32, "integer"),
    ("int4_dynamic", 128, "float"),
    ("fp8", -1, None),
    ("mxfp4", 32, None),
    ("nvfp4", 16, None),
)


@pytest.fixture(params=[("gen2", 1), ("gen3", 2)], ids=lambda p: f"{p[0]}x{p[1]}")
def backend(request):
    adapter.use(*request.param)
    yield
    adapter.restore()


def weight(scheme, group_size, zeros, n, k):
    made = isotile.quantize(torch.randn(n, k), scheme, group_size=None if group_size == -1 else group_size)
    if zeros == "integer":
        made.zeros = torch.randint(0, 16, made.scales.shape).to(torch.uint8)
    elif zeros == "float":
        made.zeros = torch.randn(made.scales.shape)
    return made


@pytest.mark.parametrize("scheme,group_size,zeros", FORMATS)
def test_large_and_uneven_sizes_are_within_the_bound(backend, scheme, group_size, zeros):
    torch.manual_seed(0)
    m, n, k = 140, 530, 2200
    x = torch.randn(m, k).to(torch.float16 if scheme == "int8" else torch.bfloat16)
    made = weight(scheme, group_size, zeros, n, k)
    operator = library.operator("quantized_linear")
    parts = (made.packed, made.scales, made.zeros, made.global_scale)
    arguments = (x, *parts, torch.randn(n), scheme, group_size, "relu", torch.randn(1, n), None)
    ordered = operator.bind(arguments, {})
    values = dict(zip(operator.parameters, ordered, strict=True))
    dims = dispatch.bind_call(operator.spec, values)
    place, *_ = (o for o in dispatch.out_specs(operator.spec, "default", values, dims) if o is not None)
    out = torch.full(place.shape, float("nan"), dtype=place.dtype)
    with use_backend("nki"), torch.no_grad():
        operator.execute("default", ordered, [out])
    compare("y", out, bounds(operator.spec, "default", values)["y"])


@pytest.mark.parametrize("scheme", ("int8_dynamic", "fp8"))
def test_rows_are_quantised_to_the_same_bits(backend, scheme):
    """The weight is the unit matrix: what comes out is q times the row's scale, which must agree in every bit."""
    torch.manual_seed(0)
    k = 96
    x = torch.randn(300, k) * 10.0 ** torch.randint(-38, 38, (300, 1))
    x[0], x[1, 3], x[2, 4], x[3, 0] = 0.0, float("nan"), float("inf"), 1e-45
    x[4] = torch.arange(k) / 2 - 24.0  # ties
    x[4, 0] = 127.0 if scheme == "int8_dynamic" else 448.0
    one = torch.eye(k).to(torch.float8_e4m3fn if scheme == "fp8" else torch.int8).view(torch.uint8)
    made = isotile.QuantizedWeight(one, torch.ones(k, 1), scheme=scheme, group_size=-1, shape=(k, k))
    q, scale = _quantized.quantize_rows(x, scheme)
    with use_backend("nki"):
        y = isotile.quantized_linear(x, made)
    assert torch.equal(y.nan_to_num(7e37), (q * scale).nan_to_num(7e37))


def test_integer_sums_are_exact_beyond_24_bits(backend):
    """The largest codes in every place: 127 * 127 * 4099 is no float32 sum of products in any order."""
    k = 4099
    codes = torch.full((3, k), 127, dtype=torch.int8)
    codes[1, ::2], codes[2, 7] = -126, 3
    made = isotile.QuantizedWeight(
        codes.view(torch.uint8), torch.ones(3, 1), scheme="int8_dynamic", group_size=-1, shape=(3, k)
    )
    x = torch.full((2, k), 127.0)
    x[1, 5] = 1.0
    with use_backend("nki"):
        y = isotile.quantized_linear(x, made)
    assert torch.equal(y, (x.double() @ codes.double().T).float())


@pytest.mark.parametrize("scheme,group_size,bar", (("int8", -1, 0.85), ("int4", 128, 0.80)))
def test_modelled_prefill_bar(scheme, group_size, bar):
    """Useful operations against the Tensor engine's 16-bit peak over all launches in turn; modelled, not measured."""
    size = 4096
    kernel = importlib.import_module("isotile.kernels.nki.quantized_linear")
    x = np.zeros((size, size), ml_dtypes.bfloat16)
    packed = np.zeros((size, _quantized.row_bytes(scheme, size)), np.uint8)
    scales = np.zeros((size, _quantized.group_count(group_size, size)), ml_dtypes.bfloat16)
    with nki_emulator.session("gen3", dry=True) as seen:
        index = tuple(_quantized.SCHEMES).index(scheme)
        kernel.run(x, packed, scales, scheme=index, group_size=group_size, activation=0, outs={"y": "bfloat16"})
    time_us = sum(cost.estimate(run[0].trace, run[0].generation).overlapped_us for run in seen.runs)
    assert 2 * size**3 / (cost.RATES[3].tensor_flops_per_us * time_us) >= bar
