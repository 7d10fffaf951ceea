"""Quantised weights: what no field of the spec says. Formats, exact bits, other projects' files, modules."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import hypothesis
import pytest
import torch

import isotile
import isotile.nn
from isotile import importers
from isotile.backends import BACKENDS
from isotile.backends.cpu import CpuBackend, extension
from isotile.ops import _quantized
from isotile.ops._quantized import SCHEMES
from isotile.testing.recipes import dtype_name as name_of

sys.path.insert(0, str(Path(__file__).parent))
import _whole_numbers

module, _ = extension()
for isa in [name for name, runs in module.instruction_sets() if runs][:-1]:
    BACKENDS.setdefault(f"cpu[{isa}]", CpuBackend(isa))
CPUS = [name for name in BACKENDS if name.startswith("cpu")]
INTEGERS = ("int4", "int4_dynamic")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def variants():
    """Every scheme, with every group size and kind of zero."""
    for scheme in SCHEMES:
        for group_size in (32, 64, 128, None) if scheme in INTEGERS else (None,):
            for symmetric in (True, False) if scheme in INTEGERS else (None,):
                yield scheme, group_size, symmetric


def weight(n, k, scheme, group_size=None, symmetric=None, offsets=False):
    q = isotile.quantize(randn(n, k, seed=n + k), scheme, group_size=group_size, symmetric=symmetric)
    if not offsets:
        return q
    zeros = randn(*q.scales.shape, seed=1)
    return isotile.QuantizedWeight(
        q.packed, q.scales, zeros, scheme=q.scheme, group_size=q.group_size, shape=tuple(q.shape)
    )


@pytest.mark.parametrize("backend", CPUS)
@pytest.mark.parametrize(
    "m, n, k",
    ((1, 70, 300), (7, 33, 129), (45, 130, 512), (20, 300, 96), (10, 35, 8300), (8, 40, 1100), (3, 17, 12000)),
)
def test_integer_products_have_the_references_bits(backend, m, n, k):
    """With one group a row, whatever the instruction set and the path."""
    x = randn(m, k, seed=m)
    x[0] = x[0] * 1e-3
    for scheme, symmetric in (("int8_dynamic", None), ("int4_dynamic", True), ("int4_dynamic", False)):
        q = weight(n, k, scheme, None, symmetric)
        for rows in (x, x.bfloat16()):
            with isotile.use_backend("reference"):
                want = isotile.quantized_linear(rows, q, out_dtype=torch.float32)
            with isotile.use_backend(backend):
                got = isotile.quantized_linear(rows, q, out_dtype=torch.float32)
            assert torch.equal(got, want)


@pytest.mark.parametrize("backend", CPUS)
@pytest.mark.parametrize("m", (1, 4, 20))
def test_integers_of_the_largest_magnitude(m, backend):
    """Sums that would overflow 16 bits, of weights as large as the packed format holds."""
    signs = torch.ones(m, 1)
    signs[1::2] = -1
    x = signs.expand(m, 512).contiguous()  # q is 127 or -127
    for scheme, code in (("int8_dynamic", 127), ("int8_dynamic", 128), ("int4_dynamic", 0xFF), ("int4_dynamic", 0)):
        for group_size in (None,) if scheme == "int8_dynamic" else (32, 128, None):
            q = weight(19, 512, scheme, group_size, symmetric=False if scheme == "int4_dynamic" else None)
            q.packed.fill_(code - 256 if q.packed.dtype == torch.int8 and code > 127 else code)
            if q.zeros is not None:
                q.zeros.fill_(0 if code else 15)
            q.scales.fill_(1.0)
            with isotile.use_backend("reference"):
                want = isotile.quantized_linear(x, q)
            with isotile.use_backend(backend):
                assert torch.equal(isotile.quantized_linear(x, q), want), (scheme, code, group_size)


@pytest.mark.parametrize("backend", CPUS)
@pytest.mark.parametrize("scheme", ("int4", "int4_dynamic"))
@pytest.mark.parametrize("zero", (16, 128, 255))
def test_zero_points_beyond_the_codes(zero, scheme, backend):
    q = weight(40, 256, scheme, 32, symmetric=False)
    q.zeros.fill_(zero)
    q.scales.fill_(1.0)
    for m in (1, 4, 40):
        x = torch.ones(m, 256)
        x[1::2] = -1
        with isotile.use_backend("reference"):
            want = isotile.quantized_linear(x, q)
        with isotile.use_backend(backend):
            assert torch.equal(isotile.quantized_linear(x, q), want)


@pytest.mark.parametrize("backend", CPUS)
@pytest.mark.parametrize("group_size, symmetric", ((32, False), (128, True)))
def test_rows_too_long_to_be_unpacked_at_once(group_size, symmetric, backend):
    q = weight(35, 4500, "int4_dynamic", group_size, symmetric)
    q.scales.fill_(1.0)  # sums of whole numbers below 2 ** 24
    x = randn(11, 4500).sign()
    with isotile.use_backend("reference"):
        want = isotile.quantized_linear(x, q)
    with isotile.use_backend(backend):
        assert torch.equal(isotile.quantized_linear(x, q), want)


@pytest.mark.parametrize("backend", CPUS)
@pytest.mark.parametrize("scheme", ("fp8", "mxfp4"))
def test_weights_below_the_normal_numbers_are_not_flushed(scheme, backend):
    """They are float8's subnormals, but normal float32: `torch.set_flush_denormal` does not concern them."""
    q = weight(37, 256, scheme)
    q.packed.copy_(torch.arange(q.packed.numel()).remainder(4 if scheme == "fp8" else 256).view(q.packed.shape))
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    torch.set_flush_denormal(False)
    with isotile.use_backend(backend):
        for m in (1, 40):
            want = isotile.quantized_linear(randn(m, 256), q)
            assert want.any()
            try:
                torch.set_flush_denormal(True)
                got = isotile.quantized_linear(randn(m, 256), q)
            finally:
                torch.set_flush_denormal(False)
            assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=name_of)
@pytest.mark.parametrize("backend", (*CPUS, "reference", "nki"))
def test_grouped_integers_are_exact_where_float32_is(backend, dtype):
    """The same bits on every backend, `triton` in test_triton.py; x that is not float32 keeps all its digits too."""

    @hypothesis.settings(max_examples=20 if backend == "nki" else 100)
    @hypothesis.given(_whole_numbers.calls(dtype))
    def agrees(call):
        x, q, want = call
        with isotile.use_backend(backend):
            assert torch.equal(isotile.quantized_linear(x, q), want)

    agrees()


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("scheme", [s for s in SCHEMES if SCHEMES[s].dynamic])
def test_dynamic_rows_that_are_zero_tiny_huge_or_not_finite(scheme, backend):
    q = weight(5, 40, scheme)
    for m in (8, 20):
        x = randn(m, 40)
        x[0], x[1], x[2] = 0.0, x[1] * 1e-40, x[2] * 1e37
        x[3, 7], x[4, 8] = math.nan, math.inf
        with isotile.use_backend(backend):
            y = isotile.quantized_linear(x, q)
        assert (y[0] == 0).all() and (y[1] == 0).all()
        assert y[2].isfinite().all()
        assert y[3].isnan().all() and y[4].isnan().all()
        assert y[5:].isfinite().all()


@pytest.mark.parametrize("backend", CPUS)
def test_offsets_and_every_variant_agree_within_the_bound(backend):
    from isotile import registry
    from isotile.testing import bounds, compare

    for scheme, group_size, symmetric in variants():
        for m, k in ((1, 200), (2, 200), (4, 200), (7, 200), (18, 200), (13, 1100), (3, 5700), (8, 3000), (530, 1700)):
            for offsets in (False, True) if scheme in INTEGERS and symmetric else (False,):
                q = weight(37, k, scheme, group_size, symmetric, offsets)
                x = randn(m, k).bfloat16()
                values = {
                    "x": x, "packed": q.packed, "scales": q.scales, "zeros": q.zeros, "global_scale": q.global_scale,
                    "bias": None, "scheme": q.scheme, "group_size": q.group_size, "activation": None,
                    "residual": None, "out_dtype": torch.float32,
                }  # fmt: skip
                with isotile.use_backend(backend):
                    y = isotile.quantized_linear(x, q, out_dtype=torch.float32)
                compare("y", y, bounds(registry.spec("quantized_linear"), "default", values)["y"])


def test_a_row_of_a_batch_has_the_bits_of_that_row_alone():
    for scheme in SCHEMES:
        q = weight(70, 300, scheme, 128)
        x = randn(40, 300)
        with isotile.use_backend("cpu"), isotile.determinism(batch_invariant=True):
            whole = isotile.quantized_linear(x, q)
            assert torch.equal(whole[:1], isotile.quantized_linear(x[:1], q))
            assert torch.equal(whole[39:], isotile.quantized_linear(x[39:], q))


@pytest.mark.parametrize("scheme, group_size, symmetric", tuple(variants()))
def test_the_layout_in_memory_is_the_documented_one(scheme, group_size, symmetric):
    """Read element by element with the words of the design page."""
    n, k = 3, 200
    q = weight(n, k, scheme, group_size, symmetric)
    size = k if q.group_size == -1 else q.group_size
    dense = q.dequantize(torch.float64)
    e2m1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6)
    for i in range(n):
        for e in (0, 1, 63, 64, 65, 127, 128, 199):
            g = e // size
            if SCHEMES[scheme].bits == 8:
                byte = q.packed[i, e]
                value = float(byte.view(torch.float8_e4m3fn if scheme == "fp8" else torch.int8))
            else:
                byte = int(q.packed[i, e // 128 * 64 + e % 64])
                value = byte & 15 if e % 128 < 64 else byte >> 4
                if scheme in INTEGERS:
                    value -= 8 if q.zeros is None else int(q.zeros[i, g])
                else:
                    value = e2m1[value]
            scale = q.scales[i, g]
            if scheme == "mxfp4":
                scale = 2.0 ** (int(scale) - 127)
            elif scheme == "nvfp4":
                scale = float(scale.view(torch.float8_e4m3fn)) * float(q.global_scale)
            assert float(dense[i, e]) == pytest.approx(value * float(scale), rel=1e-12)


@pytest.mark.parametrize("scheme, group_size, symmetric", tuple(variants()))
def test_quantising_errs_by_at_most_half_a_step(scheme, group_size, symmetric):
    w = randn(20, 200)
    q = isotile.quantize(w, scheme, group_size=group_size, symmetric=symmetric)
    error = (q.dequantize() - w).abs()
    scale = _quantized._per_element(_quantized.scale_values(q.scales, scheme, torch.float32), q.group_size, 200)
    if q.global_scale is not None:
        scale = scale * q.global_scale
    steps = {"fp8": 16.0, "mxfp4": 2.0, "nvfp4": 1.0}  # half the distance of the largest numbers; mxfp4 clips at 6 of 8
    # bfloat16 scales are a little small or large at the ends of a group, and integer zero points shift a group by half.
    most = steps.get(scheme, 0.55 if symmetric in (None, True) else 1.1)
    assert (error <= most * scale.abs()).all()


def test_quantising_again_changes_nothing():
    for scheme, group_size, symmetric in variants():
        if symmetric is False or scheme in ("fp8", "nvfp4"):
            continue
        q = isotile.quantize(randn(6, 130), scheme, group_size=group_size, symmetric=symmetric)
        again = isotile.quantize(q.dequantize(), scheme, group_size=group_size, symmetric=symmetric)
        # A group without its scale's extreme gets another scale; where there is one nothing moves.
        kept = (again.scales == q.scales).all(1)
        assert torch.equal(again.packed[kept], q.packed[kept])


@pytest.mark.parametrize("scheme", ("int4", "int4_dynamic", "int8", "int8_dynamic"))
def test_least_squares_never_errs_more(scheme):
    w = randn(16, 256) ** 3
    error = [
        (isotile.quantize(w, scheme, group_size=128, search=s).dequantize() - w).square().sum(1)
        for s in (None, "least_squares")
    ]
    assert (error[1] <= error[0] * (1 + 1e-6)).all()
    assert error[1].sum() < (0.9 if scheme in INTEGERS else 1.0) * error[0].sum()


def test_state_dicts_travel(tmp_path):
    for scheme, group_size, symmetric in variants():
        q = weight(12, 140, scheme, group_size, symmetric)
        torch.save(q.state_dict(), tmp_path / "q.pt")
        loaded = isotile.QuantizedWeight.from_state_dict(torch.load(tmp_path / "q.pt", weights_only=True))
        assert torch.equal(loaded.dequantize(), q.dequantize()) and repr(loaded) == repr(q)
        other = isotile.quantize(torch.zeros(12, 140), scheme, group_size=group_size)
        other.load_state_dict(q.state_dict())
        assert torch.equal(other.dequantize(), q.dequantize())
    with pytest.raises(RuntimeError, match="scheme, group size and shape"):
        weight(12, 140, "int8").load_state_dict(weight(12, 140, "fp8").state_dict())


def test_safetensors_keep_a_weight(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch")
    layer = torch.nn.Sequential(isotile.nn.QuantizedLinear(weight(12, 140, "nvfp4"), torch.randn(12)))
    safetensors.save_file(layer.state_dict(), tmp_path / "q.safetensors")
    state = safetensors.load_file(tmp_path / "q.safetensors")
    q = isotile.QuantizedWeight.from_state_dict(state, "0.weight.")
    assert torch.equal(q.dequantize(), layer[0].weight.dequantize())


def test_a_change_of_dtype_leaves_the_weight_alone():
    for scheme in ("fp8", "int4", "nvfp4"):
        layer = isotile.nn.QuantizedLinear(weight(6, 40, scheme), torch.randn(6))
        before = {n: b.clone() for n, b in layer.weight.named_buffers()}
        layer.to(torch.bfloat16)
        assert layer.bias.dtype == torch.bfloat16
        for name, buffer in layer.weight.named_buffers():
            assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])
        assert layer.to("meta").weight.packed.device.type == "meta"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_update_in_place_is_noticed(scheme):
    """Nothing derived of a weight is kept between calls."""
    torch.manual_seed(0)
    module, other = (isotile.nn.QuantizedLinear.from_linear(torch.nn.Linear(128, 16), scheme) for _ in range(2))
    x = randn(3, 128)
    before = module(x)
    for mine, theirs in zip(module.weight.buffers(), other.weight.buffers(), strict=True):
        mine.copy_(theirs)
    with torch.no_grad():
        module.bias.copy_(other.bias)
    assert torch.equal(module(x), other(x)) and not torch.equal(module(x), before)
    module.weight.packed.data.zero_()  # counts no version
    other.weight.packed.zero_()
    assert torch.equal(module(x), other(x))


def test_a_model_is_quantised_trained_and_compiled():
    model = torch.nn.Sequential(torch.nn.Linear(40, 24), torch.nn.ReLU(), torch.nn.Linear(24, 8), torch.nn.Linear(8, 3))
    x = randn(5, 40).requires_grad_()
    want = model(x)
    isotile.quantize_model(model, "int8", skip=("3",))
    assert [type(m).__name__ for m in model] == ["QuantizedLinear", "ReLU", "QuantizedLinear", "Linear"]
    got = model(x)
    assert (got - want).norm() < 0.05 * want.norm()
    got.sum().backward()
    assert x.grad is not None and model[0].bias.grad is not None
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), got)
    program = torch.export.export(model, (x.detach(),))
    torch.testing.assert_close(program.module()(x.detach()), got)
    with pytest.raises(ValueError, match="skip: wanted names of modules, got 'lm_head'"):
        isotile.quantize_model(model, "int8", skip=("lm_head",))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_the_gradient_is_that_of_the_dequantised_weight(scheme):
    q = weight(9, 70, scheme, 32)
    x = randn(4, 70).requires_grad_()
    isotile.quantized_linear(x, q, activation="silu").sum().backward()
    dense = x.detach().clone().requires_grad_()
    isotile.linear(dense, q.dequantize(), activation="silu").sum().backward()
    tolerance = 0.2 if SCHEMES[scheme].dynamic else 1e-5  # silu's slope is taken where the quantised activations lead
    assert (x.grad - dense.grad).norm() <= tolerance * dense.grad.norm()


@pytest.mark.parametrize("backend", CPUS)
def test_gradients_of_every_variant_and_path_agree_within_the_bound(backend):
    """One row, two, few and many, strips of columns and blocks of rows: sizes beyond drawn examples."""
    from isotile import library, registry
    from isotile.testing import bounds, compare

    operator = library.operator("quantized_linear_backward")

    def check(q, m, k, dtype):
        n = len(q.packed)
        values = {
            "grad": randn(m, n).to(dtype), "x": randn(m, k).to(dtype), "packed": q.packed, "scales": q.scales,
            "zeros": q.zeros, "global_scale": q.global_scale, "scheme": q.scheme, "group_size": q.group_size,
        }  # fmt: skip
        with isotile.use_backend(backend):
            (found,) = operator.execute("default", tuple(values.values()))
        compare("grad_x", found, bounds(registry.spec("quantized_linear_backward"), "default", values)["grad_x"])

    for scheme, group_size, symmetric in variants():
        for offsets in (False, True) if scheme in INTEGERS and symmetric else (False,):
            q = weight(131, 1160, scheme, group_size, symmetric, offsets)
            for m, dtype in (
                (1, torch.float32), (2, torch.float16), (3, torch.bfloat16), (21, torch.bfloat16), (45, torch.bfloat16),
                (150, torch.float32),
            ):  # fmt: skip
                check(q, m, 1160, dtype)
    for scheme in SCHEMES:
        check(weight(900, 300, scheme, 128), 1100, 300, torch.bfloat16)


def test_wrong_weights_are_refused():
    w = torch.ones(4, 64)
    for change, wanted in (
        ({"scheme": "int5"}, "scheme: wanted one of 'int8'"),
        ({"group_size": 48}, "group_size: wanted one of -1, 32, 64, 128"),
        ({"weight": torch.ones(4)}, r"weight: wanted shape \[n, k\], got \[4\]"),
        ({"weight": w * math.inf}, "weight: wanted finite numbers"),
        ({"scheme": "fp8", "symmetric": False}, "symmetric: wanted True or None under 'fp8'"),
        ({"search": "hqq"}, "search: wanted None or 'least_squares'"),
    ):
        arguments = {"weight": w, "scheme": "int4", **change}
        with pytest.raises(ValueError, match=wanted):
            isotile.quantize(**arguments)
    with pytest.raises(TypeError, match=r"weight: wanted a float tensor, got torch\.int8"):
        isotile.quantize(w.to(torch.int8), "int4")
    q = isotile.quantize(w, "int4")
    with pytest.raises(ValueError, match=r"packed: wanted shape \[4, 64\].*got \[4, 32\]"):
        isotile.QuantizedWeight(q.packed[:, :32], q.scales, scheme="int4", group_size=128, shape=(4, 64))


# --- other projects' formats -----------------------------------------------------------------------------------------


def pack_words(codes, dim, order=tuple(range(8))):
    """Eight nibbles in an int32 along `dim`; nibble i holds element order[i]."""
    last = codes.movedim(dim, -1).long().unflatten(-1, (-1, 8))
    words = sum(last[..., o] << (4 * i) for i, o in enumerate(order))
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).movedim(-1, dim)


def integers(low, high, *shape):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(sum(shape)))


def expanded(groups, size):
    return groups.repeat_interleave(size, 1)


def test_gptq():
    codes, zeros, scales = integers(0, 16, 16, 128), integers(1, 17, 16, 4), randn(16, 4).half()
    want = (codes - expanded(zeros, 32)) * expanded(scales.float(), 32)
    old = importers.from_gptq(pack_words(codes.mT, 0), pack_words((zeros - 1).mT, 1), scales.mT)
    assert torch.equal(old.dequantize(), want) and old.scales.dtype == torch.float16
    new = importers.from_gptq(
        pack_words(codes.mT, 0), pack_words((zeros % 16).mT, 1), scales.mT, torch.arange(128) // 32,
        checkpoint_format="gptq_v2",
    )  # fmt: skip
    assert torch.equal(new.dequantize(), (codes - expanded(zeros % 16, 32)) * expanded(scales.float(), 32))
    with pytest.raises(ValueError, match="act-order"):
        importers.from_gptq(
            pack_words(codes.mT, 0), pack_words((zeros - 1).mT, 1), scales.mT, torch.arange(128).flip(0) // 32
        )
    with pytest.raises(ValueError, match="group_size: wanted 32, 64, 128 or the whole row, got 16"):
        importers.from_gptq(pack_words(codes.mT, 0), pack_words(integers(0, 16, 8, 16), 1), randn(8, 16))


def test_awq():
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes, zeros, scales = integers(0, 16, 16, 128), integers(0, 16, 16, 1), randn(16, 1).half()
    q = importers.from_awq(pack_words(codes.mT, 1, order), pack_words(zeros.mT, 1, order), scales.mT)
    assert torch.equal(q.dequantize(), (codes - zeros) * scales.float())


def test_compressed_tensors():
    codes, zeros, scales = integers(-8, 8, 16, 72), integers(-8, 8, 16, 3), randn(16, 3).bfloat16()
    state = {
        "l.weight_packed": pack_words(codes + 8, 1),
        "l.weight_scale": scales,
        "l.weight_shape": torch.tensor([16, 72]),
        "l.weight_zero_point": pack_words(zeros + 8, 0),
    }
    want = (codes - expanded(zeros, 32)[:, :72]) * expanded(scales.float(), 32)[:, :72]
    with pytest.raises(ValueError, match="group_size"):  # 72 in 3 groups could be 24 each
        importers.from_compressed_tensors(state, "l.")
    state["l.weight_packed"], state["l.weight_shape"] = (
        pack_words(integers(-8, 8, 16, 96) + 8, 1),
        torch.tensor([16, 96]),
    )
    want = (integers(-8, 8, 16, 96) - expanded(zeros, 32)) * expanded(scales.float(), 32)
    assert torch.equal(importers.from_compressed_tensors(state, "l.").dequantize(), want)
    eight = integers(-128, 128, 16, 40).to(torch.int8)
    q = importers.from_compressed_tensors({"weight": eight, "weight_scale": scales[:, :1]}, dynamic=True)
    assert q.scheme == "int8_dynamic" and torch.equal(q.dequantize(), eight * scales[:, :1].float())
    fp8 = randn(16, 40).to(torch.float8_e4m3fn)
    q = importers.from_compressed_tensors({"weight": fp8, "weight_scale": torch.tensor(0.5)})
    assert torch.equal(q.dequantize(), fp8.float() * 0.5)
    state["l.weight_g_idx"] = torch.arange(96).flip(0) // 32
    with pytest.raises(ValueError, match="actorder"):
        importers.from_compressed_tensors(state, "l.")


class Int8Tensor:
    """The attributes of torchao's, which is not needed for its weights to be read."""

    def __init__(self, **attributes):
        self.__dict__.update(attributes)
        self.shape = self.qdata.shape


class IntxUnpackedToInt8Tensor(Int8Tensor):
    pass


def test_torchao():
    q, scale, zero = integers(-128, 128, 16, 64).to(torch.int8), randn(16, 1), None
    found = importers.from_torchao(Int8Tensor(qdata=q, scale=scale, zero_point=zero, block_size=[1, 64]))
    assert torch.equal(found.dequantize(), q * scale)
    q, scale, zero = integers(-8, 8, 16, 64).to(torch.int8), randn(16, 2), integers(-8, 8, 16, 2)
    tensor = IntxUnpackedToInt8Tensor(
        qdata=q, scale=scale, zero_point=zero, block_size=[1, 32], target_dtype=torch.int4
    )
    want = (q - expanded(zero, 32)) * expanded(scale, 32)
    assert torch.equal(importers.from_torchao(tensor).dequantize(), want)
    with pytest.raises(ValueError, match="tensor: wanted an Int8Tensor or IntxUnpackedToInt8Tensor, got Tensor"):
        importers.from_torchao(scale)


def gguf_bytes(kind):
    """Two rows of two blocks, every byte value among them; the block's float16s are plain numbers."""
    size = {"Q4_0": 18, "Q8_0": 34, "Q4_K": 144}[kind]
    data = (torch.arange(4 * size) * 167 + 11).remainder(256).to(torch.uint8).view(2, 2, size)
    halfs = torch.tensor([0.25, -0.375] if kind == "Q4_K" else [-0.375]).half().view(torch.uint8)
    data[:, :, : halfs.numel()] = halfs
    return data.flatten(1)


#: (elements of a row, what gguf 0.19.0's `gguf.quants.dequantize` gives for them)
GGUF_VECTORS = {
    "Q4_0": ((0, 17, 33, 40, -1), [[-0.375, 3.0, -2.25, -2.625, -2.25], [1.125, 0.375, -0.75, -1.125, 1.125]]),
    "Q8_0": ((0, 17, 33, 40, -1), [[-33.375, -42.0, -17.25, 24.375, 24.0], [28.125, 19.5, 44.25, -10.125, -10.5]]),
    "Q4_K": ((0, 17, 33, 100, -1), [[108.375, 20.625, 22.75, 126.0, 40.5], [32.375, 16.625, 3.75, 204.0, 13.75]]),
}


@pytest.mark.parametrize("kind", GGUF_VECTORS)
def test_gguf(kind):
    elements, want = GGUF_VECTORS[kind]
    data = gguf_bytes(kind)
    got = importers.from_gguf(data, kind)
    assert got.dequantize()[:, list(elements)].tolist() == want
    flat = importers.from_gguf(data.flatten(), kind, tuple(got.shape), dynamic=True)
    assert torch.equal(flat.dequantize(), got.dequantize()) and flat.scheme.endswith("_dynamic")
    with pytest.raises(ValueError, match="data: wanted rows of whole blocks"):
        importers.from_gguf(data[:, :-1], kind)
    with pytest.raises(ValueError, match="kind: wanted 'Q4_0', 'Q8_0', 'Q4_K', got 'Q5_1'"):
        importers.from_gguf(data, "Q5_1")
