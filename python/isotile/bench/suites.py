"""Workloads beside the specs' cases: a table that is kept from version to version, and sweeps over a size."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from .. import registry
from ..spec import Case
from .workloads import Workload

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def _workload(op: str, name: str, args: dict[str, Any], dtype: torch.dtype, direction: str, **more: Any) -> Workload:
    return Workload(registry.spec(op), Case(name, "bench", args, (dtype,)), dtype, direction, **more)


def _attention(batch: int, heads: int, kv_heads: int, queries: int, keys: int, d: int, causal: bool) -> dict[str, Any]:
    kv = (batch, kv_heads, keys, d)
    shapes = {"query": (batch, heads, queries, d), "key": kv, "value": kv}
    return {**shapes, **({"is_causal": True} if causal else {})}


def _norm(op: str, shape: tuple[int, ...]) -> dict[str, Any]:
    if op == "softmax":
        return {"x": shape, "dim": -1}
    names = ("weight", "bias") if op == "layer_norm" else ("weight",)
    return {"x": shape, **dict.fromkeys(("normalized_shape", *names), shape[-1:])}


#: (out features, in features): Llama-2 7B's projections, a small layer, GPT-2's vocabulary
WEIGHTS = ((4096, 4096), (11008, 4096), (512, 512), (50257, 768))
ROWS = (1, 4, 16, 128, 512, 2048)
#: batch, heads, tokens, head_dim
SQUARE = ((1, 8, 512, 64), (1, 16, 2048, 64), (1, 32, 1024, 128), (8, 12, 128, 64))
#: scheme, group size, dtype of the activations: those that other libraries have
QUANTIZED = (("int8", -1, BF16), ("int8_dynamic", -1, F32), ("int4", 32, BF16), ("int4_dynamic", 32, F32))
NORMS = ((4096, 768), (2048, 4096), (1, 4096), (64, 50257))


def cpu() -> Iterator[Workload]:
    """What a CPU is asked for: linear layers from one row to 2048, attention and its decode, norms, softmax."""
    for dtype in (F32, BF16, F16):
        sizes = [(m, n, k) for n, k in WEIGHTS for m in ROWS if m < 2048 or n <= 4096]
        for m, n, k in (*sizes, (127, 129, 131), (1000, 1001, 999)):
            yield _workload("linear", f"{m}x{n}x{k}", {"x": (m, k), "weight": (n, k)}, dtype, "forward")
    for scheme, group, dtype in QUANTIZED:
        for n, k in WEIGHTS[:2]:
            for m in (1, 8, 64, 512):
                half = scheme.startswith("int4")
                args = {
                    "x": (m, k),
                    "packed": (n, k // 2 if half else k),
                    "scales": (n, 1 if group == -1 else k // group),
                }
                more = {"scheme": scheme, "group_size": group}
                yield _workload("quantized_linear", f"{scheme}_{m}x{n}x{k}", args | more, dtype, "forward")
    for dtype in (F32, BF16, F16):
        for batch, heads, tokens, d in SQUARE:
            for causal in (False, True):
                if dtype == F16 and tokens == 2048:
                    continue
                name = f"b{batch}_h{heads}_s{tokens}_d{d}{'_causal' if causal else ''}"
                args = _attention(batch, heads, heads, tokens, tokens, d, causal)
                for direction in ("forward", "backward") if dtype != F16 else ("forward",):
                    yield _workload("attention", name, args, dtype, direction)
        grouped = _attention(1, 32, 8, 1024, 1024, 128, True)
        for direction in ("forward", "backward") if dtype != F16 else ("forward",):
            yield _workload("attention", "b1_h32_kv8_s1024_d128_causal", grouped, dtype, direction)
        for kv_heads in (32, 8):
            for batch in (1, 8):
                name = f"b{batch}_h32_kv{kv_heads}_s1x4096_d128"
                args = _attention(batch, 32, kv_heads, 1, 4096, 128, False)
                yield _workload("attention", name, args, dtype, "forward")
    for dtype in (F32, BF16):
        for op in ("layer_norm", "rms_norm", "softmax"):
            for rows, n in NORMS:
                for direction in ("forward", "backward") if rows > 1 else ("forward",):
                    yield _workload(op, f"{rows}x{n}", _norm(op, (rows, n)), dtype, direction)


def sweep() -> Iterator[Workload]:
    """Every operator over one of its sizes, in steps of two."""
    for dtype in (F32, BF16):
        for op in ("layer_norm", "rms_norm", "softmax"):
            for n in (2**i for i in range(7, 16)):
                yield _workload(op, f"n{n}", _norm(op, (512, n)), dtype, "forward", sweep=("n", n))
        for n in (2**i for i in range(5, 12)):
            yield _workload("matmul", f"n{n}", {"a": (n, n), "b": (n, n)}, dtype, "forward", sweep=("m = n = k", n))
        for m in (2**i for i in range(10)):
            args: dict[str, Any] = {"x": (m, 4096), "weight": (4096, 4096)}
            yield _workload("linear", f"rows{m}", args, dtype, "forward", sweep=("rows", m))
        for total in (2**i for i in range(3, 12)):
            args = {"a": (total, 1024), "b": (8, 1024, 1024), "offsets": (8,)}
            yield _workload("grouped_matmul", f"rows{total}", args, dtype, "forward", sweep=("rows", total))
        for tokens in (2**i for i in range(6, 12)):
            args = _attention(1, 8, 8, tokens, tokens, 64, True)
            yield _workload("attention", f"causal{tokens}", args, dtype, "forward", sweep=("tokens", tokens))
        for keys in (2**i for i in range(7, 15)):
            args = _attention(1, 32, 8, 1, keys, 128, False)
            yield _workload("attention", f"decode{keys}", args, dtype, "forward", sweep=("keys of a decode", keys))


SUITES: dict[str, Callable[[], Iterator[Workload]]] = {"cpu": cpu, "sweep": sweep}
