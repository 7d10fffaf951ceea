"""grad_a = grad @ b[g].T and grad_b[g] = a_g.T @ grad_g for each group's rows. Kernels: `_grouped.py`."""

from ._arrays import dense, refuse_dtypes, refuse_empty
from ._grouped import grouped_kernel, grouped_weight_kernel
from .grouped_matmul import NEEDS_VALUES  # noqa: F401


def supports(grad, a, b, offsets, **rest):
    given = {"grad": grad, "a": a, "b": b}
    return refuse_dtypes(given) or refuse_empty({**given, "offsets": offsets})


def run(grad, a, b, offsets, *, outs, cores=1):
    """`outs`: dtype names of grad_a and grad_b, None for what is not wanted."""
    ends = dense(offsets).reshape(1, offsets.shape[0])
    results = {}
    if outs.get("grad_a"):
        results["grad_a"] = grouped_kernel[cores](dense(grad), dense(b), ends, True, outs["grad_a"])
    if outs.get("grad_b"):
        results["grad_b"] = grouped_weight_kernel[cores](dense(grad), dense(a), ends, b.shape[0], outs["grad_b"])
    return results
