"""Which backend runs, what is said about it, and that an explicit choice is never left silently."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

import isotile
from isotile import dispatch, fast_path, library, registry
from isotile.backends import BACKENDS

sys.path.insert(0, str(Path(__file__).parent))
from _calls import NAMES, as_tuple, calls


class Refusing:
    """A backend that is preferred for cpu tensors and refuses every call."""

    name = "refusing"

    def serves(self, device_type):
        return True

    def unavailable(self, device_type):
        return None

    def refuses(self, request):
        return f"will not do {request.lowered.kernel}"

    def prepare(self, request):
        raise AssertionError("never prepared")

    def dtypes(self, kernel):
        return ()

    def info(self):
        return {}


@pytest.fixture
def refusing(monkeypatch):
    order = {"refusing": Refusing(), **BACKENDS}
    monkeypatch.setattr(sys.modules["isotile.backends"], "BACKENDS", order)
    monkeypatch.setattr(dispatch, "_warned", set())
    library.operator("softmax").plans.clear()
    yield
    library.operator("softmax").plans.clear()


def run(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, timeout=300
    )


def test_the_cpu_backend_serves_cpu_tensors():
    x = torch.randn(3, 8)
    explanation = isotile.explain("layer_norm", x, 8)
    assert explanation.backend == "cpu"
    assert explanation.reasons["cpu"] is None
    assert explanation.reasons["triton"]
    assert "layer_norm" in str(explanation) and "triton" in str(explanation)


def test_explain_takes_public_arguments_of_attention():
    q = torch.randn(1, 2, 4, 8)
    assert isotile.explain("attention", q, q, q, window=(3, None), is_causal=True).backend == "cpu"


def test_explicit_backend_never_falls_back(refusing):
    x = torch.randn(3, 8)
    with isotile.use_backend("refusing"), pytest.raises(isotile.BackendError, match="will not do softmax"):
        isotile.softmax(x, 0)


def test_fallback_is_said_once_for_each_reason(refusing):
    x = torch.randn(3, 8)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        isotile.softmax(x, 0)
        isotile.softmax(x, 0)
        isotile.softmax(x[:2], 0)
    assert [w.category for w in said] == [isotile.FallbackWarning]
    assert "will not do softmax" in str(said[0].message)


def test_use_backend_is_a_decorator_and_nests():
    seen = []

    @isotile.use_backend("reference")
    def inner():
        seen.append(isotile.explain("softmax", torch.randn(3)).backend)
        with isotile.use_backend("cpu"):
            seen.append(isotile.explain("softmax", torch.randn(3)).backend)
        seen.append(isotile.explain("softmax", torch.randn(3)).backend)

    inner()
    seen.append(isotile.explain("softmax", torch.randn(3)).backend)
    assert seen == ["reference", "cpu", "reference", "cpu"]


def test_a_choice_does_not_leak_into_other_threads():
    seen = []
    with isotile.use_backend("reference"):
        thread = threading.Thread(target=lambda: seen.append(isotile.explain("softmax", torch.randn(3)).backend))
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"wanted one of .*'cpu'.*got 'tpu'"), isotile.use_backend("tpu"):
        pass


def test_environment_chooses_the_backend():
    found = run(
        "import isotile, torch; print(isotile.explain('softmax', torch.ones(3)).backend)", ISOTILE_BACKEND="reference"
    )
    assert found.stdout.strip() == "reference", found.stderr


def test_environment_with_an_unknown_backend_says_so():
    found = run("import isotile, torch; isotile.softmax(torch.ones(3))", ISOTILE_BACKEND="tpu")
    assert found.returncode != 0
    assert "ISOTILE_BACKEND" in found.stderr and "tpu" in found.stderr


def test_environment_forces_the_instruction_set():
    found = run(
        "import isotile; print([b['instruction_set'] for b in isotile.backends() if b['name'] == 'cpu'])",
        ISOTILE_CPU_ISA="scalar",
    )
    assert found.stdout.strip() == "['scalar']", found.stderr
    wrong = run("import isotile, torch; isotile.softmax(torch.ones(3))", ISOTILE_CPU_ISA="avx1024")
    assert wrong.returncode != 0 and "ISOTILE_CPU_ISA" in wrong.stderr


def test_import_loads_no_kernel_language():
    found = run(
        "import isotile, sys, json; print(json.dumps([m for m in ('triton', 'nki', 'neuronxcc') if m in sys.modules]))"
    )
    assert json.loads(found.stdout) == [], found.stderr


def test_plans_are_made_once_for_a_signature():
    operator = library.operator("softmax")
    operator.plans.clear()
    for _ in range(3):
        isotile.softmax(torch.randn(4, 9))
    assert len(operator.plans) == 1
    isotile.softmax(torch.randn(9, 4).T)
    assert len(operator.plans) == 2


@pytest.mark.parametrize("grad", (False, True), ids=("plain", "grad"))
@pytest.mark.parametrize("name", NAMES)
def test_short_way_gives_what_the_long_way_gives(name, grad, monkeypatch):
    function, tensors = calls(grad=grad)[name]
    # The same shapes in another layout: a plan that is not theirs reads the wrong places.
    turned = [t.detach().mT.contiguous().mT.requires_grad_(grad) if t.ndim > 1 else t for t in tensors]
    long_ways = []
    route = library.Operator.route
    monkeypatch.setattr(library.Operator, "route", lambda *a: (long_ways.append(a[0].spec.name), route(*a))[1])

    def everything(given):
        results = as_tuple(function(*given))
        grads = torch.autograd.grad(results, given, [torch.ones_like(r) for r in results]) if grad else ()
        return (*results, *grads)

    for op in registry.specs():
        library.operator(op).plans.clear()
    first = everything(tensors)
    assert long_ways
    for given in (tensors, turned, turned):
        long_ways.clear()
        again = everything(given)
        torch.testing.assert_close(again, first, rtol=1e-5, atol=1e-5)
        assert all(a.requires_grad == f.requires_grad for a, f in zip(again, first, strict=True))
    assert not long_ways


def test_short_way_with_a_gradient_for_an_optional_argument():
    x, weight = torch.randn(3, 8), torch.ones(8, requires_grad=True)
    for _ in range(2):
        assert isotile.layer_norm(x, 8, weight).requires_grad


@pytest.mark.parametrize("by", ["table", "attributes", "python"])
def test_signatures_differ_where_a_plan_would(by, request):
    """By PyTorch's table, by attributes for tensors that the table does not know, and without the extension module."""
    signature = fast_path.read_signature if by == "python" else fast_path.signature_function()
    if by == "attributes" and signature is not fast_path.read_signature:
        from isotile import _C

        request.addfinalizer(fast_path.signature_function)
        _C.set_signature(None, fast_path.PLAIN, torch.Tensor.is_neg, fast_path.MODES, fast_path.describe)
    x = torch.zeros(4, 6)
    others = [x.mT, x[:, :3], x[::2], x.half(), x.bfloat16(), x.int(), x.to("meta"), x[0], x[0, 0], x.view(6, 4)]
    assert signature(x) == signature(torch.ones(4, 6)) == signature(torch.nn.Parameter(x))
    signatures = [signature(t, *more) for t in [x, *others] for more in ((), (None,), (x,), (x.mT,))]
    assert len(set(signatures)) == len(signatures)
    assert hash(signature(*[x[None, None]] * 15)) == hash(signature(*[x[None, None]] * 15))  # a long one

    class Subclass(torch.Tensor):
        pass

    for odd in (x.as_subclass(Subclass), torch._neg_view(x), 3, "x"):
        assert signature(odd) is None and signature(x, odd) is None
    with torch.autocast("cpu"):
        assert signature(x) is None


def test_plans_do_not_grow_without_bound(monkeypatch):
    monkeypatch.setattr(dispatch, "MAX_PLANS", 8)
    operator = library.operator("softmax")
    operator.plans.clear()
    for n in range(1, 40):
        isotile.softmax(torch.randn(n))
    assert len(operator.plans) <= 8


def test_out_is_filled_in_place():
    x, out = torch.randn(3, 8), torch.empty(8, 3).T
    assert isotile.softmax(x, out=out) is out
    torch.testing.assert_close(out, torch.softmax(x, -1))
    y, s = torch.empty(3, 8), torch.empty(3, 8)
    got = isotile.layer_norm(x, 8, residual=x, out=(y, s))
    assert got[0] is y and got[1] is s
    torch.testing.assert_close(s, 2 * x)


def test_autograd_notices_that_out_was_written():
    x, w = torch.randn(3, 8, requires_grad=True), torch.randn(8, 4)
    y = isotile.matmul(x, w)
    with torch.no_grad():
        isotile.softmax(torch.randn(8, 4), out=w)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_negative_and_lazy_views_are_handled():
    x = torch.view_as_complex(torch.randn(4, 8, 2)).conj().imag  # negation is pending on this view
    assert x.is_neg()
    torch.testing.assert_close(isotile.softmax(x), torch.softmax(x, -1))


def test_a_tensor_without_memory_is_refused():
    zeros = torch._efficientzerotensor(4, 8)
    with (
        isotile.use_backend("cpu"),
        pytest.raises(RuntimeError, match=r"tensor 0 of this plan has no memory.*clone\(\)"),
    ):
        isotile.softmax(zeros)
