"""y = s * rsqrt(mean(s^2) + eps) * (weight + weight_offset), s = x + residual; kernels and notes in _norm.py."""

from . import _norm


def supports(x, weight=None, residual=None, y=None, sum=None, *, eps=1e-6, weight_offset=0.0):
    return _norm.supports(x, {"weight": weight, "residual": residual, "y": y, "sum": sum})


def problem(x, **others):
    return _norm.forward_problem(x)


candidates = _norm.forward_candidates


def prepare(x, weight=None, residual=None, y=None, sum=None, *, eps=1e-6, weight_offset=0.0, config=None):
    return _norm.forward(False, x, weight, None, residual, y, sum, float(eps), float(weight_offset), config)
