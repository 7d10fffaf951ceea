"""quantized_linear under configurations that no size of a property test would choose, for every scheme."""

import pytest
import torch
from _run import close, poisoned, run

from isotile.ops import _quantized

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
CONFIGS = ({"SPLIT_K": 2}, {"dense": True}, {"batch_invariant": True})
#: (scheme, group_size, zeros)
FORMATS = (
    ("int8", -1, None),
    ("int8", 32, None),
    ("int8_dynamic", -1, None),
    ("int8_dynamic", 64, None),
    ("int4", -1, None),
    ("int4", 32, "integer"),
    ("int4", 64, "float"),
    ("int4", 128, None),
    ("int4_dynamic", -1, "float"),
    ("int4_dynamic", 32, "float"),
    ("int4_dynamic", 64, "integer"),
    ("int4_dynamic", 128, None),
    ("fp8", -1, None),
    ("mxfp4", 32, None),
    ("nvfp4", 16, None),
)


def weight(scheme, group_size, zeros, n, k):
    packed = torch.randint(0, 256, (n, _quantized.row_bytes(scheme, k))).to(torch.uint8)
    if scheme == "fp8":
        packed = torch.where(packed & 127 == 127, packed - 1, packed)
    groups = _quantized.group_count(group_size, k)
    scales = (torch.rand(n, groups) * 0.2 - 0.05).bfloat16()
    if scheme in ("mxfp4", "nvfp4"):
        scales = torch.randint(100, 127, (n, groups)).to(torch.uint8)
    found = {"packed": packed, "scales": scales, "zeros": None, "global_scale": None}
    if zeros is not None:
        found["zeros"] = torch.randn(n, groups)
        if zeros == "integer":
            found["zeros"] = torch.randint(0, 16, (n, groups)).to(torch.uint8)
    if scheme == "nvfp4":
        found["global_scale"] = torch.tensor([1.7])
    return found


def product(x, parts, scheme, group_size):
    """(x @ weight.T in float64 as the scheme means it, the sum of magnitudes)."""
    given = (*parts.values(), scheme, group_size, x.shape[-1], torch.float64)
    dense, size = _quantized.dequantized(*given), _quantized.dequantized(*given, magnitude=True)
    rows = x.double()
    if _quantized.SCHEMES[scheme].dynamic is not None:
        q, scale = _quantized.quantize_rows(x, scheme)
        rows = q.double() * scale.double()
    return rows @ dense.mT, (rows.abs() @ size.mT).max()


def numbers(scheme, group_size):
    return {"scheme": tuple(_quantized.SCHEMES).index(scheme), "group_size": group_size}


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("scheme,group_size,zeros", FORMATS)
def test_every_format_under_every_configuration(scheme, group_size, zeros, config):
    dynamic = _quantized.SCHEMES[scheme].dynamic is not None
    dtype = FLOATS[(FORMATS.index((scheme, group_size, zeros)) + CONFIGS.index(config)) % 3]
    if dynamic and "dense" in config:
        config = {"e4m3": False}
    m, n, k = 18, 65, 200
    x, parts = torch.randn(m, k).to(dtype), weight(scheme, group_size, zeros, n, k)
    y = poisoned((m, n), dtype)
    run("quantized_linear", {"x": x, **parts}, {"y": y}, config=config, **numbers(scheme, group_size))
    want, size = product(x, parts, scheme, group_size)
    # weights rounded to x's dtype: each product is off by half a unit at most, of a sum of random signs
    rounded = 0 if dtype == torch.float32 or dynamic else 2.0**-8 if dtype == torch.bfloat16 else 2.0**-11
    close(y, want, dtype, scale=size * (1 + rounded * 2**23 / 16))


@pytest.mark.parametrize("scheme", ("int8_dynamic", "int4", "fp8"))
def test_epilogue_strides_and_leading_dimensions(scheme):
    n, k, group_size = 65, 130, 32 if scheme == "int4" else -1
    x = torch.randn(5, 2, 2 * k, 3).transpose(1, 3)[..., ::2, :].transpose(-1, -2)  # [5, 3, 2, k], no dense rows
    parts = weight(scheme, group_size, None, n, k)
    bias, residual = torch.randn(2 * n)[::2], torch.randn(3, 1, n).expand(5, 3, 2, n)
    for config in (None, {"SPLIT_K": 2}):
        y, z = poisoned((2, 3, 5, n)).transpose(0, 2), poisoned((5, 3, 2, 2 * n))[..., ::2]
        run(
            "quantized_linear", {"x": x, **parts, "bias": bias, "residual": residual}, {"y": y, "preactivation": z},
            config=config, activation=4, **numbers(scheme, group_size),
        )  # fmt: skip
        want, size = product(x, parts, scheme, group_size)
        want = want + bias.double()
        close(z, want, torch.float32, scale=size)
        close(y, torch.nn.functional.silu(want) + residual.double(), torch.float32, scale=2 * size)


@pytest.mark.parametrize("scheme,dtype", (("int8_dynamic", torch.int8), ("fp8", torch.uint8)))
def test_rows_are_quantised_to_the_same_bits(scheme, dtype):
    """The weight is the unit matrix: what comes out is q times the row's scale, which must agree in every bit."""
    k = 96
    x = torch.randn(40, k) * 10.0 ** torch.randint(-38, 38, (40, 1))
    x[0], x[1, 3], x[2, 4], x[3, 0] = 0.0, float("nan"), float("inf"), 1e-45
    x[4] = torch.arange(k) / 2 - 24.0  # ties
    x[4, 0] = 127.0 if scheme == "int8_dynamic" else 448.0
    one = torch.eye(k).to(torch.int8 if dtype == torch.int8 else torch.float8_e4m3fn).view(torch.uint8)
    parts = {"packed": one, "scales": torch.ones(k, 1), "zeros": None, "global_scale": None}
    q, scale = _quantized.quantize_rows(x, scheme)
    for config in (None, {"e4m3": False}):
        y = poisoned((40, k))
        run("quantized_linear", {"x": x, **parts}, {"y": y}, config=config, **numbers(scheme, -1))
        assert torch.equal(y.nan_to_num(7e37), (q * scale).nan_to_num(7e37))


def test_no_rows_and_no_columns():
    for m, n, k in ((0, 5, 8), (4, 0, 8), (4, 5, 0)):
        for scheme in ("int8", "int8_dynamic", "int4", "fp8"):
            parts = weight(scheme, -1, None, n, k)
            y = poisoned((m, n))
            inputs = {"x": torch.randn(m, k), **parts, "bias": torch.ones(n)}
            run("quantized_linear", inputs, {"y": y}, **numbers(scheme, -1))
            assert k > 0 or torch.equal(y, torch.ones(m, n))


@pytest.mark.parametrize("zeros", (None, "integer", "float"))
def test_float16_meets_no_scale_that_it_cannot_hold(zeros):
    x = torch.randn(70, 256).half()
    for scheme, group_size in (("int4", 32), ("int4", -1), ("mxfp4", 32)):
        if scheme == "mxfp4" and zeros is not None:
            continue
        parts = weight(scheme, group_size, zeros, 40, 256)
        if scheme == "mxfp4":
            parts["scales"] = torch.where(torch.rand(parts["scales"].shape) < 0.5, 90, 150).to(torch.uint8)
        else:
            parts["scales"] = parts["scales"] * torch.tensor([1e7, 1e-9]).bfloat16()[torch.randint(0, 2, (40, 1))]
        y = poisoned((70, 40))
        run("quantized_linear", {"x": x, **parts}, {"y": y}, **numbers(scheme, group_size))
        want, _ = product(x, parts, scheme, group_size)
        # column by column, since their sizes are far apart
        size = (
            x.double().abs()
            @ _quantized.dequantized(*parts.values(), scheme, group_size, 256, torch.float64, magnitude=True).mT
        )
        assert ((y.double() - want).abs() <= 2.0**-20 * size + 1e-30).all()
