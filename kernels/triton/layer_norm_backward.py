"""Gradients of layer_norm with the statistics taken again from x; kernels and notes in _norm.py."""

from . import _norm


def supports(grad, grad_sum=None, x=None, weight=None, grad_x=None, grad_weight=None, grad_bias=None, *, eps=1e-5):
    return _norm.supports(
        x,
        {
            "grad": grad,
            "grad_sum": grad_sum,
            "weight": weight,
            "grad_x": grad_x,
            "grad_weight": grad_weight,
            "grad_bias": grad_bias,
        },
    )


def problem(x, **others):
    return _norm.backward_problem(x)


candidates = _norm.backward_candidates


def prepare(
    grad, grad_sum=None, x=None, weight=None, grad_x=None, grad_weight=None, grad_bias=None, *, eps=1e-5, config=None
):
    return _norm.backward(True, grad, grad_sum, x, weight, grad_x, grad_weight, grad_bias, float(eps), 0.0, config)
