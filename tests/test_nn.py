"""The modules of isotile.nn against their namesakes in torch.nn."""

import pytest
import torch

import isotile.nn

PAIRS = [
    (isotile.nn.Linear, torch.nn.Linear, (12, 5), {}),
    (isotile.nn.Linear, torch.nn.Linear, (12, 5), {"bias": False}),
    (isotile.nn.LayerNorm, torch.nn.LayerNorm, (12,), {}),
    (isotile.nn.LayerNorm, torch.nn.LayerNorm, ((3, 12),), {"bias": False}),
    (isotile.nn.LayerNorm, torch.nn.LayerNorm, (12,), {"elementwise_affine": False}),
    (isotile.nn.RMSNorm, torch.nn.RMSNorm, (12,), {"eps": 1e-6}),
    (isotile.nn.RMSNorm, torch.nn.RMSNorm, (12,), {}),
    (isotile.nn.Softmax, torch.nn.Softmax, (-1,), {}),
    (isotile.nn.Softmax, torch.nn.Softmax, (0,), {}),
]


@pytest.mark.parametrize(("ours", "theirs", "args", "kwargs"), PAIRS)
def test_module_loads_its_namesakes_weights_and_agrees(ours, theirs, args, kwargs):
    torch.manual_seed(0)
    a, b = ours(*args, **kwargs).double(), theirs(*args, **kwargs).double()
    a.load_state_dict(b.state_dict())
    b.load_state_dict(a.state_dict())
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    torch.testing.assert_close(a(x), b(x), rtol=1e-12, atol=1e-12)


def test_linear_fuses_activation_and_residual():
    torch.manual_seed(0)
    module = isotile.nn.Linear(12, 5, activation="silu").double()
    x, residual = torch.randn(4, 12, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    expected = torch.nn.functional.silu(torch.nn.functional.linear(x, module.weight, module.bias)) + residual
    torch.testing.assert_close(module(x, residual=residual), expected, rtol=1e-12, atol=1e-12)
    assert "activation='silu'" in repr(module)


@pytest.mark.parametrize("module", [isotile.nn.LayerNorm(12), isotile.nn.RMSNorm(12)])
def test_norm_with_residual_returns_the_sum_too(module):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 4, 12).unbind()
    y, total = module(x, residual=residual)
    torch.testing.assert_close(total, x + residual, rtol=0, atol=0)
    torch.testing.assert_close(y, module(x + residual))


def test_zero_centred_rms_norm_starts_as_the_plain_one():
    torch.manual_seed(0)
    x = torch.randn(4, 12)
    module = isotile.nn.RMSNorm(12, weight_offset=1.0)
    assert torch.equal(module.weight, torch.zeros(12))
    torch.testing.assert_close(module(x), isotile.nn.RMSNorm(12)(x))


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        isotile.nn.LayerNorm(12),
        isotile.nn.Linear(12, 6, activation="gelu"),
        isotile.nn.RMSNorm(6),
        isotile.nn.Softmax(),
    )
    model(torch.randn(4, 12)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
