"""grad_x = grad @ weight with a quantised weight.

quantized_linear.py gives the weight's numbers, rounded once to grad's dtype, through HBM; the product is
matmul.py's. Where grad is float16, which may not hold what scales give, both are float32.
"""

from ._arrays import as_float32, dense, dtype_name, refuse_dtypes, refuse_empty, rows, viewed
from .matmul import matmul_kernel
from .quantized_linear import FORMATS, numbers_of, unpack_kernel


def supports(grad, packed, scales, zeros=None, global_scale=None, **rest):
    given = {"grad": grad, "grad_x": (rest.get("outs") or {}).get("grad_x")}
    return refuse_dtypes(given) or refuse_empty({"grad": grad, "packed": packed})


def run(grad, packed, scales, zeros=None, global_scale=None, *, scheme, group_size, k, outs, cores=1):
    """`outs`: {"grad_x": dtype name}."""
    element, bits, _, _ = FORMATS[int(scheme)]
    n, k = packed.shape[0], int(k)
    numbers, offsets, zero_kind = numbers_of(scales, zeros, global_scale, scheme)
    codes = dense(packed)
    if bits == 8:
        codes = viewed(codes, element)
    left = rows(grad)
    if dtype_name(grad) == "float16":
        left = as_float32(left)
    weight = unpack_kernel[cores](
        codes, dense(numbers), dense(offsets), k, max(0, int(group_size)), bits, element, True, zero_kind,
        dtype_name(left),
    )  # fmt: skip
    result = matmul_kernel[cores](
        left.reshape((1, *left.shape)), weight.reshape((1, n, k)), None, None, True, False, 0, outs["grad_x"], False,
        False, False,
    )  # fmt: skip
    return {"grad_x": result.reshape((*grad.shape[:-1], k))}
