"""grad_a = grad @ b[g]^T by rows, grad_b[g] = a^T @ grad over the rows of g; kernels and notes in _grouped.py."""

from . import _grouped
from ._layout import refuse_dtypes


def supports(grad, a=None, b=None, offsets=None, grad_a=None, grad_b=None, *, allow_tf32=False):
    if grad.shape[0] >= 2**31 - 2**16:
        return "more than 2**31 rows"
    return refuse_dtypes({"grad": grad, "a": a, "b": b, "grad_a": grad_a, "grad_b": grad_b})


def problem(grad, a=None, b=None, offsets=None, grad_a=None, grad_b=None, *, allow_tf32=False):
    return _grouped.problem(grad.shape[0], b.shape[0], b.shape[2], b.shape[1], grad.dtype, allow_tf32)


candidates = _grouped.candidates


def prepare(grad, a, b, offsets, grad_a=None, grad_b=None, *, allow_tf32=False, config=None):
    launches = []
    if grad_a is not None and grad_a.numel():
        transposed = (b.strides[0], b.strides[2], b.strides[1])
        launches.append(
            _grouped.rows_launch(
                grad, b, transposed, offsets, grad_a, grad_a.shape[1], grad.shape[1], allow_tf32, config
            )
        )
    if grad_b is not None and grad_b.numel():
        launches.append(_grouped.weights_launch(a, grad, offsets, grad_b, allow_tf32, config))
    return launches
