"""The gradients of rms_norm; statistics are taken again from x. Kernel: `_norm.py`."""

from . import _norm


def supports(grad, grad_sum=None, x=None, weight=None, **rest):
    return _norm.supports_backward(grad, grad_sum, x, weight)


def run(grad, grad_sum=None, x=None, weight=None, *, eps, weight_offset=0.0, outs, cores=1):
    """`outs`: dtype names of the wanted results, None for the others."""
    return _norm.run_backward(
        grad, grad_sum, x, weight, eps=eps, weight_offset=weight_offset, centred=False, wanted=outs, cores=cores
    )
