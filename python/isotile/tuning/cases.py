"""Named shapes that configurations of the Triton kernels are compiled, modelled and measured for.

A case is a kernel with its tensors as `View`s and its scalars, in kernel form, so that it can be compiled for any
target without tensors. The shapes are those of common models, and of the published measurements of an H100 that
`isotile bench --suite h100` repeats.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .. import dispatch, registry, state
from ..backends.triton_launch import View
from ..record import load

Views = dict[str, Any]
NamedCase = tuple[str, str, Views, dict[str, Any]]


def cases(device="cpu"):
    """(op, label, views by name, scalars) for the shapes worth a row of the table."""
    bf16, f16, f32, i32, i64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64

    def v(*shape, dtype=bf16, strides=None):
        step, made = 1, []
        for size in reversed(shape):
            made.append(step)
            step *= max(size, 1)
        return View(shape, tuple(strides) if strides else tuple(reversed(made)), dtype, torch.device(device))

    for n in (768, 4096, 8192, 16384, 50257):
        x = v(4096, n)
        yield "rms_norm", f"bf16 4096x{n}", {"x": x, "weight": v(n), "y": v(4096, n)}, {}
        yield (
            "layer_norm",
            f"bf16 4096x{n} residual",
            {"x": x, "weight": v(n), "bias": v(n), "residual": v(4096, n), "y": v(4096, n), "sum": v(4096, n)},
            {},
        )
        yield "softmax", f"bf16 4096x{n}", {"x": x, "y": v(4096, n)}, {}
        yield "softmax_backward", f"bf16 4096x{n}", {"grad": x, "y": v(4096, n), "grad_x": v(4096, n)}, {}
        yield (
            "layer_norm_backward",
            f"bf16 4096x{n}",
            {"grad": x, "x": v(4096, n), "weight": v(n), "grad_x": v(4096, n), "grad_weight": v(n), "grad_bias": v(n)},
            {},
        )
        yield (
            "rms_norm_backward",
            f"bf16 4096x{n}",
            {"grad": x, "x": v(4096, n), "weight": v(n), "grad_x": v(4096, n), "grad_weight": v(n)},
            {},
        )
    yield (
        "rms_norm",
        "f32 4096x4096",
        {"x": v(4096, 4096, dtype=f32), "weight": v(4096), "y": v(4096, 4096, dtype=f32)},
        {},
    )
    yield from matmul_cases(v, bf16, f16, f32, i32)
    yield from quantized_cases(v, bf16, f16, f32)
    yield from attention_cases(v, bf16, f16, f32, i32, i64)


def recorded(path: Path, device: str = "cpu") -> Iterator[tuple[NamedCase, dict[str, list[int]]]]:
    """The calls of a recording that Triton has a kernel for, in kernel form, and the values of their small integers.

    Raises:
        NotARecording: the file is none.
    """
    for i, call in enumerate(load(path)):
        spec = registry.spec(call.op)
        given = {n: call.tensors.get(n) for n in spec.tensors}
        tensors = {
            n: t and torch.empty_strided(t["shape"], t["strides"], dtype=getattr(torch, t["dtype"]), device="meta")
            for n, t in given.items()
        }
        scalars = {n: call.scalars.get(n, spec.signature.parameters[n].default) for n in spec.scalars}
        scalars = {n: _typed(spec.scalars[n].type, v) for n, v in scalars.items()}
        request, _ = dispatch.make_request(spec, call.overload, {**tensors, **scalars}, None, state.State())
        lowered = request.lowered
        if lowered.kernel not in registry.kernel_names("triton"):
            continue
        views = {
            n: v and dataclasses.replace(v, device=torch.device(device))
            for n, v in {**lowered.tensors, **lowered.outs}.items()
        }
        values = {
            n: t["values"] for n, v in views.items() if v and (t := given.get(v.source)) is not None and "values" in t
        }
        shapes = ", ".join(f"{n} {'x'.join(map(str, t['shape']))}" for n, t in call.tensors.items())
        label = f"call {i}: {call.op} {str(request.dtype).removeprefix('torch.')} {shapes}"
        yield (lowered.kernel, label, views, lowered.scalars), values
        prepare = registry.kernel_module("triton", lowered.kernel).prepare
        if request.dtype == torch.float32 and "allow_tf32" in inspect.signature(prepare).parameters:
            yield (lowered.kernel, f"{label} tf32", views, {**lowered.scalars, "allow_tf32": True}), values


def _typed(kind: str, value: Any) -> Any:
    """A scalar as the operator takes it, from JSON."""
    if isinstance(value, list):
        return tuple(value)
    return getattr(torch, value) if kind == "ScalarType?" and isinstance(value, str) else value


def matmul_cases(v, bf16, f16, f32, i32):
    def t(*shape, dtype=bf16):  # the last two dimensions stored transposed
        return v(*shape, dtype=dtype, strides=(1, shape[-2]))

    for m, n, k in (
        (8192, 8192, 8192),
        (4096, 4096, 4096),
        (1024, 1024, 1024),
        (256, 4096, 4096),
        (64, 14336, 4096),
        (16, 4096, 4096),
        (1, 4096, 4096),
        (4095, 4097, 4111),
        (1000, 1000, 1000),
    ):
        yield "matmul", f"bf16 {m}x{n}x{k} linear", {"a": v(m, k), "b": t(k, n), "y": v(m, n)}, {}
    for m, n, k in ((4096, 4096, 4096), (16, 4096, 4096)):
        yield (
            "matmul",
            f"bf16 {m}x{n}x{k} bias gelu residual preactivation",
            {"a": v(m, k), "b": v(k, n), "bias": v(n), "residual": v(m, n), "y": v(m, n), "preactivation": v(m, n)},
            {"activation": 2},
        )
    yield (
        "matmul",
        "f16 2048^3 a transposed",
        {"a": t(2048, 2048, dtype=f16), "b": v(2048, 2048, dtype=f16), "y": v(2048, 2048, dtype=f16)},
        {},
    )
    for tf32 in (False, True):
        x = v(2048, 2048, dtype=f32)
        yield (
            "matmul",
            f"f32 2048^3 tf32={tf32}",
            {"a": x, "b": v(2048, 2048, dtype=f32), "y": v(2048, 2048, dtype=f32)},
            {"allow_tf32": tf32},
        )
    yield "matmul", "bf16 bmm 64x512^3", {"a": v(64, 512, 512), "b": v(64, 512, 512), "y": v(64, 512, 512)}, {}
    yield (
        "matmul_epilogue_backward",
        "bf16 4096x4096 gelu",
        {"grad": v(4096, 4096), "preactivation": v(4096, 4096), "grad_z": v(4096, 4096)},
        {"activation": 2},
    )
    offsets = v(16, dtype=i32)
    yield (
        "grouped_matmul",
        "bf16 8192x4096x4096 g16",
        {"a": v(8192, 4096), "b": v(16, 4096, 4096), "offsets": offsets, "y": v(8192, 4096)},
        {},
    )
    yield (
        "grouped_matmul_backward",
        "bf16 8192x4096x4096 g16",
        {
            "grad": v(8192, 4096),
            "a": v(8192, 4096),
            "b": v(16, 4096, 4096),
            "offsets": offsets,
            "grad_a": v(8192, 4096),
            "grad_b": v(16, 4096, 4096),
        },
        {},
    )


def quantized_cases(v, bf16, f16, f32):
    # the scheme's index in the kernel form, bytes of a row of 4096, group size, dtype of scales
    for index, (scheme, row_bytes, group_size, scales) in enumerate(
        (
            ("int8", 4096, -1, f32),
            ("int8_dynamic", 4096, -1, f32),
            ("int4", 2048, 128, bf16),
            ("int4_dynamic", 2048, 32, bf16),
            ("fp8", 4096, -1, f32),
            ("mxfp4", 2048, 32, torch.uint8),
            ("nvfp4", 2048, 16, torch.uint8),
        )
    ):
        groups = 1 if group_size == -1 else 4096 // group_size
        for m, dtype in ((1, bf16), (256, f16), (8192, bf16)):
            yield (
                "quantized_linear",
                f"{scheme} {str(dtype)[6:]} {m}x4096x4096",
                {
                    "x": v(m, 4096, dtype=dtype),
                    "packed": v(4096, row_bytes, dtype=torch.uint8),
                    "scales": v(4096, groups, dtype=scales),
                    "y": v(m, 4096, dtype=dtype),
                },
                {"scheme": index, "group_size": group_size},
            )
        for m, dtype, label in ((256, f16, "f16 as f32"), (8192, bf16, "bf16")):
            yield (
                "quantized_linear_backward",
                f"{scheme} {label} {m}x4096x4096",
                {
                    "grad": v(m, 4096, dtype=dtype),
                    "packed": v(4096, row_bytes, dtype=torch.uint8),
                    "scales": v(4096, groups, dtype=scales),
                    "grad_x": v(m, 4096, dtype=dtype),
                },
                {"scheme": index, "group_size": group_size, "k": 4096},
            )


def attention_cases(v, bf16, f16, f32, i32, i64):
    plain = {
        "dropout_p": 0.0,
        "is_causal": 0,
        "scale": 0.125,
        "bottom_right": 0,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
    }

    def tensors(b, hq, hk, sq, sk, d, dv=None, dtype=bf16, **extra):
        dv = dv or d
        return dict(
            query=v(b, hq, sq, d, dtype=dtype),
            key=v(b, hk, sk, d, dtype=dtype),
            value=v(b, hk, sk, dv, dtype=dtype),
            out=v(b, hq, sq, dv, dtype=dtype),
            lse=v(b, hq, sq, dtype=f32),
            **extra,
        )

    def backward(forward):
        query, key, value = forward["query"], forward["key"], forward["value"]
        return dict(
            grad_out=v(*forward["out"].shape, dtype=query.dtype),
            **forward,
            grad_query=v(*query.shape, dtype=query.dtype),
            grad_key=v(*key.shape, dtype=query.dtype),
            grad_value=v(*value.shape, dtype=query.dtype),
        )

    shapes = [
        ("h32 s4096 d128", tensors(2, 32, 32, 4096, 4096, 128)),
        ("h16 s1024 d64", tensors(16, 16, 16, 1024, 1024, 64)),
        ("h32/8 s2048 d128", tensors(4, 32, 8, 2048, 2048, 128)),
        ("h16 s8192 d256", tensors(1, 16, 16, 8192, 8192, 256)),
        ("h8 s1000 d96", tensors(2, 8, 8, 1000, 1000, 96)),
        ("h4 s512 d512", tensors(1, 4, 4, 512, 512, 512)),
        ("h8 s512 d64 f32", tensors(1, 8, 8, 512, 512, 64, dtype=f32)),
    ]
    for label, t in shapes:
        for causal in (0, 1):
            yield "attention", f"{label} causal={causal}", t, {**plain, "is_causal": causal}
            yield "attention_backward", f"{label} causal={causal}", backward(t), {**plain, "is_causal": causal}
    full = tensors(
        2,
        8,
        4,
        500,
        700,
        128,
        dv=64,
        attn_mask=v(2, 8, 500, 700, dtype=f32),
        sinks=v(8, dtype=f32),
        alibi_slopes=v(8, dtype=f32),
        seqlens_k=v(2, dtype=i32),
        dropout_seed=v(1, dtype=i64),
    )
    every = {**plain, "dropout_p": 0.1, "is_causal": 1, "bottom_right": 1, "window_left": 100, "softcap": 30.0}
    yield "attention", "every option", full, every
    yield (
        "attention_backward",
        "every option",
        {
            **backward(full),
            "grad_lse": v(2, 8, 500, dtype=f32),
            "grad_attn_mask": v(2, 8, 500, 700, dtype=f32),
            "grad_sinks": v(8, dtype=f32),
        },
        every,
    )
    for b, hq, hk, sk in ((64, 32, 8, 4096), (1, 32, 8, 8192), (16, 32, 32, 2048)):
        yield "attention", f"decode b{b} h{hq}/{hk} kv{sk} d128", tensors(b, hq, hk, 1, sk, 128), plain
