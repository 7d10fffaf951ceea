"""`assert_equivalent` passes what is right, however it sums, and finds what is wrong in other people's kernels."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import isotile
from isotile.spec import Scalar, Tensor
from isotile.testing import Disagreement, assert_equivalent

SWIGLU = {"gate": Tensor("... n"), "up": Tensor("... n", same_as="gate")}


def swiglu(gate, up):
    return F.silu(gate) * up


def fused_swiglu(gate, up):
    """In float32, rounded once."""
    z = gate.float()
    return (z * torch.sigmoid(z) * up.float()).to(gate.dtype)


PRODUCT = {"x": Tensor("... k"), "w": Tensor("n k", same_as="x")}


def product(x, w):
    return F.linear(x, w)


def blocked_product(x, w):
    total = torch.zeros(*x.shape[:-1], w.shape[0])
    for start in range(0, x.shape[-1], 16):
        total = total + x[..., start : start + 16].float() @ w[:, start : start + 16].float().mT
    return total.to(x.dtype)


@pytest.mark.parametrize(
    ("a", "b", "inputs"),
    [(fused_swiglu, swiglu, SWIGLU), (blocked_product, product, PRODUCT)],
    ids=["swiglu", "product"],
)
def test_what_is_right_passes(a, b, inputs):
    found = assert_equivalent(a, b, inputs, gradients=True)
    assert found.examples == 75
    assert 0 < found.worst <= 1
    assert_equivalent(b, a, inputs)
    assert_equivalent(a, b, inputs, kinds=("specials", "large", "tiny"), examples=8)


def wrong_sign(gate, up):
    return fused_swiglu(gate, up) * torch.where(up == up.flatten()[:1].sum(), -1, 1) if up.numel() else swiglu(gate, up)


def sums_in_bfloat16(x, w):
    total = torch.zeros(*x.shape[:-1], w.shape[0], dtype=x.dtype)
    for i in range(x.shape[-1]):
        total = total + x[..., i : i + 1] * w[:, i]
    return total


def ignores_strides(x, w):
    flat = x.as_strided((x.numel(),), (1,)) if x.is_contiguous() else torch.zeros(x.numel(), dtype=x.dtype)
    return F.linear(flat.reshape(x.shape), w)


def last_column_forgotten(x, w):
    return F.linear(x[..., :-1], w[:, :-1]) if x.shape[-1] % 16 == 1 else F.linear(x, w)


def changes_its_input(x, w):
    result = F.linear(x, w)
    x.mul_(2)
    return result


COUNT = [0]


def not_the_same_twice(x, w):
    COUNT[0] += 1
    return F.linear(x, w) * (1 + COUNT[0] % 2 * 2.0**-23)


def drops_nan(x, w):
    return F.linear(x, w).nan_to_num(0.0)


@pytest.mark.parametrize(
    ("wrong", "right", "inputs", "options", "said"),
    [
        (wrong_sign, swiglu, SWIGLU, {}, "units in the last place"),
        (sums_in_bfloat16, product, PRODUCT, {"dtypes": (torch.bfloat16,)}, "are wrong"),
        (last_column_forgotten, product, PRODUCT, {}, "the truth is"),
        (ignores_strides, product, PRODUCT, {}, "are wrong"),
        (changes_its_input, product, PRODUCT, {"dtypes": (torch.float32,)}, "fn_a changed its argument x"),
        (not_the_same_twice, product, PRODUCT, {"dtypes": (torch.float32,)}, "second run"),
        (drops_nan, product, PRODUCT, {"kinds": ("specials",)}, "wrong"),
        (lambda x, w: F.linear(x, w).float(), product, PRODUCT, {"dtypes": (torch.float16,)}, "fn_b torch.float16"),
        (lambda x, w: F.linear(x, w)[..., :1], product, PRODUCT, {}, "shape"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_found(wrong, right, inputs, options, said):
    with pytest.raises(Disagreement, match=said) as failure:
        assert_equivalent(wrong, right, inputs, **options)
    example = int(str(failure.value).rsplit("example=", 1)[1])
    if wrong is not not_the_same_twice:
        with pytest.raises(Disagreement, match=f"example {example} of seed 0"):
            assert_equivalent(wrong, right, inputs, **options, example=example)


def test_a_wrong_gradient_is_found():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, gate, up):
            ctx.save_for_backward(gate, up)
            return swiglu(gate, up)

        @staticmethod
        def backward(ctx, grad):
            gate, up = ctx.saved_tensors
            with torch.enable_grad():
                leaves = [t.detach().requires_grad_() for t in (gate, up)]
                found = torch.autograd.grad(swiglu(*leaves), leaves, grad)
            return found[0], found[1] * 0.5

    assert_equivalent(Halved.apply, lambda gate, up: swiglu(gate, up), lambda r: (r.normal((3, 8)).float(),) * 2)
    with pytest.raises(Disagreement, match="gradient of up"):
        assert_equivalent(lambda gate, up: Halved.apply(gate, up), swiglu, SWIGLU, gradients=True)


def test_an_operator_of_isotiles_brings_its_bound_and_its_options():
    def softmax(x, dim, dtype):
        z = (x.float() - x.float().amax(dim, keepdim=True)).exp() if x.numel() else x.float()
        return (z / z.sum(dim, keepdim=True)).to(dtype or x.dtype)

    found = assert_equivalent(softmax, isotile.softmax, "softmax", examples=15)
    assert found.examples == 45
    with pytest.raises(Disagreement, match="fn_a: y"):
        assert_equivalent(lambda x, dim, dtype: softmax(x, dim, dtype) * 1.01, isotile.softmax, "softmax")
    with pytest.raises(Disagreement, match="fn_b: y"):
        assert_equivalent(softmax, lambda x, dim, dtype: softmax(x, dim, dtype) * 1.01, "softmax")


class Block(torch.nn.Module):
    def __init__(self, fused):
        super().__init__()
        self.fused = fused
        self.norm, self.up, self.down = torch.nn.LayerNorm(32), torch.nn.Linear(32, 64), torch.nn.Linear(64, 32)

    def forward(self, x):
        if self.fused:
            y = isotile.layer_norm(x, 32, self.norm.weight, self.norm.bias)
            y = isotile.linear(y, self.up.weight, self.up.bias, activation="gelu")
            return isotile.linear(y, self.down.weight, self.down.bias, residual=x)
        return x + self.down(F.gelu(self.up(self.norm(x))))


def test_models_are_compared_in_float64_copies():
    torch.manual_seed(0)
    theirs = Block(False)
    ours = Block(True)
    ours.load_state_dict(theirs.state_dict())

    def inputs(random):
        return random.normal((random.integer(1, 5), 32)).float()

    found = assert_equivalent(ours, theirs, inputs, gradients=True)
    assert found.examples == 25
    broken = copy.deepcopy(ours)
    with torch.no_grad():
        broken.up.bias[3] += 1e-3
    with pytest.raises(Disagreement):
        assert_equivalent(broken, theirs, inputs)


def test_hypothesis_may_draw():
    sizes = st.tuples(st.integers(1, 6), st.integers(1, 40), st.integers(0, 99))

    def make(drawn):
        rows, n, seed = drawn
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(rows, n, generator=generator), torch.randn(rows, n, generator=generator)

    assert_equivalent(fused_swiglu, swiglu, sizes.map(make))
    with pytest.raises(Disagreement):
        assert_equivalent(wrong_sign, swiglu, sizes.map(make))


def test_wrong_use_is_said():
    with pytest.raises(TypeError, match="wanted an operator's name"):
        assert_equivalent(swiglu, swiglu, 3)
    with pytest.raises(TypeError, match="gate: wanted a Tensor or a Scalar"):
        assert_equivalent(swiglu, swiglu, {"gate": (3, 4)})
    with pytest.raises(ValueError, match="laws: wanted some of"):
        assert_equivalent(swiglu, swiglu, SWIGLU, laws=("gravity",))


def test_scalars_are_drawn_too():
    inputs = {
        "x": Tensor("... n"),
        "factor": Scalar("float", samples=(0.5, 3.0)),
        "mode": Scalar("str", choices=("a", "b")),
    }
    seen = set()

    def scale(x, factor, mode):
        seen.add((factor, mode))
        return x * factor if mode == "a" else x / factor

    assert_equivalent(scale, lambda x, factor, mode: x * factor if mode == "a" else x / factor, inputs)
    assert len(seen) == 4
