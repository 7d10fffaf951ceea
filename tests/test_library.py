"""The torch ops: opcheck, compile, export, functorch, autocast, fake tensors, on every backend that runs here."""

from __future__ import annotations

import sys
from pathlib import Path

import hypothesis
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import isotile
from isotile import library, registry
from isotile.testing import build, recipes

sys.path.insert(0, str(Path(__file__).parent))
from _calls import NAMES, as_tuple, calls, randn

BACKENDS = ("cpu", "reference")


def dense_recipes(spec):
    """A few recipes of a spec, always the same, without the empty tensors and gaps that opcheck cannot clone."""
    found = []

    @hypothesis.settings(max_examples=60, derandomize=True, database=None, phases=[hypothesis.Phase.generate])
    @hypothesis.given(recipes(spec, torch.float32, kinds=("normal",)))
    def collect(recipe):
        if 0 in recipe["sizes"].values() or any(0 in t["loop"] for t in recipe["tensors"].values()):
            return
        if any(0 in g for g in recipe["groups"].values()):
            return
        for tensor in recipe["tensors"].values():
            tensor["layout"] = "contiguous"
        found.append(recipe)

    collect()
    assert len(found) >= 4
    return found[:8]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", registry.specs())
def test_opcheck(op, backend):
    spec = registry.spec(op)
    operator = library.operator(op)
    for recipe in dense_recipes(spec):
        call = build(recipe)
        args = [call.values[n] for n in spec.parameters(call.overload)]
        for arg, name in zip(args, spec.parameters(call.overload), strict=True):
            if isinstance(arg, torch.Tensor) and spec.tensors[name].differentiable and arg.is_floating_point():
                arg.requires_grad_()
        with isotile.use_backend(backend):
            torch.library.opcheck(
                operator.torch_ops[call.overload],
                tuple(args),
                test_utils=("test_schema", "test_faketensor", "test_autograd_registration"),
            )


@pytest.mark.parametrize("name", NAMES)
def test_opcheck_aot_dispatch(name):
    function, tensors = calls(grad=True)[name]
    recorded = []

    class Record(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op.namespace == "isotile":
                recorded.append((op, args))
            return op(*args, **(kwargs or {}))

    with Record(), torch.no_grad():
        function(*tensors)
    assert recorded
    for op, args in recorded:
        args = tuple(
            a.detach().clone().requires_grad_(a.is_floating_point()) if isinstance(a, torch.Tensor) else a for a in args
        )
        torch.library.opcheck(op, args, test_utils=("test_aot_dispatch_static", "test_aot_dispatch_dynamic"))


@pytest.mark.parametrize("dynamic", (False, True), ids=("static", "dynamic"))
@pytest.mark.parametrize("name", NAMES)
def test_compile_without_graph_breaks(name, dynamic):
    torch._dynamo.reset()
    function, tensors = calls(grad=True)[name]
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    want = as_tuple(function(*tensors))
    got = as_tuple(compiled(*tensors))
    for w, g in zip(want, got, strict=True):
        torch.testing.assert_close(g, w)

    def weighted(results):
        return sum((r * torch.linspace(0, 1, r.numel()).view(r.shape)).sum() for r in results)

    wanted = torch.autograd.grad(weighted(want), tensors)
    found = torch.autograd.grad(weighted(got), tensors)
    for w, g in zip(wanted, found, strict=True):
        torch.testing.assert_close(g, w)


def test_compile_with_inductor():
    torch._dynamo.reset()
    w1, w2, g = randn(16, 8), randn(8, 16), randn(8)

    def block(x):
        h = isotile.rms_norm(x, 8, g)
        return isotile.linear(isotile.linear(h, w1, activation="silu"), w2, residual=x)

    compiled = torch.compile(block, fullgraph=True, dynamic=True)
    for rows in (3, 5, 9):
        x = randn(rows, 8)
        torch.testing.assert_close(compiled(x), block(x))


@pytest.mark.parametrize("name", NAMES)
def test_export_round_trip(name, tmp_path):
    function, tensors = calls()[name]

    class Module(torch.nn.Module):
        def forward(self, *args):
            return function(*args)

    program = torch.export.export(Module(), tensors)
    path = tmp_path / "program.pt2"
    torch.export.save(program, path)
    loaded = torch.export.load(path).module()
    for got, want in zip(as_tuple(loaded(*tensors)), as_tuple(function(*tensors)), strict=True):
        torch.testing.assert_close(got, want)


def test_export_with_a_dynamic_batch():
    class Module(torch.nn.Module):
        def forward(self, x, w):
            return isotile.softmax(isotile.linear(isotile.layer_norm(x, 8), w), -1)

    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(Module(), (randn(3, 8), randn(5, 8)), dynamic_shapes=({0: batch}, None))
    x, w = randn(11, 8), randn(5, 8)
    torch.testing.assert_close(program.module()(x, w), Module()(x, w))


def test_unbacked_sizes():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def rows_above(x, w):
        kept = x[x[:, 0] > 0]
        return isotile.softmax(isotile.linear(isotile.rms_norm(kept, 8), w), -1)

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        x, w = randn(12, 8), randn(5, 8)
        kept = x[x[:, 0] > 0]
        torch.testing.assert_close(rows_above(x, w), isotile.softmax(isotile.linear(isotile.rms_norm(kept, 8), w), -1))


@pytest.mark.parametrize("name", NAMES)
def test_fake_tensors_have_the_real_metadata(name):
    function, tensors = calls()[name]
    real = as_tuple(function(*tensors))
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = as_tuple(function(*[mode.from_tensor(t) for t in tensors]))
    for r, f in zip(real, fake, strict=True):
        assert (r.shape, r.dtype, r.stride(), r.device) == (f.shape, f.dtype, f.stride(), f.device)


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop(name):
    function, tensors = calls()[name]
    batch = tuple(torch.stack([t, t + 1, t * 0.5]) for t in tensors[:1])
    got = as_tuple(torch.vmap(lambda t: function(t, *tensors[1:]))(*batch))
    rows = [as_tuple(function(t, *tensors[1:])) for t in batch[0]]
    for i, g in enumerate(got):
        torch.testing.assert_close(g, torch.stack([r[i] for r in rows]))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_over_every_argument_and_another_dimension(name):
    function, tensors = calls()[name]
    batch = tuple(torch.stack([t, t * 0.5], dim=-1) for t in tensors)
    got = as_tuple(torch.vmap(function, in_dims=-1)(*batch))
    rows = [as_tuple(function(*[t.select(-1, i) for t in batch])) for i in range(2)]
    for i, g in enumerate(got):
        torch.testing.assert_close(g, torch.stack([r[i] for r in rows]))


@pytest.mark.parametrize("name", NAMES)
def test_torch_func_grad_and_per_sample_gradients(name):
    function, tensors = calls(torch.float64)[name]

    def loss(*args):
        return sum(
            (r * torch.linspace(-1, 1, r.numel(), dtype=r.dtype).view(r.shape)).sum() for r in as_tuple(function(*args))
        )

    argnums = tuple(range(len(tensors)))
    got = torch.func.grad(loss, argnums)(*tensors)
    leaves = [t.clone().requires_grad_() for t in tensors]
    want = torch.autograd.grad(loss(*leaves), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    first = torch.stack([tensors[0], tensors[0] * 0.5])
    each = torch.vmap(torch.func.grad(loss), in_dims=(0, *[None] * (len(tensors) - 1)))(first, *tensors[1:])
    for row, sample in zip(each, first, strict=True):
        torch.testing.assert_close(row, torch.func.grad(loss)(sample, *tensors[1:]))


@pytest.mark.parametrize("name", NAMES)
def test_gradients_and_double_backward(name):
    function, tensors = calls(torch.float64, grad=True)[name]
    small = tuple(t.detach()[..., : max(1, t.shape[-1])].requires_grad_() for t in tensors)
    assert torch.autograd.gradcheck(function, small, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, small, fast_mode=True)


@pytest.mark.parametrize("mode", ("eager", "compiled"))
def test_autocast(mode):
    torch._dynamo.reset()

    def run(x, w, q):
        return isotile.linear(x, w), isotile.matmul(x, w.mT), isotile.attention(q, q, q), isotile.layer_norm(x, 8)

    function = torch.compile(run, fullgraph=True, backend="aot_eager") if mode == "compiled" else run
    x, w, q = randn(4, 8), randn(5, 8), randn(1, 2, 6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lower = function(x, w, q)
        normed = isotile.layer_norm(x.bfloat16(), 8)
    assert [r.dtype for r in lower] == [torch.bfloat16] * 3 + [torch.float32]
    assert normed.dtype == torch.float32
    torch.testing.assert_close(lower[0], isotile.linear(x.bfloat16(), w.bfloat16()))


def test_autocast_with_gradients():
    x, w = randn(4, 8, requires_grad=True), randn(5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = isotile.linear(x, w, activation="gelu")
    y.float().sum().backward()
    assert x.grad.dtype == w.grad.dtype == torch.float32
    assert x.grad.abs().sum() > 0


def test_checkpoint_and_hooks():
    x = randn(4, 8, requires_grad=True)
    w = randn(8, 8, requires_grad=True)
    plain = torch.autograd.grad(isotile.linear(isotile.rms_norm(x, 8), w).sum(), (x, w))
    saved = torch.utils.checkpoint.checkpoint(
        lambda a, b: isotile.linear(isotile.rms_norm(a, 8), b).sum(), x, w, use_reentrant=False
    )
    for g, want in zip(torch.autograd.grad(saved, (x, w)), plain, strict=True):
        torch.testing.assert_close(g, want)


def test_profiler_sees_the_operator():
    x = randn(4, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        isotile.layer_norm(x, 8)
    assert any(event.key == "isotile::layer_norm" for event in profile.key_averages())


def test_registered_for_every_device_type():
    for name in registry.specs():
        for key in library.KERNEL_KEYS:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"isotile::{name}", key)
