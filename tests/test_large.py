"""Shapes that drawn examples are too small for: several threads, blocks and chunks, and their edges."""

from __future__ import annotations

import pytest
import torch

import isotile
from isotile import registry
from isotile.backends import BACKENDS
from isotile.backends.cpu import CpuBackend, extension
from isotile.spec import Scalar
from isotile.testing import check_recipe

module, _ = extension()
LOWER = [name for name, runs in module.instruction_sets() if runs][:-1]
for isa in LOWER:
    BACKENDS.setdefault(f"cpu[{isa}]", CpuBackend(isa))
UNDER_TEST = ["cpu", *[f"cpu[{isa}]" for isa in LOWER]]


def recipe(op, loop=(), layouts=None, kind="normal", out="contiguous", sizes=None, groups=None, leave=(), **scalars):
    """A recipe with every tensor argument but those in `leave`; `layouts` by argument, contiguous if not said."""
    spec = registry.spec(op)
    layouts = layouts or {}
    present = [n for n in spec.tensors if n not in leave]
    overload = next((o for o in spec.overloads if o in present), "default")
    given = {}
    for name, scalar in spec.scalars.items():
        assert isinstance(scalar, Scalar)
        if scalar.star is None:
            default = spec.signature.parameters[name].default
            given[name] = scalars.get(
                name, default if default is not spec.signature.empty else (scalar.choices or (-1,))[0]
            )
    assert set(scalars) <= set(given)
    return {
        "op": op,
        "overload": overload,
        "kind": kind,
        "sizes": sizes or {},
        "groups": groups or {},
        "absent": [],
        "tensors": {
            n: {
                "loop": list(loop) if spec.tensors[n].pattern.loop else [],
                "layout": layouts.get(n, "contiguous"),
                "dtype": "first",
                "ones": [False] * 6,
            }
            for n in present
        },
        "scalars": given,
        "out": out,
        "seed": 1,
    }


def norm(op, **more):
    return recipe(op, groups={"n": [97]}, loop=[701], **more)


PRODUCT = {"m": 41, "n": 131}
SCORES = {"hq": 4, "hk": 2, "sq": 301, "sk": 701, "d": 40, "dv": 24, "one": 1}
GRADIENT = {**SCORES, "sq": 131, "sk": 331}
DENSE = {"hq": 2, "hk": 2, "sq": 200, "sk": 400, "d": 32, "dv": 48, "one": 1}  # keys and values used where they are
CASES = {
    "softmax": recipe("softmax", [701, 97]),
    "softmax_stepped": recipe("softmax", [701, 97], {"x": "stepped"}),
    "softmax_long": recipe("softmax", [3, 70001]),
    "softmax_far_below_zero": recipe("softmax", [64, 3], kind="large"),
    "softmax_columns": recipe("softmax", [5, 97, 301], dim=1),
    "softmax_columns_apart": recipe("softmax", [5, 97, 301], {"x": "sliced"}, dim=1),
    "softmax_backward": recipe("softmax_backward", [701, 97], {"y": "sliced"}),
    "softmax_backward_columns": recipe("softmax_backward", [5, 97, 301], {"grad": "sliced"}, dim=1),
    "softmax_backward_columns_result": recipe("softmax_backward", [5, 97, 301], out="sliced", dim=1),
    **{
        f"epilogue_backward_{a}_{kind}": recipe("matmul_epilogue_backward", [701, 97], kind=kind, activation=a)
        for a in ("relu", "gelu", "gelu_tanh", "silu", "sigmoid", "tanh")
        for kind in ("mixed", "specials")
    },
    "layer_norm": norm("layer_norm"),
    "layer_norm_stepped": norm("layer_norm", layouts={"x": "stepped", "weight": "stepped"}),
    "layer_norm_long": recipe("layer_norm", [3], groups={"n": [70001]}, leave=("residual",)),
    "rms_norm": norm("rms_norm", weight_offset=1.0),
    "rms_norm_plain": norm("rms_norm", leave=("residual",)),
    "layer_norm_backward": norm("layer_norm_backward"),
    "layer_norm_backward_stepped": norm("layer_norm_backward", layouts={"grad": "stepped"}),
    "rms_norm_backward": norm("rms_norm_backward", leave=("grad_sum",)),
    **{f"matmul_k_{k}": recipe("matmul", sizes={**PRODUCT, "k": k}) for k in (512, 767, 768, 769, 1536, 1537)},
    **{
        f"matmul_few_rows_k_{k}": recipe("matmul", sizes={"m": 3, "n": 131, "k": k}, leave=("residual",))
        for k in (768, 1024, 1600)
    },
    "matmul_batch": recipe("matmul", [7], {"a": "transposed"}, sizes={"m": 65, "n": 70, "k": 129}, activation="gelu"),
    "matmul_stepped_epilogue": recipe(
        "matmul", layouts={"bias": "stepped", "residual": "stepped"}, sizes={**PRODUCT, "k": 64}, activation="silu"
    ),
    "linear": recipe("linear", [301], sizes={"k": 512, "n": 130}, activation="relu"),
    "grouped_matmul": recipe("grouped_matmul", sizes={"total": 301, "k": 512, "n": 130, "groups": 5}),
    "grouped_matmul_backward": recipe("grouped_matmul_backward", sizes={"total": 1025, "k": 70, "n": 130, "groups": 3}),
    "attention": recipe("attention", [2], sizes=SCORES, leave=("dropout_seed",), is_causal=True),
    "attention_plain": recipe(
        "attention", [2], sizes=SCORES, leave=("attn_mask", "sinks", "alibi_slopes", "seqlens_k", "dropout_seed")
    ),
    "attention_everything": recipe(
        "attention", [2], sizes=SCORES, is_causal=True, causal_alignment="bottom_right", window_left=300, softcap=2.0,
        dropout_p=0.3,
    ),
    "attention_window": recipe("attention", [2], sizes=SCORES, window_left=17, window_right=3, leave=("attn_mask",)),
    "attention_one_query": recipe("attention", [2], sizes={**SCORES, "sq": 1}, leave=("attn_mask",)),
    **{
        f"{op}_dense": recipe(op, [2], sizes=DENSE, leave=("attn_mask", "dropout_seed"), window_left=9)
        for op in ("attention", "attention_backward")
    },
    "attention_backward": recipe(
        "attention_backward", [2], sizes=GRADIENT, is_causal=True, need_mask=True, need_sinks=True
    ),
    "attention_backward_everything": recipe(
        "attention_backward", [2], sizes=GRADIENT, causal_alignment="bottom_right", window_left=100, softcap=2.0,
        dropout_p=0.3, need_sinks=True,
    ),
}  # fmt: skip


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", UNDER_TEST)
@pytest.mark.parametrize("case", CASES.values(), ids=list(CASES))
def test_agrees_with_the_float64_truth(case, backend, dtype, threads):
    spec = registry.spec(case["op"])
    tensors = {
        n: {**t, "dtype": dtype if _floating(spec, n, dtype) else str(spec.tensors[n].dtypes[0]).removeprefix("torch.")}
        for n, t in case["tensors"].items()
    }
    torch.set_num_threads(threads)
    check_recipe({**case, "dtype": dtype, "tensors": tensors}, backend)


def _floating(spec, name, dtype):
    return getattr(torch, dtype) in spec.tensors[name].dtypes


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("backend", UNDER_TEST)
def test_offsets_out_of_order_or_range_give_empty_or_cut_groups(backend, threads):
    """As the reference says, and never an access out of bounds: offsets are data."""
    torch.set_num_threads(threads)
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-3, 4, (67, 40), generator=generator).float()
    for ends in ([30, 10, 50, 60], [10, 200, 20, 67], [-5, 20, -7, 40], [2**31 - 1, 0, -(2**31), 67], [0, 0, 0, 0]):
        b = torch.randint(-3, 4, (4, 40, 33), generator=generator).float()
        offsets = torch.tensor(ends, dtype=torch.int32)
        results = []
        for name in ("reference", backend):
            x, w = a.clone().requires_grad_(), b.clone().requires_grad_()
            with isotile.use_backend(name):
                y = isotile.grouped_matmul(x, w, offsets)
                y.backward(torch.ones_like(y))
            results.append((y.detach(), x.grad, w.grad))
        for want, got in zip(*results, strict=True):
            assert torch.equal(got, want), ends
