"""isotile.nn.Linear with constant_weight: the same bits, never of an old weight, and nothing left behind."""

import copy
import gc
import io
import pickle
import threading
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call, vmap

import isotile
import isotile.nn
from isotile import huge_pages
from isotile.backends import named
from isotile.backends.cpu import extension, panel_step
from isotile.library import call
from isotile.ops import packed_linear

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = tuple(dtype for dtype in FLOATS if panel_step(dtype) is not None)


def layer(k=12, n=5, dtype=torch.float32, **options):
    torch.manual_seed(n)
    return isotile.nn.Linear(k, n, dtype=dtype, constant_weight=True, **options)


def plain(module, x, **options):
    """What the layer gives without its copy."""
    return isotile.linear(x, module.weight, module.bias, activation=module.activation, **options)


def filled(*args, **options):
    module = layer(*args, **options)
    with torch.no_grad():
        module(torch.ones(2, module.in_features, dtype=module.weight.dtype))
    assert module._packed is not None
    return module


def keeps(module, x=None):
    """Whether a call makes or has a copy."""
    module(torch.ones(2, module.in_features, dtype=module.weight.dtype) if x is None else x)
    return module._packed is not None


def same_as_plain(module):
    x = torch.randn(3, module.in_features, dtype=module.weight.dtype)
    with torch.no_grad():
        return torch.equal(module(x), plain(module, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k, n", ((1, 1), (12, 5), (129, 33), (65, 257), (300, 1), (1, 300)))
def test_bits_are_those_of_the_plain_weight(k, n, dtype):
    module = layer(k, n, dtype, activation="gelu")
    for rows in range(21):
        x, residual = torch.randn(rows, k, dtype=dtype), torch.randn(rows, n, dtype=dtype)
        with torch.no_grad():
            assert torch.equal(module(x), plain(module, x))
            assert torch.equal(module(x, residual=residual), plain(module, x, residual=residual))
    assert module._packed.panels.shape == packed_linear.panel_shape(n, k, panel_step(dtype))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n, k", ((64, 8), (130, 7), (5, 1), (0, 4), (3, 0)))
def test_panels(n, k, dtype):
    weight = torch.randn(n, k).to(dtype)
    for step in (1, 2):
        panels = packed_linear.pack(weight.t().contiguous().t(), step)
        assert panels.shape == packed_linear.panel_shape(n, k, step)
        wanted = torch.zeros(panels.shape[0] * 64, panels.shape[1] * step, dtype=dtype)
        wanted[:n, :k] = weight
        for row in range(0, wanted.shape[0], 3):
            for column in range(wanted.shape[1]):
                found = panels[row // 64, column // step, row % 64 * step + column % step]
                assert torch.equal(found, wanted[row, column])


def test_wrong_and_strided_panels():
    weight, x = torch.randn(70, 9), torch.randn(3, 9)
    panels = packed_linear.pack(weight, 1)
    with pytest.raises(ValueError, match=r"isotile\.linear: panels: wanted shape \[2, 9, 64\], got \[1, 9, 64\]"):
        call("packed_linear", x, weight, panels[:1])
    with pytest.raises(ValueError, match=r"wanted shape \[2, 9, 64\] or \[2, 5, 128\], got"):
        call("packed_linear", x.bfloat16(), weight.bfloat16(), panels[:1].bfloat16())
    strided = panels.transpose(0, 2).contiguous().transpose(0, 2)
    found = call("packed_linear", x, weight, strided)[0]
    assert torch.equal(found, isotile.linear(x, weight))


@pytest.mark.parametrize("backend", [f"cpu[{isa}]" for isa, runs in extension()[0].instruction_sets() if runs])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("k, n", ((9, 70), (129, 64), (1100, 200)))
def test_every_instruction_set_reads_panels(k, n, dtype, backend):
    named(backend)
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n)
    options = {"activation": "silu"}
    for rows in (1, 2, 4, 5, 7, 16, 17, 40):
        x, residual = torch.randn(rows, k).to(dtype), torch.randn(rows, n).to(dtype)
        with isotile.use_backend(backend):
            wanted = isotile.linear(x, weight, bias, residual=residual, **options)
            for step in (1, 2)[: 1 + (dtype == torch.bfloat16)]:
                panels = packed_linear.pack(weight, step)
                found = call("packed_linear", x, weight, panels, bias, residual=residual, **options)[0]
                if backend == "cpu[amx]" and dtype.itemsize == 2:  # tiles have an order of their own
                    torch.testing.assert_close(found, wanted)
                else:
                    assert torch.equal(found, wanted), (rows, step)


def test_panels_are_on_huge_pages():
    module = filled(1024, 1024)
    assert module._packed.panels.data_ptr() % (2 << 20) == 0
    assert same_as_plain(module)
    quantized = isotile.quantize(module.weight, "int8")
    assert quantized.packed.numel() == 1 << 20  # too small for one
    assert isotile.quantize(torch.randn(2048, 1024), "int8").packed.data_ptr() % (2 << 20) == 0
    for size in (0, 1, 2 << 20, (2 << 20) + 1, (4 << 20) + 4096):
        tensor = huge_pages.empty((size,), torch.uint8)
        assert tensor.shape == (size,) and tensor.fill_(7).eq(7).all()
        assert tensor.untyped_storage().nbytes() == size  # what torch.save writes


def test_the_copy_is_made_once():
    module = filled()
    panels = module._packed.panels
    x = torch.randn(4, 12)
    with torch.no_grad():
        module(x)
        module(x[:1])
    with torch.inference_mode():
        module(x)
    assert module._packed.panels is panels


def optimizer_step(optimizer, **options):
    def step(module):
        module(torch.ones(2, 12)).sum().backward()
        optimizer([module.weight], lr=0.5, **options).step()

    return step


def step_of_given_gradients(module):
    """A step with nothing of autograd since the call that made the copy."""
    module.weight.grad = torch.ones_like(module.weight)
    torch.optim.SGD([module.weight], lr=0.5, fused=True).step()


def step_that_looks(module):
    """The closure calls the layer before the weight is written."""

    def closure():
        with torch.no_grad():
            module(torch.ones(2, 12))

    module.weight.grad = torch.ones_like(module.weight)
    torch.optim.SGD([module.weight], lr=0.5, fused=True).step(closure)


class Interrupted(torch.optim.Optimizer):
    def step(self):
        self.param_groups[0]["params"][0].data.add_(1)
        raise KeyboardInterrupt


def interrupted_step(module):
    with pytest.raises(KeyboardInterrupt):
        Interrupted([module.weight], {}).step()


def compiled_step(**options):
    def step(module):
        module.weight.grad = torch.ones_like(module.weight)
        torch.compile(torch.optim.SGD([module.weight], lr=0.5, **options).step, backend="aot_eager")()

    return step


@torch.no_grad()
def in_inference_mode(module):
    with torch.inference_mode():
        module.weight.add_(1)


@torch.no_grad()
def in_the_same_memory(module):
    """Another parameter there, written as often as the first was."""
    other = torch.nn.Parameter(module.weight.data, requires_grad=module.weight.requires_grad)
    while other._version < module.weight._version:
        other.add_(1)
    assert other._version == module.weight._version and other.data_ptr() == module.weight.data_ptr()
    module.weight = other


def lay_out_otherwise(module):
    """The same memory, read by columns for rows or back."""
    weight = module.weight
    weight.data = weight.data.as_strided((5, 12), (1, 5) if weight.stride() == (12, 1) else (12, 1))


def set_weight(module, weight):
    module.weight = torch.nn.Parameter(weight, requires_grad=module.weight.requires_grad)


UPDATES = {
    "add_": torch.no_grad()(lambda m: m.weight.add_(1)),
    "copy_": torch.no_grad()(lambda m: m.weight.copy_(torch.randn(5, 12))),
    "one element": torch.no_grad()(lambda m: m.weight[2, 3].fill_(7)),
    "a view of it": torch.no_grad()(lambda m: m.weight.view(-1)[:12].zero_()),
    "detached": lambda m: m.weight.detach().mul_(2),
    "init": lambda m: torch.nn.init.normal_(m.weight),
    "inference mode": in_inference_mode,
    "reset_parameters": lambda m: m.reset_parameters(),
    "load_state_dict": lambda m: m.load_state_dict(torch.nn.Linear(12, 5).state_dict()),
    "load_state_dict, assigned": lambda m: m.load_state_dict(torch.nn.Linear(12, 5).state_dict(), assign=True),
    "another parameter": lambda m: set_weight(m, torch.randn(5, 12)),
    "another parameter in the same memory": in_the_same_memory,
    "another layout": lambda m: set_weight(m, torch.randn(12, 5).t()),
    "another layout of the same memory": lay_out_otherwise,
    "data set": lambda m: setattr(m.weight, "data", torch.randn(5, 12)),
    "double": lambda m: m.double(),
    "half": lambda m: m.half(),
    "half and back": lambda m: m.half().float(),
    "SGD": optimizer_step(torch.optim.SGD),
    "SGD, foreach": optimizer_step(torch.optim.SGD, foreach=True),
    "SGD, fused": optimizer_step(torch.optim.SGD, fused=True),
    "AdamW": optimizer_step(torch.optim.AdamW),
    "AdamW, fused": optimizer_step(torch.optim.AdamW, fused=True),
    "SGD, fused, of given gradients": step_of_given_gradients,
    "SGD, fused, with a closure": step_that_looks,
    "an interrupted step": interrupted_step,
    "SGD, compiled": compiled_step(),
    "SGD, fused, compiled": compiled_step(fused=True),
    "out=": torch.no_grad()(lambda m: isotile.matmul(torch.randn(5, 3), torch.randn(3, 12), out=m.weight)),
}


@pytest.mark.parametrize("update", UPDATES)
def test_every_update_is_noticed(update):
    module = filled()
    x = torch.randn(3, 12)
    with torch.no_grad():
        before = module(x)
    for again in (False, True):
        UPDATES[update](module)
        with torch.no_grad():
            now = module(x.to(module.weight.dtype))
            assert torch.equal(now, plain(module, x.to(module.weight.dtype)))
        assert again or not torch.equal(now, before)


def test_a_new_weight_at_an_old_ones_address_is_noticed():
    """The allocator hands freed memory out again, and every new parameter starts at version 0."""
    module = filled(256, 64)
    for _ in range(20):
        del module.weight
        module.weight = torch.nn.Parameter(torch.randn(64, 256))
        assert same_as_plain(module)
        module.weight.data = torch.empty(0)
        module.weight.data = torch.randn(64, 256)
        assert same_as_plain(module)
        module.half().float()
        assert same_as_plain(module)


def test_swapped_parameters_are_noticed():
    module = filled()
    torch.utils.swap_tensors(module.weight, torch.nn.Parameter(torch.randn(5, 12)))
    assert same_as_plain(module)
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        module.double()
        assert same_as_plain(module)
        module.load_state_dict(torch.nn.Linear(12, 5).double().state_dict())
        assert same_as_plain(module)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def test_a_compiled_update_is_noticed():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def update(weight):
        with torch.no_grad():
            weight.mul_(2)

    module = filled()
    update(module.weight)
    assert same_as_plain(module)
    update(module.weight)
    assert same_as_plain(module)


def test_writes_to_data_are_seen_after_the_switch_is_set_again():
    """The one kind of write that the docstring excludes."""
    module = filled()
    module.weight.data.add_(1)
    assert not same_as_plain(module)
    module.constant_weight = True
    assert same_as_plain(module)


def test_gradients_flow():
    module, x = filled(activation="silu"), torch.randn(4, 12)
    found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
    module(found).square().sum().backward()
    ours, module.weight.grad = module.weight.grad, None
    plain(module, wanted).square().sum().backward()
    assert torch.equal(ours, module.weight.grad)
    assert torch.equal(found.grad, wanted.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_pass_a_frozen_weight(dtype):
    module = layer(33, 17, dtype, activation="gelu").requires_grad_(False)
    with torch.inference_mode():
        assert keeps(module)  # made here, and autograd saves it below
    panels = module._packed.panels
    for rows in (1, 3, 20):
        x = torch.randn(rows, 33, dtype=dtype)
        found, wanted = x.clone().requires_grad_(), x.clone().requires_grad_()
        module(found).square().sum().backward()
        plain(module, wanted).square().sum().backward()
        assert torch.equal(found.grad, wanted.grad)
    assert module._packed.panels is panels


class Subclass(torch.Tensor):
    pass


def test_only_the_weights_of_the_rule_are_copied():
    x = torch.randn(2, 12)
    assert not keeps(layer())  # a gradient is recorded
    with torch.no_grad():
        assert keeps(layer())
        assert keeps(layer(dtype=torch.float64))
        assert not keeps(isotile.nn.Linear(12, 5))
        for dtype in (torch.bfloat16, torch.float16):
            assert keeps(layer(dtype=dtype)) == (dtype in DTYPES)
        shared = layer()
        shared.share_memory()
        assert not keeps(shared)
        with torch.autocast("cpu"):
            assert not keeps(layer())
        with isotile.use_backend("reference"):
            assert not keeps(layer())
        with isotile.use_backend("cpu"):
            assert keeps(layer())
        assert not keeps(layer(), x.as_subclass(Subclass))
        module = layer()
        assert torch.equal(vmap(module)(torch.stack([x, x]))[0], plain(module, x))
        assert module._packed is None
        torch.jit.trace(module, x, check_trace=False)
        assert module._packed is None
    with torch.inference_mode():
        inferring = layer()
        inferring.weight.zero_()
        assert not keeps(inferring)
        inferring.weight.fill_(1)
        assert torch.equal(inferring(x), plain(inferring, x))


def test_fake_weights_leave_nothing():
    with FakeTensorMode(), torch.no_grad():
        module = layer()
        assert not keeps(module)
    real = layer()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        real(mode.from_tensor(torch.ones(2, 12)))
    assert real._packed is None


def test_functional_calls_use_their_own_weight():
    module, x = filled(), torch.randn(3, 12)
    for factor in (2, 3):
        weight = module.weight.detach() * factor
        with torch.no_grad():
            found = functional_call(module, {"weight": weight}, (x,))
        assert torch.equal(found, isotile.linear(x, weight, module.bias).detach())
    assert same_as_plain(module)
    gradient = torch.func.grad(lambda w: functional_call(module, {"weight": w}, (x,)).sum())(module.weight.detach())
    torch.testing.assert_close(gradient, x.sum(0).expand(5, 12))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weight, torch.ones_like(weight))
        assert module._panels(x, dual) is None


def test_parametrized_weights():
    module = filled()
    torch.nn.utils.parametrizations.weight_norm(module)
    assert same_as_plain(module)
    with torch.no_grad():
        module.parametrizations.weight.original1.mul_(2)
    assert same_as_plain(module)
    assert same_as_plain(copy.deepcopy(module))


@pytest.mark.parametrize("empty", (True, False))
def test_compile_and_export(empty):
    module, x = layer() if empty else filled(), torch.randn(3, 12)
    before = module._packed
    wanted = plain(module, x).detach()
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x).detach(), wanted)
            for strict in (True, False):
                exported = torch.export.export(module, (x,), strict=strict)
                torch.testing.assert_close(exported.module()(x).detach(), wanted)
                assert set(exported.state_dict) == {"weight", "bias"} and not exported.constants
    assert module._packed is before
    with torch.no_grad():
        module.weight.mul_(2)
        torch.testing.assert_close(compiled(x), plain(module, x))


def test_inductor_compiles_it():
    module, x = filled(), torch.randn(3, 12)
    with torch.no_grad():
        found = torch.compile(module, fullgraph=True)(x)
        torch.testing.assert_close(found, plain(module, x))


def saved_and_loaded(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", (copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), saved_and_loaded))
def test_duplicates_have_no_copy(duplicate):
    module = filled()
    other = duplicate(module)
    assert other._packed is None and module._packed is not None
    assert other.constant_weight and same_as_plain(other) and other._packed is not None
    with torch.no_grad():
        other.weight.add_(1)
    assert same_as_plain(other) and same_as_plain(module)
    assert len(pickle.dumps(module)) < 1.1 * len(pickle.dumps(layer()))


def test_shallow_copies_and_old_pickles():
    module = filled()
    other = copy.copy(module)
    assert same_as_plain(other)
    old = copy.copy(module)
    del old.__dict__["_constant_weight"], old.__dict__["_packed"]  # as of a layer from before the switch
    assert not old.constant_weight and same_as_plain(old) and repr(old)


def test_the_copy_is_no_part_of_the_state():
    module = filled()
    assert list(module.state_dict()) == ["weight", "bias"]
    assert not list(module.named_buffers()) and len(list(module.parameters())) == 2
    torch.nn.Linear(12, 5).load_state_dict(module.state_dict())
    module.load_state_dict(torch.nn.Linear(12, 5).state_dict())


@pytest.mark.parametrize(
    "free",
    (
        lambda m: setattr(m, "constant_weight", False),
        lambda m: m.double(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("meta"),
    ),
)
def test_the_copy_is_freed(free):
    module = filled()
    panels = weakref.ref(module._packed.panels)
    free(module)
    gc.collect()
    assert module._packed is None and panels() is None


def test_a_weight_that_cannot_be_copied_frees_the_old_ones():
    module = filled()
    shared = torch.randn(5, 12).share_memory_()
    set_weight(module, shared)
    with torch.no_grad():
        assert not keeps(module)


def test_the_switch_is_an_attribute():
    module = isotile.nn.Linear(12, 5)
    assert not module.constant_weight and "constant_weight" not in repr(module)
    module.constant_weight = True
    assert "constant_weight=True" in repr(module)
    with torch.no_grad():
        assert keeps(module)
    module.constant_weight = False
    assert "constant_weight" not in repr(module) and same_as_plain(module) and module._packed is None


def test_two_threads_at_once():
    module, x = layer(64, 64), torch.randn(3, 64)
    wanted = plain(module, x).detach()
    wrong = []

    @torch.no_grad()
    def work():
        for i in range(200):
            if i % 5 == 0:
                module.constant_weight = True  # drops the copy
            if not torch.equal(module(x), wanted):
                wrong.append(i)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_weight_of_none_and_wrong_inputs_raise_as_ever():
    module = filled()
    with pytest.raises(TypeError, match=r"isotile\.linear: x"), torch.no_grad():
        module(None)
    with pytest.raises(ValueError, match=r"isotile\.linear"), torch.no_grad():
        module(torch.randn(2, 13))
