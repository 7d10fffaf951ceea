"""How a PyTorch user would write each operator. The only thing in the benchmarks that is listed by hand.

An expression takes an operator's arguments by name and returns `(function, operands)`; the rival is
`function(*operands)`. A sentence instead says why PyTorch has no such function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from ..ops._quantized import dequantized

Expression = tuple[Callable[..., Any], tuple[Any, ...]]

ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}


def _epilogue(product: Callable[..., torch.Tensor], operands: tuple[Any, ...], v: dict[str, Any]) -> Expression | str:
    if v["out_dtype"] is not None:
        return "PyTorch's products have no out_dtype"
    activation, residual = v["activation"], v["residual"]
    if activation is None and residual is None:
        return product, operands

    def with_epilogue(residual: torch.Tensor | None, *operands: Any) -> torch.Tensor:
        y = product(*operands)
        if activation is not None:
            y = ACTIVATIONS[activation](y)
        return y if residual is None else y + residual

    return with_epilogue, (residual, *operands)


def _biased_matmul(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.matmul(a, b) + bias


def matmul(v: dict[str, Any]) -> Expression | str:
    if v["bias"] is None:
        return _epilogue(torch.matmul, (v["a"], v["b"]), v)
    return _epilogue(_biased_matmul, (v["a"], v["b"], v["bias"]), v)


def linear(v: dict[str, Any]) -> Expression | str:
    return _epilogue(F.linear, (v["x"], v["weight"], v["bias"]), v)


def quantized_linear(v: dict[str, Any]) -> Expression | str:
    """The same layer with the weight in x's dtype, as it was before it was quantised."""
    names = ("packed", "scales", "zeros", "global_scale", "scheme", "group_size")
    dense = dequantized(**{n: v[n] for n in names}, k=v["x"].shape[-1], wide=torch.float32)
    return _epilogue(F.linear, (v["x"], dense.to(v["x"].dtype), v["bias"]), v)


def _grouped_mm(a: torch.Tensor, b: torch.Tensor, offsets: torch.Tensor, end: int) -> torch.Tensor:
    # PyTorch leaves rows past the last group unwritten; isotile's meaning is 0.
    y = F.grouped_mm(a[:end], b, offs=offsets)
    return y if end == a.shape[0] else F.pad(y, (0, 0, 0, a.shape[0] - end))


def grouped_matmul(v: dict[str, Any]) -> Expression | str:
    if v["out_dtype"] is not None:
        return "torch.nn.functional.grouped_mm is compared without out_dtype"
    return _grouped_mm, (v["a"], v["b"], v["offsets"], int(v["offsets"][-1]))


def _with_residual(norm: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    def added(x: torch.Tensor, residual: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, torch.Tensor]:
        summed = x + residual
        return norm(summed, *rest), summed

    return added


def layer_norm(v: dict[str, Any]) -> Expression:
    rest = (v["normalized_shape"], v["weight"], v["bias"], v["eps"])
    if v["residual"] is not None:
        return _with_residual(F.layer_norm), (v["x"], v["residual"], *rest)
    return F.layer_norm, (v["x"], *rest)


def _offset_rms_norm(x: torch.Tensor, shape: Any, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
    return F.rms_norm(x, shape, weight + offset, eps)


def rms_norm(v: dict[str, Any]) -> Expression:
    rest: tuple[Any, ...] = (v["normalized_shape"], v["weight"], v["eps"])
    norm: Callable[..., torch.Tensor] = F.rms_norm
    if v["weight_offset"] and v["weight"] is not None:
        rest, norm = (*rest, v["weight_offset"]), _offset_rms_norm
    if v["residual"] is not None:
        return _with_residual(norm), (v["x"], v["residual"], *rest)
    return norm, (v["x"], *rest)


def _typed_softmax(x: torch.Tensor, dim: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.softmax(x, dim, dtype=dtype)


def softmax(v: dict[str, Any]) -> Expression:
    if v["dtype"] is not None:
        return _typed_softmax, (v["x"], v["dim"], v["dtype"])
    return torch.softmax, (v["x"], v["dim"])


def given(v: dict[str, Any], option: str) -> bool:
    """Whether an option of attention changes anything: 0 is a window, and no other option."""
    value = v[option]
    if value is None or isinstance(value, torch.Tensor) or option.startswith("window"):
        return value is not None
    return bool(value)


def _sdpa(q: Any, k: Any, v: Any, mask: Any, causal: bool, scale: float | None, gqa: bool) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, mask, 0.0, causal, scale=scale, enable_gqa=gqa)


def attention(v: dict[str, Any]) -> Expression | str:
    beyond = ("softcap", "sinks", "alibi_slopes", "seqlens_k", "window_left", "window_right", "dropout_p")
    extra = [n for n in beyond if given(v, n)]
    if v["is_causal"] and (v["causal_alignment"] != "top_left" or v["attn_mask"] is not None):
        extra.append("causal_alignment")
    if extra:
        return f"torch.nn.functional.scaled_dot_product_attention has no {', '.join(extra)}"
    grouped = v["query"].shape[-3] != v["key"].shape[-3]
    return _sdpa, (v["query"], v["key"], v["value"], v["attn_mask"], v["is_causal"], v["scale"], grouped)


EXPRESSIONS: dict[str, Callable[[dict[str, Any]], Expression | str]] = {
    "matmul": matmul,
    "linear": linear,
    "quantized_linear": quantized_linear,
    "grouped_matmul": grouped_matmul,
    "layer_norm": layer_norm,
    "rms_norm": rms_norm,
    "softmax": softmax,
    "attention": attention,
}


def torch_expression(op: str, values: dict[str, Any]) -> Expression | str:
    """PyTorch's way to compute `op` on these arguments, or why there is none."""
    if op not in EXPRESSIONS:
        return f"no PyTorch expression of {op} is listed"
    return EXPRESSIONS[op](values)
