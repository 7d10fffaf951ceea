"""y = (x - mean) * rsqrt(var + eps) * weight + bias over the last dim; with a residual, of the rounded sum.

Kernel and its traffic: `_norm.py`.
"""

from . import _norm


def supports(x, weight=None, bias=None, residual=None, **rest):
    return _norm.supports_forward(x, weight, bias, residual)


def run(x, weight=None, bias=None, residual=None, *, eps, outs=None, cores=1):
    return _norm.run_forward(x, weight, bias, residual, eps=eps, weight_offset=0.0, centred=True, cores=cores)
