"""y = x * rsqrt(mean(x^2) + eps) * (weight + weight_offset) over the last dim; with a residual, of the rounded sum.

Kernel and its traffic: `_norm.py`.
"""

from . import _norm


def supports(x, weight=None, residual=None, **rest):
    return _norm.supports_forward(x, weight, None, residual)


def run(x, weight=None, residual=None, *, eps, weight_offset=0.0, outs=None, cores=1):
    return _norm.run_forward(
        x, weight, None, residual, eps=eps, weight_offset=weight_offset, centred=False, cores=cores
    )
