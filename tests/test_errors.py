"""Wrong calls: the contract's error with the argument, what was wanted and what came; and nothing written."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
import warnings

import pytest
import torch

import isotile
import isotile.nn
from isotile import dispatch, library, registry

OPERATORS = tuple(name for name, spec in registry.specs().items() if not spec.internal)


def t(*shape, dtype=torch.float32, device="cpu"):
    return torch.ones(shape, dtype=dtype, device=device)


def quantized(n, k, scheme="int4"):
    return isotile.quantize(t(n, k), scheme, group_size=32)


OFFSETS = torch.tensor([1, 3], dtype=torch.int32)
#: A right call of each operator; a wrong one changes some of its arguments.
RIGHT = {
    "matmul": {"a": t(3, 4), "b": t(4, 6)},
    "linear": {"x": t(3, 4), "weight": t(6, 4)},
    "quantized_linear": {"x": t(3, 4), "weight": quantized(6, 4)},
    "grouped_matmul": {"a": t(3, 4), "b": t(2, 4, 6), "offsets": OFFSETS},
    "layer_norm": {"x": t(3, 4), "normalized_shape": 4},
    "rms_norm": {"x": t(3, 4), "normalized_shape": 4},
    "softmax": {"x": t(3, 4), "dim": -1},
    "attention": {"query": t(2, 4, 5, 8), "key": t(2, 4, 6, 8), "value": t(2, 4, 6, 7)},
}
half, double, int32, int64 = torch.float16, torch.float64, torch.int32, torch.int64

#: (operator, kind of mistake, changes, error, argument, what was wanted, what was given)
WRONG = [
    ("matmul", "shape", {"b": t(5, 6)}, ValueError, "b", "k = 4 (from a)", "[5, 6]"),
    ("matmul", "shape", {"a": t(2, 3, 4), "b": t(5, 4, 6)}, ValueError, "b", "broadcast with [2]", "[5]"),
    ("matmul", "shape", {"bias": t(5)}, ValueError, "bias", "n = 6 (from b)", "[5]"),
    ("matmul", "shape", {"residual": t(3, 5)}, ValueError, "residual", "broadcasts to [3, 6]", "[3, 5]"),
    ("matmul", "shape", {"b": t(4), "bias": t(3)}, ValueError, "bias", "None, since b is 1-D", "[3]"),
    ("matmul", "rank", {"a": t()}, ValueError, "a", "[..., m?, k]", "[]"),
    ("matmul", "dtype", {"b": t(4, 6, dtype=double)}, TypeError, "b", "float32 (that of a)", "float64"),
    ("matmul", "dtype", {"a": t(3, 4, dtype=int32)}, TypeError, "a", "float32, bfloat16, float16", "int32"),
    ("matmul", "dtype", {"out_dtype": int32}, TypeError, "out_dtype", "float32, bfloat16, float16", "int32"),
    ("matmul", "device", {"b": t(4, 6, device="meta")}, ValueError, "b", "device cpu (that of a)", "meta"),
    ("matmul", "option", {"activation": "mish"}, ValueError, "activation", "'relu', 'gelu'", "'mish'"),
    ("matmul", "type", {"activation": 3}, TypeError, "activation", "a str or None", "3"),
    ("matmul", "type", {"b": [1.0]}, TypeError, "b", "a torch.Tensor", "list"),
    ("matmul", "type", {"b": None}, TypeError, "b", "a torch.Tensor", "None"),
    ("matmul", "type", {"a": t(3, 4).to_sparse()}, TypeError, "a", "a dense tensor", "sparse"),
    ("linear", "shape", {"weight": t(6, 5)}, ValueError, "weight", "k = 4 (from x)", "[6, 5]"),
    ("linear", "shape", {"bias": t(4)}, ValueError, "bias", "n = 6 (from weight)", "[4]"),
    ("linear", "shape", {"residual": t(2, 6)}, ValueError, "residual", "broadcasts to [3, 6]", "[2, 6]"),
    ("linear", "rank", {"weight": t(4)}, ValueError, "weight", "[n, k] (2 dimensions)", "[4]"),
    ("linear", "rank", {"x": t()}, ValueError, "x", "at least 1 dimension", "[]"),
    ("linear", "dtype", {"weight": t(6, 4, dtype=half)}, TypeError, "weight", "float32 (that of x)", "float16"),
    ("linear", "dtype", {"bias": t(6, dtype=int32)}, TypeError, "bias", "float32, bfloat16, float16", "int32"),
    ("linear", "device", {"weight": t(6, 4, device="meta")}, ValueError, "weight", "device cpu (that of x)", "meta"),
    ("linear", "option", {"activation": "swish"}, ValueError, "activation", "'silu'", "'swish'"),
    ("linear", "type", {"bias": 1.0}, TypeError, "bias", "a torch.Tensor or None", "float"),
    ("linear", "type", {"out_dtype": "float32"}, TypeError, "out_dtype", "a torch.dtype or None", "'float32'"),
    ("quantized_linear", "shape", {"weight": quantized(6, 5)}, ValueError, "weight", "k = 4 (from x)", "[6, 5]"),
    ("quantized_linear", "shape", {"bias": t(4)}, ValueError, "bias", "n = 6 (from packed)", "[4]"),
    ("quantized_linear", "shape", {"residual": t(2, 6)}, ValueError, "residual", "broadcasts to [3, 6]", "[2, 6]"),
    ("quantized_linear", "rank", {"x": t()}, ValueError, "x", "at least 1 dimension", "[]"),
    ("quantized_linear", "rank", {"bias": t(1, 6)}, ValueError, "bias", "[n] (1 dimension)", "[1, 6]"),
    ("quantized_linear", "dtype", {"x": t(3, 4, dtype=int32)}, TypeError, "x", "float32, bfloat16", "int32"),
    ("quantized_linear", "dtype", {"out_dtype": int32}, TypeError, "out_dtype", "float32, bfloat16", "int32"),
    ("quantized_linear", "device", {"bias": t(6, device="meta")}, ValueError, "bias", "cpu (that of x)", "meta"),
    ("quantized_linear", "option", {"activation": "swish"}, ValueError, "activation", "'silu'", "'swish'"),
    ("quantized_linear", "type", {"weight": t(6, 4)}, TypeError, "weight", "a QuantizedWeight", "Tensor"),
    ("quantized_linear", "type", {"x": [1.0]}, TypeError, "x", "a torch.Tensor", "list"),
    ("grouped_matmul", "shape", {"b": t(2, 5, 6)}, ValueError, "b", "k = 4 (from a)", "[2, 5, 6]"),
    ("grouped_matmul", "shape", {"b": t(3, 4, 6)}, ValueError, "offsets", "groups = 3 (from b)", "[2]"),
    ("grouped_matmul", "rank", {"b": t(4, 6)}, ValueError, "b", "[groups, k, n] (3 dimensions)", "[4, 6]"),
    ("grouped_matmul", "rank", {"a": t(2, 3, 4)}, ValueError, "a", "[total, k] (2 dimensions)", "[2, 3, 4]"),
    ("grouped_matmul", "dtype", {"offsets": OFFSETS.long()}, TypeError, "offsets", "int32", "int64"),
    ("grouped_matmul", "dtype", {"b": t(2, 4, 6, dtype=half)}, TypeError, "b", "float32 (that of a)", "float16"),
    ("grouped_matmul", "device", {"offsets": t(2, dtype=int32, device="meta")}, ValueError, "offsets", "cpu", "meta"),
    ("grouped_matmul", "option", {"out_dtype": torch.int8}, TypeError, "out_dtype", "float32, bfloat16", "int8"),
    ("grouped_matmul", "type", {"offsets": [1, 3]}, TypeError, "offsets", "a torch.Tensor", "list"),
    ("layer_norm", "shape", {"normalized_shape": 5}, ValueError, "x", "[5] (from normalized_shape)", "[4]"),
    ("layer_norm", "shape", {"weight": t(5)}, ValueError, "weight", "[4] (from normalized_shape)", "[5]"),
    ("layer_norm", "shape", {"bias": t(3)}, ValueError, "bias", "[4] (from normalized_shape)", "[3]"),
    ("layer_norm", "shape", {"residual": t(2, 4)}, ValueError, "residual", "broadcast with [3]", "[2]"),
    ("layer_norm", "rank", {"normalized_shape": (2, 3, 4)}, ValueError, "x", "at least 3 dimensions", "[3, 4]"),
    ("layer_norm", "dtype", {"residual": t(3, 4, dtype=half)}, TypeError, "residual", "(that of x)", "float16"),
    ("layer_norm", "dtype", {"x": t(3, 4, dtype=int64)}, TypeError, "x", "float32, bfloat16, float16", "int64"),
    ("layer_norm", "device", {"weight": t(4, device="meta")}, ValueError, "weight", "cpu (that of x)", "meta"),
    ("layer_norm", "option", {"eps": -1.0}, ValueError, "eps", "at least 0", "-1.0"),
    ("layer_norm", "option", {"eps": math.nan}, ValueError, "eps", "at least 0", "nan"),
    ("layer_norm", "option", {"normalized_shape": ()}, ValueError, "normalized_shape", "at least one size", "()"),
    ("layer_norm", "type", {"normalized_shape": 4.0}, TypeError, "normalized_shape", "an int or a sequence", "4.0"),
    ("layer_norm", "type", {"eps": "small"}, TypeError, "eps", "a number", "'small'"),
    ("rms_norm", "shape", {"normalized_shape": 5}, ValueError, "x", "[5] (from normalized_shape)", "[4]"),
    ("rms_norm", "shape", {"weight": t(5)}, ValueError, "weight", "[4] (from normalized_shape)", "[5]"),
    ("rms_norm", "shape", {"residual": t(4, 4)}, ValueError, "residual", "broadcast with [3]", "[4]"),
    ("rms_norm", "rank", {"x": t()}, ValueError, "x", "at least 1 dimension", "[]"),
    ("rms_norm", "rank", {"weight": t(1, 4)}, ValueError, "weight", "[4] (1 dimension)", "[1, 4]"),
    ("rms_norm", "dtype", {"weight": t(4, dtype=int32)}, TypeError, "weight", "float32, bfloat16", "int32"),
    ("rms_norm", "device", {"weight": t(4, device="meta")}, ValueError, "weight", "cpu (that of x)", "meta"),
    ("rms_norm", "option", {"eps": -1e-6}, ValueError, "eps", "at least 0", "-1e-06"),
    ("rms_norm", "type", {"weight_offset": None}, TypeError, "weight_offset", "a number", "None"),
    ("rms_norm", "type", {"x": "x"}, TypeError, "x", "a torch.Tensor", "str"),
    ("softmax", "shape", {"dim": 2}, ValueError, "dim", "from -2 to 1", "2"),
    ("softmax", "shape", {"dim": -3}, ValueError, "dim", "from -2 to 1", "-3"),
    ("softmax", "rank", {"x": t(), "dim": 1}, ValueError, "dim", "from -1 to 0", "1"),
    ("softmax", "dtype", {"x": t(3, 4, dtype=int32)}, TypeError, "x", "float32, bfloat16, float16", "int32"),
    ("softmax", "dtype", {"dtype": int32}, TypeError, "dtype", "float32, bfloat16, float16", "int32"),
    ("softmax", "type", {"dim": None}, TypeError, "dim", "an int", "None"),
    ("softmax", "type", {"dim": True}, TypeError, "dim", "an int", "True"),
    ("softmax", "type", {"dtype": "half"}, TypeError, "dtype", "a torch.dtype or None", "'half'"),
    ("softmax", "type", {"x": 3.0}, TypeError, "x", "a torch.Tensor", "float"),
    ("attention", "shape", {"key": t(2, 4, 6, 9)}, ValueError, "key", "d = 8 (from query)", "[2, 4, 6, 9]"),
    ("attention", "shape", {"value": t(2, 4, 7, 7)}, ValueError, "value", "sk = 6 (from key)", "[2, 4, 7, 7]"),
    ("attention", "shape", {"key": t(2, 2, 6, 8)}, ValueError, "key", "4 heads (from query; or enable_gqa", "2"),
    (
        "attention", "shape", {"key": t(2, 3, 6, 8), "value": t(2, 3, 6, 7), "enable_gqa": True},
        ValueError, "key", "divides query's 4", "[2, 3, 6, 8]",
    ),
    ("attention", "shape", {"attn_mask": t(3, 6)}, ValueError, "attn_mask", "broadcasts to [2, 4, 5, 6]", "[3, 6]"),
    ("attention", "shape", {"sinks": t(3)}, ValueError, "sinks", "hq = 4 (from query)", "[3]"),
    ("attention", "shape", {"seqlens_k": t(3, dtype=int32)}, ValueError, "seqlens_k", "broadcast with [2]", "[3]"),
    ("attention", "rank", {"alibi_slopes": t(4, 1)}, ValueError, "alibi_slopes", "[hq] (1 dimension)", "[4, 1]"),
    ("attention", "rank", {"query": t(5, 8)}, ValueError, "query", "at least 3 dimensions", "[5, 8]"),
    ("attention", "dtype", {"key": t(2, 4, 6, 8, dtype=double)}, TypeError, "key", "(that of query)", "float64"),
    ("attention", "dtype", {"attn_mask": t(5, 6, dtype=int32)}, TypeError, "attn_mask", "bool, float32", "int32"),
    ("attention", "dtype", {"seqlens_k": t(2, dtype=int64)}, TypeError, "seqlens_k", "int32", "int64"),
    ("attention", "device", {"value": t(2, 4, 6, 7, device="meta")}, ValueError, "value", "cpu (that of query", "meta"),
    ("attention", "option", {"causal_alignment": "left"}, ValueError, "causal_alignment", "'top_left'", "'left'"),
    ("attention", "option", {"dropout_p": 1.0}, ValueError, "dropout_p", "[0, 1)", "1.0"),
    ("attention", "option", {"softcap": 0.0}, ValueError, "softcap", "greater than 0", "0.0"),
    ("attention", "option", {"window": (1, -1)}, ValueError, "window", "at least 0", "(1, -1)"),
    ("attention", "option", {"window": 3}, ValueError, "window", "a pair (left, right)", "3"),
    ("attention", "type", {"window": (1.0, 2)}, TypeError, "window", "ints or None", "(1.0, 2)"),
    ("attention", "type", {"is_causal": 1}, TypeError, "is_causal", "a bool", "1"),
    ("attention", "type", {"return_lse": 1}, TypeError, "return_lse", "a bool", "1"),
    ("attention", "type", {"scale": "auto"}, TypeError, "scale", "a number or None", "'auto'"),
    ("attention", "type", {"seqlens_k": [5, 6]}, TypeError, "seqlens_k", "a torch.Tensor or None", "list"),
]  # fmt: skip


class _ThroughPyTorch(torch.overrides.TorchFunctionMode):
    """A mode that changes nothing, but sends calls through PyTorch's dispatcher."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


WAYS = {"plain": contextlib.nullcontext, "dispatcher": _ThroughPyTorch}


def poisoned_results(op):
    """Results of the right call's shapes, filled with NaN."""
    results = getattr(isotile, op)(**RIGHT[op])
    results = results if isinstance(results, tuple) else (results,)
    return tuple(torch.full_like(r, math.nan) for r in results)


def bits(tensor):
    dense = tensor.detach().clone(memory_format=torch.contiguous_format)
    return dense.view(torch.uint8) if dense.ndim else dense.reshape(1).view(torch.uint8)


def readable(value):
    return isinstance(value, torch.Tensor) and value.device.type == "cpu" and not value.is_sparse


def untouched(tensors, before):
    return all(torch.equal(bits(x), old) for x, old in zip(tensors, before, strict=True))


@contextlib.contextmanager
def refused(op, error, argument, wanted, given):
    with pytest.raises(error) as caught:
        yield
    assert type(caught.value) is error
    pattern = rf"isotile\.{op}: {argument}: wanted .*{re.escape(wanted)}.*got .*{re.escape(given)}"
    assert re.match(pattern, str(caught.value)), str(caught.value)


def name_of(row):
    op, kind, changes, *_ = row
    return f"{op}-{kind}-{'-'.join(changes)}"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("row", WRONG, ids=name_of)
def test_a_wrong_call_is_refused_and_writes_nothing(row, way):
    op, _, changes, error, argument, wanted, given = row
    arguments = {**RIGHT[op], **changes}
    outs = poisoned_results(op)
    if op.endswith("_norm") and "residual" in changes:  # the sum is a result too
        outs = (*outs, outs[0].clone())
    inputs = [v for v in arguments.values() if readable(v)]
    written, read = [bits(o) for o in outs], [bits(v) for v in inputs]
    for extra in ({}, {"out": outs if len(outs) > 1 else outs[0]}):
        with WAYS[way](), refused(op, error, argument, wanted, given):
            getattr(isotile, op)(**arguments, **extra)
    assert untouched(outs, written), "a refused call wrote into out="
    assert untouched(inputs, read), "a refused call wrote into an input"


@pytest.mark.parametrize("row", WRONG, ids=name_of)
def test_a_wrong_call_is_refused_where_a_gradient_is_needed(row):
    op, _, changes, error, argument, wanted, given = row
    arguments = {
        n: v.clone().requires_grad_() if isinstance(v, torch.Tensor) and v.is_floating_point() and n in RIGHT[op] else v
        for n, v in {**RIGHT[op], **changes}.items()
    }
    with refused(op, error, argument, wanted, given):
        getattr(isotile, op)(**arguments)


@pytest.mark.parametrize("row", WRONG, ids=name_of)
def test_explain_refuses_a_wrong_call_alike(row):
    op, _, changes, error, argument, wanted, given = row
    with refused(op, error, argument, wanted, given):
        isotile.explain(op, **{**RIGHT[op], **changes})


@pytest.mark.parametrize("op", OPERATORS)
def test_wrong_calls_of_every_kind_are_listed(op):
    kinds = {kind for name, kind, *_ in WRONG if name == op}
    # softmax has one tensor, so devices can only be mixed with out=, below; and its options are dim and dtype.
    kept = {"softmax": {"device", "option"}}.get(op, set())
    assert kinds >= {"shape", "rank", "dtype", "type", "device", "option"} - kept
    assert sum(name == op for name, *_ in WRONG) >= 5


@pytest.mark.parametrize("op", OPERATORS)
def test_pythons_own_errors_name_the_public_function(op):
    function = getattr(isotile, op)
    with pytest.raises(TypeError, match=rf"^{op}\(\) missing"):
        function()
    with pytest.raises(TypeError, match=rf"^{op}\(\) got an unexpected keyword argument 'colour'"):
        function(**RIGHT[op], colour=3)


def test_the_torch_ops_refuse_alike():
    with refused("matmul", ValueError, "b", "k = 4", "[5, 6]"):
        torch.ops.isotile.matmul(t(3, 4), t(5, 6))
    with refused("softmax", ValueError, "dim", "from -2 to 1", "7"):
        torch.ops.isotile.softmax(t(3, 4), 7)


# --- out= ------------------------------------------------------------------------------------------------------------


def wrong_out(kind, right):
    """A wrong `out=` for a result like `right`: (out, error, wanted, given)."""
    shape = list(right.shape)
    if kind == "shape":
        longer = [*shape[:-1], shape[-1] + 1]
        return right.new_full(longer, math.nan), ValueError, f"shape {shape}", str(longer)
    if kind == "broadcast shape":  # what copy_ would fill
        return right.new_full([2, *shape], math.nan), ValueError, f"shape {shape}", str([2, *shape])
    if kind == "dtype":
        return right.to(torch.bfloat16), TypeError, "dtype float32", "bfloat16"
    if kind == "device":
        return torch.empty(shape, device="meta"), ValueError, "device cpu", "meta"
    if kind == "type":
        return "out", TypeError, "a torch.Tensor", "str"
    if kind == "number":
        return (right, right.clone(), right.clone()), ValueError, "1 tensor (", "3"
    if kind == "no tensor":
        return (), ValueError, "1 tensor (", "0"
    if kind == "expanded":
        return right.new_full(shape[-1:], math.nan).expand(shape), ValueError, "do not overlap", "strides"
    if kind == "overlapping":
        same = right.new_full((64 * math.prod(shape),), math.nan).as_strided(shape, [1] * len(shape))
        return same, ValueError, "do not overlap", "strides"
    raise AssertionError(kind)


KINDS = ("shape", "broadcast shape", "dtype", "device", "type", "number", "no tensor", "expanded", "overlapping")


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", OPERATORS)
def test_a_wrong_out_is_refused_and_nothing_is_written(op, kind, way):
    (right,) = poisoned_results(op)
    out, error, wanted, given = wrong_out(kind, right)
    tensors = [x for x in (out if isinstance(out, tuple) else (out,)) if readable(x)]
    before = [bits(x) for x in tensors]
    with WAYS[way](), refused(op, error, "out", wanted, given):
        getattr(isotile, op)(**RIGHT[op], out=out)
    assert untouched(tensors, before)


@pytest.mark.parametrize("op", OPERATORS)
def test_out_may_not_lie_in_an_input(op):
    (right,) = poisoned_results(op)
    first = next(iter(RIGHT[op]))
    memory = torch.ones(right.numel() + RIGHT[op][first].numel())
    given = memory[: RIGHT[op][first].numel()].view(RIGHT[op][first].shape)
    out = memory[given.numel() - 1 :][: right.numel()].view(right.shape)
    before = bits(memory)
    for _ in range(2):
        with refused(op, ValueError, "out", "memory of its own", "memory of an input"):
            getattr(isotile, op)(**{**RIGHT[op], first: given}, out=out)
        assert torch.equal(bits(memory), before)
        # The same signature without a fault, which is remembered.
        getattr(isotile, op)(**{**RIGHT[op], first: given.clone()}, out=out.clone())


@pytest.mark.parametrize("op", ["layer_norm", "rms_norm"])
def test_two_results_may_not_share_memory(op):
    x, out = t(3, 4), torch.full((3, 4), math.nan)
    with refused(op, ValueError, "out", "memory of its own", "another result"):
        getattr(isotile, op)(x, 4, residual=x, out=(out, out))
    with refused(op, ValueError, "out", "2 tensors (y, sum)", "1"):
        getattr(isotile, op)(x, 4, residual=x, out=out)
    assert out.isnan().all()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPERATORS)
def test_out_is_refused_where_a_gradient_would_be_needed(op, way):
    (out,) = poisoned_results(op)
    first = next(iter(RIGHT[op]))
    arguments = {**RIGHT[op], first: RIGHT[op][first].clone().requires_grad_()}
    with WAYS[way](), refused(op, ValueError, "out", "no gradient to be needed", "requires_grad=True"):
        getattr(isotile, op)(**arguments, out=out)
    assert out.isnan().all()
    with torch.no_grad(), WAYS[way]():
        assert getattr(isotile, op)(**arguments, out=out) is out
    assert not out.isnan().any()


@pytest.mark.parametrize("layout", ["strided", "transposed"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("op", OPERATORS)
def test_a_right_out_of_any_layout_is_filled(op, layout, way):
    want = getattr(isotile, op)(**RIGHT[op])
    if layout == "strided":
        out = want.new_full([2 * s for s in want.shape], math.nan)[tuple(slice(0, None, 2) for _ in want.shape)]
    else:
        out = want.mT.contiguous().mT.fill_(math.nan)
    with WAYS[way]():
        assert getattr(isotile, op)(**RIGHT[op], out=out) is out
    assert torch.equal(out, want)


# --- backends --------------------------------------------------------------------------------------------------------

#: Dimensions that no two of merge: more than the cpu backend's views hold.
CROOKED = torch.ones([2] * 14).permute(11, 0, 9, 2, 13, 7, 4, 5, 12, 6, 3, 8, 1, 10)
CROOKED_CALLS = {
    "softmax": lambda x: isotile.softmax(x),
    "layer_norm": lambda x: isotile.layer_norm(x, 2),
    "rms_norm": lambda x: isotile.rms_norm(x, 2),
}


@pytest.fixture
def fresh(monkeypatch):
    """No warning given yet, and no plan made."""
    monkeypatch.setattr(dispatch, "_warned", set())
    for op in CROOKED_CALLS:
        library.operator(op).plans.clear()


@pytest.mark.parametrize("op", CROOKED_CALLS)
def test_a_chosen_backend_that_refuses_raises_and_writes_nothing(op):
    call = CROOKED_CALLS[op]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", isotile.FallbackWarning)
        call(CROOKED)  # the fallback's plan must not serve the choice
    with isotile.use_backend("cpu"), pytest.raises(isotile.BackendError) as caught:
        call(CROOKED)
    said = str(caught.value)
    assert said.startswith(f"isotile.{op}: backend 'cpu': ") and "at most 12 dimensions" in said
    assert "contiguous" in said, "the message says what would make it work"
    out = torch.full(CROOKED.shape, math.nan)
    with isotile.use_backend("cpu"), pytest.raises(isotile.BackendError):
        getattr(isotile, op)(CROOKED, -1 if op == "softmax" else 2, out=out)
    assert out.isnan().all()


def test_batch_invariance_that_no_backend_promises_is_an_error():
    with isotile.determinism(batch_invariant=True), pytest.raises(isotile.BackendError) as caught:
        isotile.softmax(CROOKED)
    said = str(caught.value)
    assert "no backend can serve" in said and "cpu: " in said and "reference: " in said
    assert "leave determinism(batch_invariant=True)" in said


@pytest.mark.parametrize("name", ["cuda", "CPU", "", None, 3])
def test_an_unknown_backend_is_named(name):
    said = rf"isotile\.use_backend: name: wanted one of .*'cpu'.*, got {re.escape(repr(name))}"
    with pytest.raises(ValueError, match=said), isotile.use_backend(name):
        raise AssertionError("entered")
    assert isotile.explain("softmax", t(3)).backend == "cpu"


def test_explain_names_an_unknown_operator():
    with pytest.raises(ValueError, match=r"isotile\.explain: name: wanted one of attention, .*got 'relu'"):
        isotile.explain("relu", t(3))
    with pytest.raises(AttributeError, match="no operator or function 'relu'; operators: attention"):
        _ = isotile.relu


@pytest.mark.parametrize("way", ["plain", "gradient", "autocast", "module"])
@pytest.mark.parametrize("op", CROOKED_CALLS)
def test_a_fallback_is_said_once_at_the_callers_line(op, way, fresh):
    call = CROOKED_CALLS[op]
    x = CROOKED.clone().requires_grad_() if way == "gradient" else CROOKED
    around = torch.autocast("cpu") if way == "autocast" else contextlib.nullcontext()  # PyTorch's frames in between
    where = call.__code__.co_firstlineno
    if way == "module":
        kinds = {"softmax": isotile.nn.Softmax, "layer_norm": isotile.nn.LayerNorm, "rms_norm": isotile.nn.RMSNorm}
        module = kinds[op](-1 if op == "softmax" else 2).requires_grad_(False)
        call, where = (lambda x: module(x)), inspect.currentframe().f_lineno
    with warnings.catch_warnings(record=True) as said, around:
        warnings.simplefilter("always")
        call(x)
        call(x)
        call(x[:1])
    assert [w.category for w in said] == [isotile.FallbackWarning], [str(w.message) for w in said]
    message = str(said[0].message)
    assert message.startswith(f"isotile.{op} on cpu runs on backend 'reference', since 'cpu' refuses: takes at most 12")
    assert (said[0].filename, said[0].lineno) == (__file__, where)


def test_a_fallback_warning_turned_into_an_error_stays_one(fresh):
    out = torch.full(CROOKED.shape, math.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("error", isotile.FallbackWarning)
        for _ in range(2):
            with pytest.raises(isotile.FallbackWarning):
                isotile.softmax(CROOKED, out=out)
    assert out.isnan().all()
