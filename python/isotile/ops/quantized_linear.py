"""The linear layer with a quantised weight."""

from __future__ import annotations

from typing import Any

import torch

from ..precision import accumulator, stored
from ..quantization import QuantizedWeight
from ..spec import Case, ErrorModel, OpSpec, Result, Scalar, Tensor, Values
from . import _activation, _quantized
from . import matmul as product
from ._quantized import SCHEMES


def door(x, weight, bias=None, *, activation=None, residual=None, out_dtype=None):
    """activation(x @ weight.T + bias) + residual with a quantised weight, see `isotile.quantize`.

    The weight means its dequantised numbers, exactly. Under "int8", "int4", "mxfp4" and "nvfp4" x stays as it is;
    products are summed in float32 (float64 for float64), a kernel may round dequantised weights to x's dtype first.
    Under "int8_dynamic", "int4_dynamic" and "fp8" each row of x is quantised at run time, to integers or e4m3 with one
    float32 scale, in steps that give the same bits on every backend; integer products are summed exactly within each
    group of the weight. Such a row with a NaN or an infinity gives NaN.

    The gradient of x is that of the dequantised weight; quantising activations counts as the identity.

    Args:
        x: [..., k]. float32, bfloat16, float16 or float64.
        weight: a `QuantizedWeight` of shape [n, k].
        bias: [n], any float dtype.
        activation: None, "relu", "gelu" (exact), "gelu_tanh", "silu", "sigmoid" or "tanh".
        residual: any shape that broadcasts to the result's, any float dtype; added last.
        out_dtype: the result's dtype; x's if None.

    Returns:
        y: [..., n].

    Raises:
        ValueError: a shape or option that does not fit.
        TypeError: a dtype or type that is not allowed.
    """
    if not isinstance(weight, QuantizedWeight):
        raise TypeError(
            "isotile.quantized_linear: weight: wanted a QuantizedWeight (isotile.quantize makes one), "
            f"got {type(weight).__name__}"
        )
    if isinstance(x, torch.Tensor) and x.ndim and x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"isotile.quantized_linear: weight: wanted shape [n, k] with k = {x.shape[-1]} (from x), "
            f"got {list(weight.shape)}"
        )
    if torch.compiler.is_compiling():
        parts = [weight.packed, weight.scales, weight.zeros, weight.global_scale]
    else:  # a module's attributes take microseconds
        buffers = weight._buffers
        parts = [buffers["packed"], buffers["scales"], buffers["zeros"], buffers["global_scale"]]
    return (x, *parts, bias, weight.scheme, weight.group_size, activation, residual, out_dtype), ("y",)


def quantized_linear(
    x,
    packed,
    scales,
    zeros=None,
    global_scale=None,
    bias=None,
    scheme="int8",
    group_size=-1,
    activation=None,
    residual=None,
    out_dtype=None,
):
    """The operator behind `isotile.quantized_linear`, on the parts of a `QuantizedWeight`.

    Args:
        x: [..., k]. float32, bfloat16, float16 or float64.
        packed: [n, row_bytes], uint8. Eight-bit schemes: row_bytes = k, byte i is element i (int8, or e4m3's bits).
            Four-bit schemes: 64 bytes for each 128 elements, also for the last, partly filled 128; byte j of the 64
            holds element j in its low and element 64 + j in its high half.
        scales: [n, groups], float32, bfloat16 or float16; or uint8 under "mxfp4" (e8m0's bits) and "nvfp4" (e4m3's).
        zeros: [n, groups], of "int4" and "int4_dynamic". uint8: integer zero points, the weight is (q - zero) * scale;
            float32, bfloat16 or float16: offsets, the weight is q * scale + zero. None: zero points of 8.
        global_scale: [1], float32; one more factor of all weights ("nvfp4").
        bias: [n], any float dtype.
        scheme: see `isotile.quantize`.
        group_size: consecutive elements of a row that share a scale; -1: all of them.
        activation, residual, out_dtype: as `isotile.linear`.

    Returns:
        y: [..., n].
    """
    wide = accumulator(x.dtype)
    weight = _quantized.dequantized(packed, scales, zeros, global_scale, scheme, group_size, x.shape[-1], wide)
    rows = x.to(wide)
    if SCHEMES[scheme].dynamic is not None:
        q, scale = _quantized.quantize_rows(x.detach(), scheme)
        if SCHEMES[scheme].floating:
            sums = torch.matmul(q.to(wide), weight.mT)
        else:
            sums = _quantized.integer_product(q, packed, scales, zeros, scheme, group_size, wide)
        z = sums * scale.to(wide)
        if x.requires_grad:  # x - x.detach() is 0, and passes the gradient as if nothing had been rounded
            z = z + torch.matmul(rows - rows.detach(), weight.mT)
    else:
        z = torch.matmul(rows, weight.mT)
    if bias is not None:
        z = z + bias.to(wide)
    y = _activation.apply(z, activation)
    if residual is not None:
        y = y + residual.to(wide)
    dtype = out_dtype or x.dtype
    return {"y": stored(y, dtype), "preactivation": stored(z, dtype)}


def _gradient(saved, grads, needs):
    from ..library import call

    weight = {n: getattr(saved, n) for n in ("packed", "scales", "zeros", "global_scale", "scheme", "group_size")}
    x = saved.x
    grad_z, found = product.epilogue_gradient(
        saved,
        grads,
        needs,
        lambda: call("quantized_linear", x, bias=saved.bias, **weight, out_dtype=saved.out_dtype)[0],
    )
    if needs["x"]:
        found["x"] = call("quantized_linear_backward", grad_z.to(x.dtype), x, **weight)[0]
    return found


def lower_weight(tensors, scalars):
    """Kernel form of a quantised weight: its tensors, contiguous, and its scalars."""
    from ..dispatch import NeedsCopy

    parts = {name: tensors[name] for name in PARTS}
    for name, view in parts.items():
        if view is not None and view.numel() and not view.is_contiguous():
            raise NeedsCopy(name)
    return parts, {"scheme": tuple(SCHEMES).index(scalars.scheme), "group_size": scalars.group_size}


def _lower(tensors, outs, scalars):
    parts, numbers = lower_weight(tensors, scalars)
    inputs = {"x": tensors["x"], **parts, "bias": tensors["bias"], "residual": tensors["residual"]}
    numbers["activation"] = _activation.ACTIVATIONS.index(scalars.activation)
    return "quantized_linear", inputs, outs, numbers


def _error(args, truth, dims):
    weight = _quantized.dequantized(
        args.packed, args.scales, args.zeros, args.global_scale, args.scheme, args.group_size, dims.k,
        torch.float64, magnitude=True,
    )  # fmt: skip
    scheme = SCHEMES[args.scheme]
    if scheme.dynamic is None:
        magnitude = torch.matmul(args.x.double().abs(), weight.mT)
        # Each weight is rounded at most three times on its way (difference, scale, offset or global scale), and may
        # be rounded once more to x's dtype, which is the operand term.
        found = product.product_error(magnitude, dims.k, args, truth, extra=3.0)
        rounding = magnitude * (1.13 if args.activation is not None else 1.0)
        return {"y": (found["y"][0], rounding), "preactivation": (found["preactivation"][0], magnitude)}
    q, scale = _quantized.quantize_rows(args.x, args.scheme)
    magnitude = torch.matmul(q.double().abs(), weight.mT) * scale.double()
    # Integers are exact within a group. What rounds: the group's sum as a float, its scale, its zero's term, the sum
    # over groups, and the row's scale. Products of e4m3 numbers are exact, their sum is not.
    terms = dims.k if scheme.floating else dims.groups
    return product.product_error(magnitude, terms, args, truth, extra=5.0)


def complete(recipe):
    """What follows from the scheme of a drawn call: packed sizes, dtypes, and which parts there are."""
    sizes, scalars, tensors = recipe["sizes"], recipe["scalars"], recipe["tensors"]
    name = scalars["scheme"]
    scheme = SCHEMES[name]
    if scalars["group_size"] not in scheme.group_sizes:
        scalars["group_size"] = scheme.group_sizes[0]
    sizes["row_bytes"] = _quantized.row_bytes(name, sizes["k"])
    sizes["groups"] = _quantized.group_count(scalars["group_size"], sizes["k"])
    if name in ("mxfp4", "nvfp4"):
        tensors["scales"]["dtype"] = "uint8"
    elif tensors["scales"]["dtype"] == "uint8":
        tensors["scales"]["dtype"] = "float32"
    if name not in ("int4", "int4_dynamic"):
        tensors.pop("zeros", None)
    if name != "nvfp4":
        tensors.pop("global_scale", None)
    sizes["one"] = 1


def _draw_bytes(random, dims, shape):
    """Any bytes but e4m3's NaN."""
    drawn = random.integers(0, 256, shape).to(torch.uint8)
    return torch.where(drawn & 127 == 127, drawn - 1, drawn)


_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_WEIGHT: dict[str, Any] = {"differentiable": False, "autocast": False}

#: The tensors of a quantised weight, its scalars, and what they require of each other.
PARTS: dict[str, Tensor | Scalar] = {
    "packed": Tensor("n row_bytes", dtypes=(torch.uint8,), values=Values(make=_draw_bytes), **_WEIGHT),
    "scales": Tensor(
        "n groups", dtypes=(*_FLOATS, torch.uint8), values=Values(low=-0.1, high=0.2, codes=(100, 127)), **_WEIGHT
    ),
    "zeros": Tensor(
        "n groups",
        dtypes=(torch.uint8, *_FLOATS),
        optional=True,
        values=Values(low=-1.5, high=1.5, codes=(0, 16)),
        **_WEIGHT,
    ),
    "global_scale": Tensor("one", dtypes=(torch.float32,), optional=True, values=Values(low=0.5, high=2.0), **_WEIGHT),
}
FORMAT: dict[str, Tensor | Scalar] = {
    "scheme": Scalar("str", choices=tuple(SCHEMES)),
    "group_size": Scalar("int", choices=(-1, 16, 32, 64, 128)),
}
REQUIRES = (
    (
        "group_size",
        lambda d, s: f"one of {', '.join(map(str, SCHEMES[s.scheme].group_sizes))} under scheme {s.scheme!r}",
        lambda d, s: s.group_size in SCHEMES[s.scheme].group_sizes,
    ),
    (
        "packed",
        lambda d, s: f"rows of {_quantized.row_bytes(s.scheme, d.k)} bytes for k = {d.k} under {s.scheme!r}",
        lambda d, s: d.row_bytes == _quantized.row_bytes(s.scheme, d.k),
    ),
    (
        "scales",
        lambda d, s: f"{_quantized.group_count(s.group_size, d.k)} groups for k = {d.k} and {s.group_size} in each",
        lambda d, s: d.groups == _quantized.group_count(s.group_size, d.k),
    ),
    (
        "scales",
        lambda d, s: f"a float dtype under {s.scheme!r}",
        lambda d, s: s.scales.dtype != torch.uint8 or s.scheme in ("mxfp4", "nvfp4"),
    ),
    (
        "zeros",
        lambda d, s: f"None under {s.scheme!r}",
        lambda d, s: s.zeros is None or s.scheme in ("int4", "int4_dynamic"),
    ),
    (
        "global_scale",
        lambda d, s: f"None under {s.scheme!r}, and one element under 'nvfp4'",
        lambda d, s: s.global_scale is None or (s.scheme == "nvfp4" and d.one == 1),
    ),
)

#: Real layers by the rows that they see: (name, rows, n, k).
SHAPES = (
    ("llama2_7b_qkv_decode", 1, 4096, 4096),
    ("llama2_7b_qkv_decode_8", 8, 4096, 4096),
    ("llama2_7b_qkv_prefill_64", 64, 4096, 4096),
    ("llama2_7b_qkv_prefill_512", 512, 4096, 4096),
    ("llama2_7b_up_decode", 1, 11008, 4096),
    ("llama2_7b_up_decode_8", 8, 11008, 4096),
    ("llama2_7b_up_prefill_64", 64, 11008, 4096),
    ("llama2_7b_up_prefill_512", 512, 11008, 4096),
)


#: (scheme, group_size)
BENCHED = (("int8", -1), ("int8_dynamic", -1), ("int4", 128), ("int4_dynamic", 32), ("fp8", -1))


def _case(name, tags, rows, n, k, scheme, group_size):
    parts = {
        "x": (rows, k),
        "packed": (n, _quantized.row_bytes(scheme, k)),
        "scales": (n, _quantized.group_count(group_size, k)),
        "scheme": scheme,
        "group_size": group_size,
    }
    return Case(name, tags, parts, (torch.bfloat16, torch.float32))


SPEC = OpSpec(
    reference=quantized_linear,
    args={
        "x": Tensor("... k"),
        **PARTS,
        **product.EPILOGUE,
        "residual": Tensor("... n", optional=True, broadcast=True),
        **FORMAT,
    },
    results={
        "y": Result("... n", ("out_dtype", "x")),
        "preactivation": Result("... n", ("out_dtype", "x"), when="preactivation"),
    },
    requires=(
        *REQUIRES,
        (
            "x",
            lambda d, s: f"at most {_quantized.MAX_TERMS} columns, whose integer products 32 bits hold",
            lambda d, s: SCHEMES[s.scheme].dynamic != 127.0 or d.k <= _quantized.MAX_TERMS,
        ),
    ),
    lower=_lower,
    error=ErrorModel(_error),
    flops=lambda d, s: 2 * d.rows * d.n * d.k,
    laws=("row_independent", "deterministic"),
    saves={
        overload: ("x", "packed", "scales", "zeros", "global_scale", "bias", *extra)
        for overload, extra in (("default", ()), ("preactivation", ("preactivation",)))
    },
    backward=_gradient,
    grad_overload=product.GRAD_OVERLOAD,
    autocast="lower",
    vmap_scalars=lambda values: {},
    door=door,
    complete=complete,
    cases=(
        _case("tiny", "smoke bench", 16, 64, 64, "int4", 32),
        _case("odd_tails", "smoke bench", 37, 131, 129, "int8_dynamic", -1),
        *(
            _case(f"{name}_{scheme}", "bench tune", rows, n, k, scheme, group_size)
            for name, rows, n, k in SHAPES
            for scheme, group_size in BENCHED
        ),
    ),
)
