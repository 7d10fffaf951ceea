"""Quantised calls whose products and sums a float32 holds exactly: every backend must give the same bits."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

import isotile
from isotile.ops import _quantized

SIZES = (1, 2, 3, 5, 8, 9, 16, 17, 31, 33, 40, 64, 65, 100, 128, 129, 200, 257)


@st.composite
def calls(draw, dtype, most=257):
    """(x, weight, the exact result): whole activations, the integer schemes and mxfp4, scales of 0.5, 1 and 2.

    The largest sum is 257 * 127 * 128 * 2, in units of 0.5: less than 2**24. A dynamic row whose largest magnitude is
    127 is its own quantisation.
    """
    m, n, k = (draw(st.sampled_from([s for s in SIZES if s <= limit])) for limit in (40, min(most, 129), most))
    scheme = draw(st.sampled_from(("int8", "int8_dynamic", "int4", "int4_dynamic", "mxfp4")))
    group_size = draw(st.sampled_from(_quantized.SCHEMES[scheme].group_sizes))
    zeros = draw(st.sampled_from((None, torch.uint8, torch.float32, torch.bfloat16))) if "int4" in scheme else None
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def whole(low, high, *shape):
        return torch.randint(low, high, shape, generator=generator)

    groups = n, _quantized.group_count(group_size, k)
    scales = 126 + whole(0, 3, *groups)
    x = whole(-127, 128, m, k)
    x[:, whole(0, k, 1)] = 127
    weight = isotile.QuantizedWeight(
        whole(0, 256, n, _quantized.row_bytes(scheme, k)).to(torch.uint8),
        scales.to(torch.uint8) if scheme == "mxfp4" else torch.exp2(scales - 127.0),
        None if zeros is None else whole(0, 16, *groups).to(zeros),
        scheme=scheme,
        group_size=group_size,
        shape=(n, k),
    )
    want = x.double() @ weight.dequantize(torch.float64).mT
    return x.to(dtype), weight, want.to(dtype)
