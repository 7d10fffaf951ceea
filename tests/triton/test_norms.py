"""LayerNorm, RMSNorm, softmax kernels through the interpreter against float64, until the property suite covers them."""

import itertools

import pytest
import torch
from _run import close, poisoned, run

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def norm_truth(center, x, weight, bias, residual, eps, offset):
    s = x if residual is None else (x.float() + residual.float()).to(x.dtype)
    d = s.double()
    if center:
        d = d - d.mean(-1, keepdim=True)
    y = d / (d.square().mean(-1, keepdim=True) + eps).sqrt()
    if weight is not None:
        y = y * (weight.double() + offset)
    return (y if bias is None else y + bias.double()), s


def strided(shape, dtype, how):
    if how == "contiguous":
        return torch.randn(shape).to(dtype)
    if how == "transposed":
        return torch.randn(*shape[:-2], shape[-1], shape[-2]).to(dtype).transpose(-1, -2)
    return torch.randn(*shape[:-1], 2 * shape[-1] + 1).to(dtype)[..., 1::2]


CASES = [
    ((5, 33), "contiguous"),
    ((2, 3, 4, 70), "stepped"),
    ((3, 4, 130), "transposed"),
    ((7, 1), "contiguous"),
    ((3, 5000), "contiguous"),
    ((2, 9001), "stepped"),
    ((0, 16), "contiguous"),
    ((4, 0), "contiguous"),
]


@pytest.mark.parametrize("shape,how", CASES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", ("layer_norm", "rms_norm"))
def test_norm_matches_float64(op, dtype, shape, how):
    center = op == "layer_norm"
    n = shape[-1]
    for with_weight, with_residual in itertools.product((False, True), repeat=2):
        x = strided(shape, dtype, how)
        residual = strided(shape, dtype, "contiguous") if with_residual else None
        weight = torch.randn(2 * n)[::2] if with_weight else None
        bias = torch.randn(n).to(dtype) if with_weight and center else None
        outputs = {"y": poisoned(shape, dtype), "sum": poisoned(shape, dtype) if with_residual else None}
        extra = {"bias": bias} if center else {}
        scalars = {"eps": 1e-5} if center else {"eps": 1e-5, "weight_offset": 1.0}
        run(op, {"x": x, "weight": weight, **extra, "residual": residual}, outputs, **scalars)
        want, total = norm_truth(center, x, weight, bias, residual, 1e-5, scalars.get("weight_offset", 0.0))
        close(outputs["y"], want, dtype, what=op)
        if with_residual:
            assert torch.equal(outputs["sum"], total)


@pytest.mark.parametrize("shape,how", [*CASES, ((2, 20000), "contiguous"), ((600, 12), "contiguous")])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("op", ("layer_norm", "rms_norm"))
def test_norm_backward_matches_float64(op, dtype, shape, how):
    center = op == "layer_norm"
    n = shape[-1]
    x = strided(shape, dtype, how)
    grad = strided(shape, dtype, "transposed" if how == "stepped" else how)
    for with_weight, with_sum in ((True, True), (False, False)):
        weight = torch.randn(n).to(dtype) if with_weight else None
        grad_sum = torch.randn(shape).to(dtype) if with_sum else None
        leaf = x.double().requires_grad_()
        w = weight.double().requires_grad_() if with_weight else None
        b = torch.zeros(n, dtype=torch.float64, requires_grad=True)
        offset = 0.0 if center else 0.5
        d = leaf - leaf.mean(-1, keepdim=True) if center else leaf
        y = d / (d.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        y = (y * (w + offset) if with_weight else y) + b
        y.backward(grad.double())
        outputs = {"grad_x": poisoned(shape, dtype), "grad_weight": poisoned((n,), dtype) if with_weight else None}
        if center:
            outputs["grad_bias"] = poisoned((n,), dtype) if with_weight else None
        run(
            op + "_backward",
            {"grad": grad, "grad_sum": grad_sum, "x": x, "weight": weight},
            outputs,
            eps=1e-5,
            **({} if center else {"weight_offset": offset}),
        )
        want = leaf.grad if grad_sum is None else leaf.grad + grad_sum.double()
        # the terms cancel (wholly for n == 1 or constant rows): the error scales with them, not with what is left
        rstd = (d.square().mean(-1, keepdim=True) + 1e-5).rsqrt()
        terms = (rstd * grad.double() * ((w + offset).abs() if with_weight else 1.0)).abs()
        close(outputs["grad_x"], want, dtype, what="grad_x", scale=terms.max() if terms.numel() else 1.0)
        if with_weight:
            close(outputs["grad_weight"], w.grad, dtype, factor=4, what="grad_weight")
            if center:
                close(outputs["grad_bias"], b.grad, dtype, factor=4, what="grad_bias")


@pytest.mark.parametrize("shape,how", CASES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_softmax_matches_float64(dtype, shape, how):
    x = strided(shape, dtype, how) * 4
    if x.numel() > 4:
        x[..., -1, :] = -float("inf")
        x[..., 1, 0] = float("nan")
        x[..., 0, : shape[-1] // 2] = -float("inf")
    y = poisoned(shape, torch.float32)
    run("softmax", {"x": x}, {"y": y})
    want = x.double().softmax(-1)
    close(y, want, torch.float32, what="softmax", factor=4)
    grad = strided(shape, torch.float32, "contiguous")
    y = want.float().to(dtype)
    grad_x = poisoned(shape, dtype)
    run("softmax_backward", {"grad": grad, "y": y}, {"grad_x": grad_x})
    y = y.double()
    grad = grad.double()
    close(grad_x, y * (grad - (y * grad).sum(-1, keepdim=True)), dtype, what="softmax_backward", factor=2)
