"""Runs an operator's kernels on tensors through supports, prepare and plain launches. Outputs are poisoned with NaN."""

import torch
from _load import backend, kernel

launch = backend("triton_launch")


def run(op, inputs, outputs, config=None, **scalars):
    """`inputs` by name (None if absent); `outputs` by name, preallocated (None if not wanted). Returns outputs."""
    module = kernel(op)
    tensors = {**inputs, **outputs}
    views = {name: launch.View.of(t) for name, t in tensors.items()}
    reason = module.supports(**views, **scalars)
    if reason is not None:
        raise NotImplementedError(reason)
    before = {name: t.clone() for name, t in inputs.items() if t is not None}
    launches = module.prepare(**views, **scalars, config=config)
    launch.run_plain(launches, {id(views[name]): t for name, t in tensors.items() if t is not None})
    for name, t in before.items():
        assert torch.equal(t.nan_to_num(12345.0), inputs[name].nan_to_num(12345.0)), f"{op} changed its input {name}"
    return outputs


def poisoned(shape, dtype=torch.float32):
    return torch.full(tuple(shape), float("nan"), dtype=dtype)


def close(got, want, dtype, scale=None, factor=1.0, what=""):
    """got against the float64 truth: a few units of the result's type, and of the accumulator at the data's scale."""
    unit = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    want = want.double()
    got = got.double()
    assert got.shape == want.shape, (got.shape, want.shape)
    assert torch.equal(got.isnan(), want.isnan()), f"{what}: NaN in other places"
    finite = want.isfinite()
    assert torch.equal(torch.where(finite, 0.0, got).nan_to_num(7.0), torch.where(finite, 0.0, want).nan_to_num(7.0)), (
        f"{what}: infinity in other places"
    )
    if scale is None:
        scale = want[finite].abs().max() if finite.any() else 1.0
    bound = factor * (2 * unit * want.abs() + 16 * 2.0**-23 * scale + 1e-30)
    excess = ((got - want).abs() / bound)[finite]
    worst = excess.max().item() if excess.numel() else 0.0
    assert worst <= 1, f"{what}: {worst:.2f} times the bound"
