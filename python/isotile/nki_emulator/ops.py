"""Operation tokens (`nl.add`, `nl.exp`, ...) and the float32 mathematics behind them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

F32 = np.float32


class Op:
    """An `nl` name that is both an operation token for `nisa` calls and a function on tiles."""

    def __init__(self, name: str):
        self.name = name
        self.__name__ = name
        self.function: Callable[..., Any] | None = None  # set by `language`

    def __call__(self, *args, **kwargs):
        if self.function is None:
            raise TypeError(f"nl.{self.name} is only an operation token, not a function")
        return self.function(*args, **kwargs)

    def __repr__(self):
        return f"nl.{self.name}"


def _truth(f):
    return lambda a, b: f(a != 0, b != 0).astype(F32)


def _compare(f):
    return lambda a, b: f(a, b).astype(F32)


BINARY: dict[str, Callable[..., Any]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": _compare(np.equal),
    "not_equal": _compare(np.not_equal),
    "greater_equal": _compare(np.greater_equal),
    "greater": _compare(np.greater),
    "less_equal": _compare(np.less_equal),
    "less": _compare(np.less),
    "logical_and": _truth(np.logical_and),
    "logical_or": _truth(np.logical_or),
    "logical_xor": _truth(np.logical_xor),
    "power": np.power,
    "abs_max": lambda a, b: np.where(np.abs(a) >= np.abs(b), a, b),
    "abs_min": lambda a, b: np.where(np.abs(a) <= np.abs(b), a, b),
}
UNARY: dict[str, Callable[..., Any]] = {
    "abs": np.abs,
    "square": np.square,
    "relu": lambda x: np.maximum(x, F32(0)),
    "rsqrt": lambda x: (1.0 / np.sqrt(x.astype(np.float64))).astype(F32),
    "reciprocal": lambda x: F32(1) / x,
}
BITVEC = ("bitwise_and", "bitwise_or", "bitwise_xor", "left_shift", "right_shift", "invert")
REDUCTIONS = (
    "add",
    "subtract",
    "multiply",
    "maximum",
    "minimum",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
)
COMPARISONS = ("equal", "not_equal", "greater_equal", "greater", "less_equal", "less")
# The pages write nl.max/nl.min where kernels pass nl.maximum/nl.minimum; both name the same reduction.
REDUCE_ALIASES = {"max": "maximum", "min": "minimum", "amax": "maximum", "amin": "minimum", "sum": "add"}


def bitwise(name: str, a: np.ndarray, b, bits: int) -> np.ndarray:
    """Raw-bit operation on unsigned arrays; both shifts are logical and empty at the width."""
    if name == "bitwise_and":
        return a & b
    if name == "bitwise_or":
        return a | b
    if name == "bitwise_xor":
        return a ^ b
    if name == "invert":
        return ~a
    count = np.asarray(b).astype(np.uint64)
    shifted = (np.left_shift if name == "left_shift" else np.right_shift)(a.astype(np.uint64), np.minimum(count, 63))
    return np.where(count >= bits, 0, shifted & np.uint64((1 << bits) - 1)).astype(a.dtype)


def reduce_free(name: str, values: np.ndarray) -> np.ndarray:
    """Reduce the last axis of a float32 array."""
    if name == "add":
        return values.sum(axis=-1, dtype=F32)
    if name == "multiply":
        return values.prod(axis=-1, dtype=F32)
    if name == "maximum":
        return values.max(axis=-1)
    if name == "minimum":
        return values.min(axis=-1)
    if name == "subtract":
        return values[..., 0] - values[..., 1:].sum(axis=-1, dtype=F32)
    if name == "logical_and":
        return (values != 0).all(axis=-1).astype(F32)
    if name == "logical_or":
        return (values != 0).any(axis=-1).astype(F32)
    if name == "logical_xor":
        return ((values != 0).sum(axis=-1) % 2).astype(F32)
    if name in ("abs_max", "abs_min"):
        pick = np.abs(values).argmax(-1) if name == "abs_max" else np.abs(values).argmin(-1)
        return np.take_along_axis(values, pick[..., None], -1)[..., 0]
    raise KeyError(name)


IDENTITY = {
    "add": 0.0,
    "subtract": 0.0,
    "multiply": 1.0,
    "maximum": -np.inf,
    "minimum": np.inf,
    "abs_max": 0.0,
    "abs_min": np.inf,
}

# Error function by W. J. Cody, "Rational Chebyshev approximations for the error function", Math. Comp. 23 (1969).
_A = (
    3.16112374387056560e00,
    1.13864154151050156e02,
    3.77485237685302021e02,
    3.20937758913846947e03,
    1.85777706184603153e-1,
)
_B = (2.36012909523441209e01, 2.44024637934444173e02, 1.28261652607737228e03, 2.84423683343917062e03)
_C = (
    5.64188496988670089e-1,
    8.88314979438837594e00,
    6.61191906371416295e01,
    2.98635138197400131e02,
    8.81952221241769090e02,
    1.71204761263407058e03,
    2.05107837782607147e03,
    1.23033935479799725e03,
    2.15311535474403846e-8,
)
_D = (
    1.57449261107098347e01,
    1.17693950891312499e02,
    5.37181101862009858e02,
    1.62138957456669019e03,
    3.29079923573345963e03,
    4.36261909014324716e03,
    3.43936767414372164e03,
    1.23033935480374942e03,
)
_P = (
    3.05326634961232344e-1,
    3.60344899949804439e-1,
    1.25781726111229246e-1,
    1.60837851487422766e-2,
    6.58749161529837803e-4,
    1.63153871373020978e-2,
)
_Q = (
    2.56852019228982242e00,
    1.87295284992346725e00,
    5.27905102951428412e-1,
    6.05183413124413191e-2,
    2.33520497626869185e-3,
)


def erfc(x):
    """Complementary error function, float64, relative accuracy near 1e-16 in both tails."""
    x = np.asarray(x, np.float64)
    y = np.abs(x)
    z = np.where(y <= 0.46875, y * y, 0.0)
    num, den = _A[4] * z, z
    for i in range(3):
        num, den = (num + _A[i]) * z, (den + _B[i]) * z
    small = 1.0 - x * (num + _A[3]) / (den + _B[3])
    w = np.clip(y, 0.46875, 4.0)
    num, den = _C[8] * w, w
    for i in range(7):
        num, den = (num + _C[i]) * w, (den + _D[i]) * w
    middle = np.exp(-w * w) * (num + _C[7]) / (den + _D[7])
    v = np.clip(y, 4.0, 30.0)
    z = 1.0 / (v * v)
    num, den = _P[5] * z, z
    for i in range(4):
        num, den = (num + _P[i]) * z, (den + _Q[i]) * z
    large = np.exp(-v * v) * (0.56418958354775628695 - z * (num + _P[4]) / (den + _Q[4])) / v
    tail = np.where(y <= 4.0, middle, large)
    return np.where(np.isnan(x), np.nan, np.where(y <= 0.46875, small, np.where(x < 0, 2.0 - tail, tail)))


def erf(x):
    x = np.asarray(x, np.float64)
    z = np.where(np.abs(x) <= 0.46875, x * x, 0.0)
    num, den = _A[4] * z, z
    for i in range(3):
        num, den = (num + _A[i]) * z, (den + _B[i]) * z
    return np.where(np.abs(x) <= 0.46875, x * (num + _A[3]) / (den + _B[3]), 1.0 - erfc(x))


def _f64(f):
    return lambda x: f(x.astype(np.float64)).astype(F32)


def _sigmoid(x):
    e = np.exp(-np.abs(x))
    return np.where(x >= 0, 1.0 / (1.0 + e), e / (1.0 + e))


def _phi(x):
    return 0.5 * erfc(-x * np.sqrt(0.5))


def _gelu_dx(x):
    return _phi(x) + np.where(np.isinf(x), 0.0, x * np.exp(-0.5 * x * x) / np.sqrt(2 * np.pi))


def _gelu_tanh(x):
    return x * 0.5 * (1.0 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def _sigmoid_dx(x, k):
    s = _sigmoid(k * x)
    return s + np.where(np.isinf(x), 0.0, k * x * s * (1.0 - s))


def _softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


def _sin(x):
    """The engine's sine: exact in [-pi, pi], the cubic around +-pi outside (no range reduction)."""
    d = np.abs(x) - np.pi
    return np.where(np.abs(x) <= np.pi, np.sin(x), np.sign(x) * (d**3 / 6 - d))


ACTIVATION = {
    "copy": lambda x: x,
    "square": np.square,
    "sigmoid": _f64(_sigmoid),
    "relu": lambda x: np.maximum(x, F32(0)),
    "prelu": None,  # takes relu_param
    "gelu": _f64(lambda x: x * _phi(x)),
    "gelu_dx": _f64(_gelu_dx),
    "gelu_apprx_tanh": _f64(_gelu_tanh),
    "gelu_apprx_sigmoid": _f64(lambda x: x * _sigmoid(1.702 * x)),
    "gelu_apprx_sigmoid_dx": _f64(lambda x: _sigmoid_dx(x, 1.702)),
    "silu": _f64(lambda x: x * _sigmoid(x)),
    "silu_dx": _f64(lambda x: _sigmoid_dx(x, 1.0)),
    "tanh": np.tanh,
    "softplus": _f64(_softplus),
    "mish": _f64(lambda x: x * np.tanh(_softplus(x))),
    "erf": _f64(erf),
    "erf_dx": _f64(lambda x: 2 / np.sqrt(np.pi) * np.exp(-x * x)),
    "exp": np.exp,
    "sign": np.sign,
    "abs": np.abs,
    "log": np.log,
    "sin": _f64(_sin),
    "arctan": np.arctan,
    "sqrt": np.sqrt,
    "rsqrt": UNARY["rsqrt"],
    "reciprocal": UNARY["reciprocal"],
}

NAMES = sorted({*BINARY, *UNARY, *BITVEC, *ACTIVATION, "bypass"})
TOKENS = {name: Op(name) for name in NAMES}


def op_name(op) -> str:
    """The name of an operation token; NumPy ufuncs of the same name are taken too."""
    if isinstance(op, Op):
        return op.name
    name = getattr(op, "__name__", None)
    if isinstance(op, np.ufunc) and name in TOKENS:
        return name
    if callable(op) and name in (*TOKENS, *REDUCE_ALIASES, "mean"):
        return name
    raise TypeError(f"{op!r} is not an nl operation")
