"""Each instruction of the emulator against the facts of the NKI documents, on inputs chosen to tell variants apart."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from isotile.nki_emulator import NkiValidationError
from isotile.nki_emulator import isa as nisa
from isotile.nki_emulator import language as nl

F32 = np.float32
RESET = nisa.reduce_cmd.reset_reduce


def f32(*rows):
    return np.array(rows, F32)


# -- operand order ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reverse0", "reverse1", "expected"),
    [
        (False, False, lambda x: (x - 3) - 10),
        (True, False, lambda x: (3 - x) - 10),
        (False, True, lambda x: 10 - (x - 3)),
        (True, True, lambda x: 10 - (3 - x)),
    ],
)
def test_tensor_scalar_reverse_swaps_each_operation(instruct, normal, reverse0, reverse1, expected):
    x = normal(4, 6)
    got = instruct(
        lambda dst, a: nisa.tensor_scalar(
            dst=dst,
            data=a,
            op0=nl.subtract,
            operand0=3.0,
            reverse0=reverse0,
            op1=nl.subtract,
            operand1=10.0,
            reverse1=reverse1,
        ),
        (4, 6),
        nl.float32,
        x,
    )
    np.testing.assert_array_equal(got, expected(x))


def test_tensor_scalar_vector_operand_is_per_partition(instruct, normal):
    x, v = normal(5, 7), normal(5, 1)
    got = instruct(
        lambda dst, a, b: nisa.tensor_scalar(dst=dst, data=a, op0=nl.multiply, operand0=b, op1=nl.add, operand1=b),
        (5, 7),
        nl.float32,
        x,
        v,
    )
    np.testing.assert_array_equal(got, x * v + v)


@pytest.mark.parametrize(
    ("reverse0", "reverse1", "expected"),
    [
        (False, False, lambda x, v, y: (x - v) - y),
        (True, False, lambda x, v, y: (v - x) - y),
        (False, True, lambda x, v, y: y - (x - v)),
        (True, True, lambda x, v, y: y - (v - x)),
    ],
)
def test_scalar_tensor_tensor_second_operation_takes_the_tile(instruct, normal, reverse0, reverse1, expected):
    x, v, y = normal(4, 6), normal(4, 1), normal(4, 6)
    got = instruct(
        lambda dst, a, b, c: nisa.scalar_tensor_tensor(
            dst=dst,
            data=a,
            op0=nl.subtract,
            operand0=b,
            op1=nl.subtract,
            operand1=c,
            reverse0=reverse0,
            reverse1=reverse1,
        ),
        (4, 6),
        nl.float32,
        x,
        v,
        y,
    )
    np.testing.assert_array_equal(got, expected(x, v, y))


@pytest.mark.parametrize("reverse0", [False, True])
@pytest.mark.parametrize("reverse1", [False, True])
def test_scan_order(instruct, normal, reverse0, reverse1):
    a, b, start = normal(3, 9), normal(3, 9), normal(3, 1)
    got = instruct(
        lambda dst, x, y, s: nisa.tensor_tensor_scan(
            dst=dst,
            data0=x,
            data1=y,
            initial=s,
            op0=nl.subtract,
            op1=nl.subtract,
            reverse0=reverse0,
            reverse1=reverse1,
        ),
        (3, 9),
        nl.float32,
        a,
        b,
        start,
    )
    carry = start[:, 0]
    for i in range(9):
        step = carry - a[:, i] if reverse0 else a[:, i] - carry
        carry = b[:, i] - step if reverse1 else step - b[:, i]
        np.testing.assert_array_equal(got[:, i], carry)


def test_tensor_scalar_keeps_float32_between_its_operations(instruct):
    x = f32([1.0])
    got = instruct(
        lambda dst, a: nisa.tensor_scalar(dst=dst, data=a, op0=nl.add, operand0=2.0**-9, op1=nl.subtract, operand1=1.0),
        (1, 1),
        nl.bfloat16,
        x,
    )
    assert float(got[0, 0]) == 2.0**-9  # a bfloat16 in the middle would have lost it


# -- casts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [(nl.int8, -128, 127), (nl.uint8, 0, 255), (nl.int16, -32768, 32767), (nl.uint16, 0, 65535)],
)
def test_float_to_int_rounds_half_even_and_saturates(instruct, dtype, low, high):
    x = f32([0.5, 1.5, 2.5, -0.5, 3.49999, high + 0.5, 1e9, -1e9, np.inf, -np.inf])
    got = instruct(lambda dst, a: nisa.tensor_copy(dst=dst, src=a), (1, 10), dtype, x)
    np.testing.assert_array_equal(got[0], np.clip([0, 2, 2, 0, 3, high, high, low, high, low], low, high))


def test_float_to_int32_saturates_at_both_ends(instruct):
    x = f32([2147483648.0, -2147483648.0, 3e9, -3e9, 16777217.0])
    got = instruct(lambda dst, a: nisa.tensor_copy(dst=dst, src=a), (1, 5), nl.int32, x)
    assert got[0].tolist() == [2147483647, -2147483648, 2147483647, -2147483648, 16777216]


def test_bfloat16_rounds_half_even(instruct):
    x = f32([1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-20, np.finfo(F32).min])
    got = instruct(lambda dst, a: nisa.tensor_copy(dst=dst, src=a), (1, 4), nl.bfloat16, x).astype(F32)
    assert got[0].tolist() == [1.0, 1 + 2.0**-6, 1 + 2.0**-7, -np.inf]


def test_e4m3_and_e4m3fn_differ(instruct):
    x = f32([240.0, 248.0, 256.0, 448.0, 0.001953125])
    legacy = instruct(lambda dst, a: nisa.tensor_copy(dst=dst, src=a), (1, 5), nl.float8_e4m3, x).astype(F32)
    ocp = instruct(lambda dst, a: nisa.tensor_copy(dst=dst, src=a), (1, 5), nl.float8_e4m3fn, x, target="gen4").astype(
        F32
    )
    assert legacy[0].tolist() == [240.0, np.inf, np.inf, np.inf, 0.001953125]
    assert ocp[0].tolist() == [240.0, 256.0, 256.0, 448.0, 0.001953125]


def test_tfloat32_keeps_ten_bits(instruct):
    x = f32([1 + 2.0**-10, 1 + 2.0**-11, 1 + 3 * 2.0**-11])
    got = instruct(lambda dst, a: nisa.tensor_copy(dst=dst, src=a), (1, 3), nl.tfloat32, x)
    assert got[0].tolist() == [1 + 2.0**-10, 1.0, 1 + 2.0**-9]


def test_same_dtype_copy_is_bit_exact(instruct):
    bits = np.array([[0x7F800001, 0xFFC12345, 0x80000000, 0x00000001]], np.uint32)
    got = instruct(lambda dst, a: nisa.tensor_copy(dst=dst, src=a), (1, 4), nl.float32, bits.view(F32))
    np.testing.assert_array_equal(got.view(np.uint32), bits)
    ints = np.array([[16777217, -16777217]], np.int32)
    np.testing.assert_array_equal(
        instruct(lambda dst, a: nisa.tensor_copy(dst=dst, src=a), (1, 2), nl.int32, ints), ints
    )


def test_one_cast_per_instruction(instruct):
    x = np.array([[1.0, 256.0]], ml_dtypes.bfloat16)
    got = instruct(
        lambda dst, a: nisa.tensor_scalar(dst=dst, data=a, op0=nl.add, operand0=1.0, op1=nl.subtract, operand1=256.0),
        (1, 2),
        nl.bfloat16,
        x,
    ).astype(F32)
    assert got[0].tolist() == [-254.0, 1.0]


def test_integers_are_exact_only_on_gpsimd(instruct):
    a = np.array([[16777217, 2**30]], np.int32)
    b = np.array([[2, 2**30]], np.int32)
    exact = instruct(lambda dst, x, y: nisa.tensor_tensor(dst=dst, data1=x, data2=y, op=nl.add), (1, 2), nl.int32, a, b)
    assert exact[0].tolist() == [16777219, -(2**31)]
    rounded = instruct(
        lambda dst, x, y: nisa.tensor_tensor(dst=dst, data1=x, data2=y, op=nl.add, engine=nisa.engine.vector),
        (1, 2),
        nl.int32,
        a,
        b,
    )
    assert rounded[0].tolist() == [16777218, 2147483647]


def test_integer_operand_in_psum_falls_back_to_float32(instruct):
    a = np.array([[16777217]], np.int32)

    def body(dst, x):
        psum = nl.ndarray((1, 1), nl.int32, buffer=nl.psum)
        nisa.tensor_copy(dst=psum, src=x)
        nisa.tensor_tensor(dst=dst, data1=psum, data2=x, op=nl.add)

    assert instruct(body, (1, 1), nl.int32, a)[0, 0] == 33554432


def test_bit_operations_use_raw_bits(instruct):
    x = np.array([[-1, 0x12345678, 1 << 30]], np.int32)
    assert instruct(
        lambda dst, a: nisa.tensor_scalar(dst=dst, data=a, op0=nl.right_shift, operand0=28), (1, 3), nl.int32, x
    )[0].tolist() == [15, 1, 4]
    assert instruct(
        lambda dst, a: nisa.tensor_scalar(
            dst=dst, data=a, op0=nl.bitwise_and, operand0=0xFF, op1=nl.left_shift, operand1=4
        ),
        (1, 3),
        nl.int32,
        x,
    )[0].tolist() == [0xFF0, 0x780, 0]
    nibbles = np.array([[0xA7, 0x3C]], np.uint8)
    assert instruct(
        lambda dst, a: nisa.tensor_scalar(dst=dst, data=a, op0=nl.right_shift, operand0=4), (1, 2), nl.uint8, nibbles
    )[0].tolist() == [0xA, 0x3]
    assert instruct(
        lambda dst, a: nisa.tensor_scalar(dst=dst, data=a, op0=nl.invert, operand0=None), (1, 2), nl.uint8, nibbles
    )[0].tolist() == [0x58, 0xC3]


# -- reductions -----------------------------------------------------------------------------------------------------


def test_negated_reduction_negates_the_result(instruct, normal):
    x = normal(6, 20)
    got = instruct(
        lambda dst, a: nisa.tensor_reduce(dst=dst, op=nl.maximum, data=a, axis=1, negate=True), (6, 1), nl.float32, x
    )
    np.testing.assert_array_equal(got, -x.max(axis=1, keepdims=True))


def test_reduce_over_the_last_of_three_dims(instruct, normal):
    x = normal(4, 3, 5)
    got = instruct(lambda dst, a: nisa.tensor_reduce(dst=dst, op=nl.minimum, data=a, axis=(2,)), (4, 3), nl.float32, x)
    np.testing.assert_array_equal(got, x.min(axis=2))
    full = instruct(lambda dst, a: nisa.tensor_reduce(dst=dst, op=nl.add, data=a, axis=(1, 2)), (4, 1), nl.float32, x)
    np.testing.assert_allclose(full[:, 0], x.sum(axis=(1, 2)), rtol=1e-6)


def test_activation_multiplies_then_adds_and_counts_once(instruct, normal):
    x, bias, scale = normal(4, 33), normal(4, 1), normal(4, 1)

    def body(dst, a, b, s):
        tile = nl.ndarray((4, 33), nl.float32)
        nisa.activation(
            dst=tile, op=nl.exp, data=a, bias=b, scale=s, reduce_op=nl.add, reduce_res=dst[:, 0:1], reduce_cmd=RESET
        )
        nisa.activation(
            dst=tile,
            op=nl.exp,
            data=a,
            bias=b,
            scale=s,
            reduce_op=nl.add,
            reduce_res=dst[:, 1:2],
            reduce_cmd=nisa.reduce_cmd.reduce,
        )
        nisa.activation(dst=tile, op=nl.copy, data=a, reduce_res=dst[:, 2:3])  # idle reads the register

    got = instruct(body, (4, 3), nl.float32, x, bias, scale)
    once = np.exp(x * scale + bias).sum(axis=1)
    np.testing.assert_allclose(got, np.stack([once, 2 * once, 2 * once], axis=1), rtol=2e-6)


def test_activation_sum_is_taken_before_the_cast(instruct):
    x = np.full((1, 256), 1 + 2.0**-9, F32)

    def body(dst, a):
        tile = nl.ndarray((1, 256), nl.bfloat16)
        nisa.activation(dst=tile, op=nl.copy, data=a, reduce_op=nl.add, reduce_res=dst, reduce_cmd=RESET)

    assert instruct(body, (1, 1), nl.float32, x)[0, 0] == 256.5


def test_accumulator_chain_needs_a_reset(instruct, normal):
    def body(dst, a):
        nisa.activation(
            dst=dst, op=nl.copy, data=a, reduce_op=nl.add, reduce_res=dst[:, 0:1], reduce_cmd=nisa.reduce_cmd.reduce
        )

    with pytest.raises(NkiValidationError, match="reset_reduce"):
        instruct(body, (4, 8), nl.float32, normal(4, 8))


def test_vector_accumulator_is_shared_and_idle_disturbs_it(instruct, normal):
    x = normal(4, 8)
    mask = (x > 0).astype(np.uint8)

    def chain(disturb):
        def body(dst, a, m):
            tile = nl.ndarray((4, 8), nl.float32)
            common = {"op0": nl.multiply, "operand0": 2.0, "reduce_op": nl.add}
            nisa.tensor_scalar_reduce(dst=tile, data=a, **common)
            if disturb:
                nisa.select_reduce(dst=tile, predicate=m, on_true=a, on_false=0.0)
            nisa.tensor_scalar_reduce(
                dst=tile, data=a, reduce_res=dst, reduce_cmd=nisa.reduce_cmd.reduce, reduce_res_negate=True, **common
            )

        return body

    got = instruct(chain(False), (4, 1), nl.float32, x, mask)
    np.testing.assert_allclose(got[:, 0], -4 * x.sum(axis=1), rtol=1e-5)
    with pytest.raises(NkiValidationError, match="accumulator"):
        instruct(chain(True), (4, 1), nl.float32, x, mask)


@pytest.mark.parametrize("token", [nl.max, nl.maximum])
def test_tensor_scalar_reduce_takes_both_names_of_max(instruct, normal, token):
    x = normal(4, 8)

    def body(dst, a):
        tile = nl.ndarray((4, 8), nl.float32)
        nisa.tensor_scalar_reduce(dst=tile, data=a, op0=nl.abs, operand0=None, reduce_op=token, reduce_res=dst)

    np.testing.assert_array_equal(instruct(body, (4, 1), nl.float32, x)[:, 0], np.abs(x).max(axis=1))


def test_cumulative_reductions(instruct, normal):
    x = normal(3, 10)

    def run(op1, **kwargs):
        return instruct(
            lambda dst, a: nisa.tensor_scalar_cumulative(dst=dst, src=a, op0=nl.multiply, op1=op1, imm0=2.0, **kwargs),
            (3, 10),
            nl.float32,
            x,
        )

    np.testing.assert_allclose(run(nl.add), np.cumsum(2 * x, axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(run(nl.maximum), np.maximum.accumulate(2 * x, axis=1))
    loaded = run(nl.subtract, imm1=5.0, reduce_cmd=nisa.reduce_cmd.load_reduce)
    carry = np.full(3, 5.0, F32)
    for i in range(10):
        carry = 2 * x[:, i] - carry
        np.testing.assert_array_equal(loaded[:, i], carry)


def test_partition_reduce(instruct, normal):
    x = normal(64, 5)
    got = instruct(lambda dst, a: nisa.tensor_partition_reduce(dst=dst, op=nl.add, data=a), (1, 5), nl.float32, x)
    np.testing.assert_allclose(got[0], x.sum(axis=0), rtol=1e-5, atol=1e-5)


# -- statistics -----------------------------------------------------------------------------------------------------


def test_bn_stats_gives_even_then_odd(instruct):
    x = f32([1, 10, 3, 30, 5])
    got = instruct(lambda dst, a: nisa.bn_stats(dst=dst, data=a), (1, 6), nl.float32, x)
    assert got[0].tolist() == [3, 3, 8, 2, 20, 200]


def test_bn_aggr_of_halves_with_differing_means(instruct, normal):
    x = np.concatenate([normal(4, 300) + 100, normal(4, 212) - 50], axis=1)

    def body(dst, a):
        stats = nl.ndarray((4, 12), nl.float32)
        nisa.bn_stats(dst=stats[:, 0:6], data=a[:, 0:300])
        nisa.bn_stats(dst=stats[:, 6:12], data=a[:, 300:512])
        nisa.bn_aggr(dst=dst, data=stats)

    got = instruct(body, (4, 2), nl.float32, x)
    np.testing.assert_allclose(got[:, 0], x.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(got[:, 1], x.astype(np.float64).var(axis=1), rtol=1e-5)


# -- activation functions -------------------------------------------------------------------------------------------


def test_sine_leaves_its_range_on_the_documented_cubic(instruct):
    x = f32([9.0, -9.0, 1.0])
    got = instruct(lambda dst, a: nisa.activation(dst=dst, op=nl.sin, data=a), (1, 3), nl.float32, x)
    assert got[0, 0] == pytest.approx(27.65, abs=0.06)
    assert got[0, 1] == -got[0, 0]
    assert got[0, 2] == pytest.approx(np.sin(1.0))


def test_every_activation_function_has_its_meaning(instruct):
    torch = pytest.importorskip("torch")
    import torch.nn.functional as F

    x = np.linspace(-4, 4, 81, dtype=F32)[None]
    t = torch.from_numpy(x).double().requires_grad_()

    def derivative(f):
        return torch.autograd.grad(f(t).sum(), t)[0]

    meanings = {
        "copy": t,
        "square": t * t,
        "sigmoid": t.sigmoid(),
        "relu": t.relu(),
        "gelu": F.gelu(t),
        "gelu_dx": derivative(F.gelu),
        "gelu_apprx_tanh": F.gelu(t, approximate="tanh"),
        "gelu_apprx_sigmoid": t * (1.702 * t).sigmoid(),
        "gelu_apprx_sigmoid_dx": derivative(lambda v: v * (1.702 * v).sigmoid()),
        "silu": F.silu(t),
        "silu_dx": derivative(F.silu),
        "tanh": t.tanh(),
        "softplus": F.softplus(t),
        "mish": F.mish(t),
        "erf": t.erf(),
        "erf_dx": derivative(torch.erf),
        "exp": t.exp(),
        "sign": t.sign(),
        "abs": t.abs(),
    }
    for name, wanted in meanings.items():
        got = instruct(
            lambda dst, a, name=name: nisa.activation(dst=dst, op=getattr(nl, name), data=a), (1, 81), nl.float32, x
        )
        np.testing.assert_allclose(got, wanted.detach().numpy(), rtol=1e-6, atol=1e-7, err_msg=name)


# -- matmul and PSUM ------------------------------------------------------------------------------------------------


def _matmul(instruct, calls, a, b, target="gen3"):
    """dst after `calls(psum, stationary, moving)`."""
    m, n = a.shape[1], b.shape[1]

    def body(dst, x, y):
        psum = nl.ndarray((m, n), nl.float32, buffer=nl.psum)
        calls(psum, x, y)
        nisa.tensor_copy(dst=dst, src=psum)

    return instruct(body, (m, n), nl.float32, a, b, target=target)


@pytest.fixture
def pair(normal):
    return normal(16, 8).round(), normal(16, 12).round()


def test_matmul_transposes_the_stationary(instruct, pair):
    a, b = pair
    got = _matmul(instruct, lambda p, x, y: nisa.nc_matmul(dst=p, stationary=x, moving=y), a, b)
    np.testing.assert_array_equal(got, a.T @ b)


def test_matmul_first_overwrites_then_adds(instruct, pair):
    a, b = pair

    def calls(p, x, y):
        for _ in range(3):
            nisa.nc_matmul(dst=p, stationary=x, moving=y)

    np.testing.assert_array_equal(_matmul(instruct, calls, a, b), 3 * (a.T @ b))


@pytest.mark.parametrize("touch", ["read", "write", "memset"])
def test_accumulation_starts_over_on_a_reused_tile(instruct, pair, touch):
    a, b = pair

    def calls(p, x, y):
        nisa.nc_matmul(dst=p, stationary=x, moving=y)
        other = nl.ndarray(p.shape, nl.float32)
        nisa.memset(dst=other, value=7.0)
        if touch == "read":
            nisa.tensor_copy(dst=other, src=p)
        elif touch == "write":
            nisa.tensor_copy(dst=p, src=other)
        else:
            nisa.memset(dst=p, value=5.0)
        nisa.nc_matmul(dst=p, stationary=x, moving=y)

    np.testing.assert_array_equal(_matmul(instruct, calls, a, b), a.T @ b)


def test_accumulation_is_per_location(instruct, pair):
    a, b = pair

    def calls(p, x, y):
        nisa.nc_matmul(dst=p[:, 0:5], stationary=x, moving=y[:, 0:5])
        nisa.nc_matmul(dst=p, stationary=x, moving=y)

    want = a.T @ b
    want[:, :5] *= 2
    np.testing.assert_array_equal(_matmul(instruct, calls, a, b), want)


def test_accumulate_flags_override(instruct, pair):
    a, b = pair

    def overwrite(p, x, y):
        nisa.nc_matmul(dst=p, stationary=x, moving=y)
        nisa.nc_matmul(dst=p, stationary=x, moving=y, accumulate=False)

    np.testing.assert_array_equal(_matmul(instruct, overwrite, a, b), a.T @ b)

    def add_after_read(p, x, y):
        nisa.nc_matmul(dst=p, stationary=x, moving=y)
        nisa.tensor_copy(dst=nl.ndarray(p.shape, nl.float32), src=p)
        nisa.nc_matmul(dst=p, stationary=x, moving=y, accumulate=True)

    np.testing.assert_array_equal(_matmul(instruct, add_after_read, a, b), 2 * (a.T @ b))


def test_accumulate_onto_unwritten_psum_is_refused(instruct, pair):
    def calls(p, x, y):
        nisa.nc_matmul(dst=p, stationary=x, moving=y, accumulate=True)

    with pytest.raises(NkiValidationError, match="accumulate"):
        _matmul(instruct, calls, *pair)


def test_accumulate_after_memset_is_defined_on_gen4_only(instruct, pair):
    a, b = pair

    def calls(p, x, y):
        nisa.memset(dst=p, value=2.0)
        nisa.nc_matmul(dst=p, stationary=x, moving=y, accumulate=True)

    np.testing.assert_array_equal(_matmul(instruct, calls, a, b, target="gen4"), a.T @ b + 2)
    with pytest.raises(NkiValidationError, match="memset"):
        _matmul(instruct, calls, a, b)


def test_bfloat16_psum_rounds_each_write_on_gen4(instruct):
    a, b = np.ones((1, 1), F32), np.full((1, 1), 256.0, F32)
    one = np.ones((1, 1), F32)

    def body(dst, x, y, z):
        psum = nl.ndarray((1, 1), nl.bfloat16, buffer=nl.psum)
        nisa.nc_matmul(dst=psum, stationary=x, moving=y)
        for _ in range(4):
            nisa.nc_matmul(dst=psum, stationary=x, moving=z)
        nisa.tensor_copy(dst=dst, src=psum)

    assert instruct(body, (1, 1), nl.float32, a, b, one, target="gen4")[0, 0] == 256.0
    with pytest.raises(NkiValidationError, match="float32"):
        instruct(body, (1, 1), nl.float32, a, b, one)


def test_double_row_contracts_both_planes(instruct, normal):
    a = normal(8, 2, 4).round().astype(ml_dtypes.float8_e4m3)
    b = normal(8, 2, 6).round().astype(ml_dtypes.float8_e4m3)

    def body(dst, x, y):
        psum = nl.ndarray((4, 6), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(dst=psum, stationary=x, moving=y, perf_mode=nisa.matmul_perf_mode.double_row)
        nisa.tensor_copy(dst=dst, src=psum)

    want = np.einsum("ktm,ktn->mn", a.astype(F32), b.astype(F32))
    np.testing.assert_array_equal(instruct(body, (4, 6), nl.float32, a, b), want)
    with pytest.raises(NkiValidationError, match="double_row"):
        instruct(body, (4, 6), nl.float32, a, b, target="gen2")


def test_transposes_are_bit_exact(instruct):
    bits = np.arange(33 * 65, dtype=np.uint32).reshape(33, 65) * 1234567
    x = bits.view(F32)

    def body(dst, a):
        psum = nl.ndarray((65, 33), nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=psum, data=a)
        nisa.tensor_copy(dst=dst, src=psum)

    np.testing.assert_array_equal(instruct(body, (65, 33), nl.float32, x).view(np.uint32), bits.T)
    small = np.arange(32 * 30, dtype=np.int16).reshape(32, 30)
    np.testing.assert_array_equal(
        instruct(lambda dst, a: nisa.nc_transpose(dst=dst, data=a), (30, 32), nl.int16, small), small.T
    )


def test_gen2_transpose_multiplies_by_an_identity(instruct):
    x = f32([np.nan, 1.0], [2.0, 3.0])

    def body(dst, a):
        psum = nl.ndarray((2, 2), nl.float32, buffer=nl.psum)
        nisa.nc_transpose(dst=psum, data=a)
        nisa.tensor_copy(dst=dst, src=psum)

    assert np.isnan(instruct(body, (2, 2), nl.float32, x, target="gen2")).sum() == 2
    assert np.isnan(instruct(body, (2, 2), nl.float32, x, target="gen3")).sum() == 1


def test_matmul_transpose_flag_passes_bits(instruct, normal):
    x = normal(8, 6).astype(ml_dtypes.bfloat16)
    x[0, 0] = np.nan
    eye = np.eye(8, dtype=ml_dtypes.bfloat16)

    def body(dst, a, i):
        psum = nl.ndarray((6, 8), nl.bfloat16, buffer=nl.psum)
        nisa.nc_matmul(dst=psum, stationary=a, moving=i, is_transpose=True)
        nisa.tensor_copy(dst=dst, src=psum)

    got = instruct(body, (6, 8), nl.bfloat16, x, eye)
    np.testing.assert_array_equal(got.view(np.uint16), x.T.view(np.uint16))


# -- MX -------------------------------------------------------------------------------------------------------------


def _quantised(instruct, x, dtype=nl.float8_e4m3fn_x4):
    p, f = x.shape
    storage = np.uint32

    def data(dst, a):
        scale = nl.ndarray((p, f // 4), nl.uint8)
        nisa.memset(dst=scale, value=0)
        nisa.quantize_mx(dst=dst.view(dtype), src=a, dst_scale=scale)

    def scales(dst, a):
        packed = nl.ndarray((p, f // 4), dtype)
        nisa.memset(dst=dst, value=0)
        nisa.quantize_mx(dst=packed, src=a, dst_scale=dst)

    bits = instruct(data, (p, f // 4), nl.uint32, x, target="gen4")
    return bits.astype(storage), instruct(scales, (p, f // 4), nl.uint8, x, target="gen4")


def test_mx_scale_bytes_follow_the_largest_of_32(instruct):
    x = np.zeros((64, 8), np.float32)
    x[0:8, 0:4] = 1.0  # amax 1 -> 2^(0 - 7)
    x[3, 2] = 448.0  # amax 448 -> 2^(8 - 7)
    x[8:16, 4:8] = 0.75  # 2^(-1 - 7)
    x[40:48, 0:4] = -3.0  # second quadrant, group 1: 2^(1 - 7)
    bits, scale = _quantised(instruct, x.astype(ml_dtypes.bfloat16))
    assert scale[0].tolist() == [128, 0]
    assert scale[1].tolist() == [0, 119]
    assert scale[33].tolist() == [121, 0]
    first = bits[3:4, 0:1].copy().view(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(F32)
    assert first[0].tolist() == [0.5, 0.5, 224.0, 0.5]


def test_mx_matmul_scales_each_group(instruct, normal):
    p, m, n = 64, 6, 10
    a = (normal(p, 4 * m) * np.exp2(normal(p, 4 * m).round())).astype(ml_dtypes.bfloat16)
    b = normal(p, 4 * n).astype(ml_dtypes.bfloat16)

    def body(dst, x, y):
        sides = []
        for tile, free in ((x, m), (y, n)):
            packed = nl.ndarray((p, free), nl.float8_e4m3fn_x4)
            scale = nl.ndarray((p, free), nl.float8_e8m0fnu)
            nisa.quantize_mx(dst=packed, src=tile, dst_scale=scale)
            sides.append((packed, scale))
        psum = nl.ndarray((m, n), nl.float32, buffer=nl.psum)
        nisa.nc_matmul_mx(
            dst=psum, stationary=sides[0][0], moving=sides[1][0], stationary_scale=sides[0][1], moving_scale=sides[1][1]
        )
        nisa.tensor_copy(dst=dst, src=psum)

    got = instruct(body, (m, n), nl.float32, a, b, target="gen4")

    def restore(x, free):
        bits, scale = _quantised(instruct, x)
        values = bits.view(np.uint8).view(ml_dtypes.float8_e4m3fn).astype(F32).reshape(p, free, 4)
        rows = [32 * (i // 32) + (i % 32) // 8 for i in range(p)]
        return values * np.exp2(scale[rows].astype(F32) - 127)[:, :, None]

    want = np.einsum("pmj,pnj->mn", restore(a, m).astype(np.float64), restore(b, n).astype(np.float64))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    left, right = a.astype(F32).reshape(p, m, 4), b.astype(F32).reshape(p, n, 4)
    # Half a step of e4m3 is 2^-4 of a value in each factor; small values of a group lose at most 2^-10 of its largest.
    bound = (2.0**-3 + 2.0**-8) * np.einsum("pmj,pnj->mn", np.abs(left), np.abs(right))
    slack = 2.0**-9 * 4 * p * np.abs(left).max() * np.abs(right).max()
    assert (np.abs(want - np.einsum("pmj,pnj->mn", left, right)) <= bound + slack).all()


def test_packed_scales_may_start_at_partition_4(instruct, normal):
    a = normal(128, 8).astype(ml_dtypes.bfloat16)

    def run(start):
        def body(dst, x):
            packed = nl.ndarray((128, 2), nl.float8_e4m3fn_x4)
            scale = nl.ndarray((128, 2), nl.uint8)
            view = scale[start : start + 124, :]
            nisa.quantize_mx(dst=packed, src=x, dst_scale=view)
            psum = nl.ndarray((2, 2), nl.float32, buffer=nl.psum)
            nisa.nc_matmul_mx(dst=psum, stationary=packed, moving=packed, stationary_scale=view, moving_scale=view)
            nisa.tensor_copy(dst=dst, src=psum)

        return instruct(body, (2, 2), nl.float32, a, target="gen4")

    np.testing.assert_array_equal(run(0), run(4))


def test_fp4_nibbles_come_lowest_first(instruct):
    # 1.0 is 0b0010; element j of the packed four sits at bits 4j.
    data = np.zeros((32, 2), np.uint16)
    data[0, 0] = 0x0002  # element 0
    data[0, 1] = 0x2000  # element 3
    scale = np.full((32, 2), 127, np.uint8)

    def body(dst, x, s):
        packed = x.view(nl.float4_e2m1fn_x4)
        psum = nl.ndarray((2, 2), nl.float32, buffer=nl.psum)
        nisa.nc_matmul_mx(dst=psum, stationary=packed, moving=packed, stationary_scale=s, moving_scale=s)
        nisa.tensor_copy(dst=dst, src=psum)

    np.testing.assert_array_equal(instruct(body, (2, 2), nl.float32, data, scale, target="gen4"), np.eye(2))


# -- masks, patterns, indices -----------------------------------------------------------------------------------------


def test_iota_outermost_first(instruct):
    got = instruct(
        lambda dst: nisa.iota(dst=dst, pattern=[[100, 2], [1, 3]], offset=7, channel_multiplier=1000),
        (2, 2, 3),
        nl.int32,
    )
    assert got[1].tolist() == [[1007, 1008, 1009], [1107, 1108, 1109]]


def test_affine_select_causal(instruct, normal):
    x = normal(8, 16)
    got = instruct(
        lambda dst, a: nisa.affine_select(
            dst=dst,
            pattern=[[-1, 16]],
            channel_multiplier=1,
            offset=4,
            on_true_tile=a,
            on_false_value=-30000.0,
            cmp_op=nl.greater_equal,
        ),
        (8, 16),
        nl.float32,
        x,
    )
    q, k = np.arange(8)[:, None] + 4, np.arange(16)[None]
    np.testing.assert_array_equal(got, np.where(k <= q, x, F32(-30000)))
    diagonal = instruct(
        lambda dst, a: nisa.affine_select(
            dst=dst, pattern=[[-1, 16]], channel_multiplier=1, on_true_tile=a, on_false_value=0.0
        ),
        (8, 16),
        nl.float32,
        x,
    )
    np.testing.assert_array_equal(diagonal, np.where(np.arange(8)[:, None] == k, x, 0))


def test_range_select_bounds_and_running_max(instruct, normal):
    x = normal(4, 10)
    low, high = f32([0], [3], [5], [20]), f32([10], [7], [5], [30])

    def body(dst, a, lo, hi):
        tile = nl.ndarray((4, 10), nl.float32)
        nisa.range_select(
            dst=tile,
            on_true_tile=a,
            comp_op0=nl.greater_equal,
            comp_op1=nl.less,
            bound0=lo,
            bound1=hi,
            range_start=2,
            reduce_res=dst[:, 10:11],
        )
        nisa.tensor_copy(dst=dst[:, 0:10], src=tile)

    got = instruct(body, (4, 11), nl.float32, x, low, high)
    index = np.arange(10)[None] + 2
    want = np.where((index >= low) & (index < high), x, np.finfo(F32).min)
    np.testing.assert_array_equal(got[:, :10], want)
    np.testing.assert_array_equal(got[:, 10], want.max(axis=1))
    assert np.isfinite(got).all()  # a fully hidden row stays at the lowest float32


def test_range_select_fill_overflows_bfloat16(instruct, normal):
    low, high = np.full((2, 1), 5, F32), np.full((2, 1), 5, F32)
    got = instruct(
        lambda dst, a, lo, hi: nisa.range_select(
            dst=dst, on_true_tile=a, comp_op0=nl.greater, comp_op1=nl.less, bound0=lo, bound1=hi
        ),
        (2, 4),
        nl.bfloat16,
        normal(2, 4),
        low,
        high,
    )
    assert np.isneginf(got.astype(F32)).all()


def test_max8_find_and_replace_with_ties(instruct):
    x = f32([5, 1, 5, 9, 5, 2, 3, 4, 9, 0])
    top = instruct(lambda dst, a: nisa.max8(dst=dst, src=a), (1, 8), nl.float32, x)
    assert top[0].tolist() == [9, 9, 5, 5, 5, 4, 3, 2]
    wanted = f32([9, 9, 5, 5, 5, 77, 9, 0])
    index = instruct(lambda dst, a, v: nisa.nc_find_index8(dst=dst, data=a, vals=v), (1, 8), nl.uint32, x, wanted)
    assert index[0].tolist() == [3, 8, 0, 2, 4, 0xFFFFFFFF, 0xFFFFFFFF, 9]
    index16 = instruct(lambda dst, a, v: nisa.nc_find_index8(dst=dst, data=a, vals=v), (1, 8), nl.uint16, x, wanted)
    assert index16[0, 5] == 0xFFFF

    def body(dst, a, v):
        at = nl.ndarray((1, 8), nl.uint32)
        nisa.nc_match_replace8(dst=dst[:, 0:10], data=a, vals=v, imm=-1.0, dst_idx=at)
        nisa.tensor_copy(dst=dst[:, 10:18], src=at)

    got = instruct(body, (1, 18), nl.float32, x, f32([9, 9, 5, 5, 4, 3, 2, 1]))[0]
    assert got[:10].tolist() == [-1, -1, -1, -1, 5, -1, -1, -1, -1, 0]
    assert got[10:].tolist() == [8, 3, 2, 0, 7, 6, 5, 1]  # from value 7 down to 0: equal values pair from the back


def test_predicated_copies(instruct, normal):
    x, y = normal(4, 6), normal(4, 6)
    mask = (x > 0).astype(np.uint8)
    for reverse in (False, True):

        def body(dst, a, b, m, reverse=reverse):
            nisa.tensor_copy(dst=dst, src=b)
            nisa.tensor_copy_predicated(dst=dst, src=a, predicate=m, reverse_pred=reverse)

        want = np.where((mask != 0) ^ reverse, x, y)
        np.testing.assert_array_equal(instruct(body, (4, 6), nl.float32, x, y, mask), want)


def test_select_reduce(instruct, normal):
    x, mask = normal(4, 6), (np.arange(24).reshape(4, 6) % 3 == 0).astype(np.uint8)

    def body(dst, a, m):
        tile = nl.ndarray((4, 6), nl.float32)
        nisa.select_reduce(dst=tile, predicate=m, on_true=a, on_false=-9.0, reduce_res=dst[:, 6:7], reduce_cmd=RESET)
        nisa.tensor_copy(dst=dst[:, 0:6], src=tile)

    got = instruct(body, (4, 7), nl.float32, x, mask)
    want = np.where(mask, x, F32(-9))
    np.testing.assert_array_equal(got, np.concatenate([want, want.max(axis=1, keepdims=True)], axis=1))


def test_gathers(instruct, normal):
    x = normal(16, 40)
    index = (np.arange(16 * 7).reshape(16, 7) * 13 % 40).astype(np.uint32)
    got = instruct(lambda dst, a, i: nisa.nc_n_gather(dst=dst, data=a, indices=i), (16, 7), nl.float32, x, index)
    np.testing.assert_array_equal(got, np.take_along_axis(x, index.astype(int), axis=1))
    picks = (np.arange(32 * 2).reshape(32, 2) % 20).astype(np.uint16)
    wide = normal(32, 40)
    got = instruct(
        lambda dst, a, i: nisa.local_gather(dst=dst, src_buffer=a, index=i, num_elem_per_idx=2),
        (32, 64),
        nl.float32,
        wide,
        picks,
    )
    for core in range(2):
        rows = slice(16 * core, 16 * core + 16)
        order = picks[rows].T.reshape(-1).astype(int)
        want = wide[rows].reshape(16, 20, 2)[:, order].reshape(16, 64)
        np.testing.assert_array_equal(got[rows], want)


def test_stream_shuffle_keeps_255_and_repeats_per_quadrant(instruct, normal):
    x = normal(64, 3)
    mask = [31 - i for i in range(32)]
    mask[5] = 255

    def body(dst, a):
        nisa.memset(dst=dst, value=1.0)
        nisa.nc_stream_shuffle(dst=dst, src=a, shuffle_mask=mask)

    got = instruct(body, (64, 3), nl.float32, x)
    want = np.concatenate([x[:32][::-1], x[32:][::-1]])
    want[[5, 37]] = 1.0
    np.testing.assert_array_equal(got, want)
    row = normal(1, 3)
    spread = instruct(
        lambda dst, a: nisa.nc_stream_shuffle(dst=dst, src=a, shuffle_mask=[0] * 32), (32, 3), nl.float32, row
    )
    np.testing.assert_array_equal(spread, np.repeat(row, 32, axis=0))


def test_sequence_bounds_and_nonzero(instruct):
    ids = np.array([[1, 1, 2, 2, 2, 0, 0]], np.int32)
    got = instruct(lambda dst, a: nisa.sequence_bounds(dst=dst, segment_ids=a), (1, 2, 7), nl.int32, ids)
    assert got[0].tolist() == [[0, 0, 2, 2, 2, 7, 7], [2, 2, 5, 5, 5, -1, -1]]
    x = np.zeros((32, 5), np.int32)
    x[0, [1, 4]] = 3
    x[16, 0] = 1
    got = instruct(lambda dst, a: nisa.nonzero_with_count(dst=dst, src=a, index_offset=10), (32, 6), nl.int32, x)
    assert got[0].tolist() == [11, 14, -1, -1, -1, 2]
    assert got[16].tolist() == [10, -1, -1, -1, -1, 1]


def test_topk_is_ascending_over_the_snake(instruct, normal):
    x = normal(16, 4).astype(ml_dtypes.bfloat16)

    def body(dst, a):
        values, index = nl.ndarray((16, 5), nl.bfloat16), nl.ndarray((16, 5), nl.uint32)
        nisa.topk(val_dst=values, idx_dst=index, src=a, n=60)
        nisa.tensor_copy(dst=dst[:, 0:5], src=values)
        nisa.tensor_copy(dst=dst[:, 5:10], src=index)

    got = instruct(body, (16, 10), nl.float32, x)[0]
    snake = x.T.reshape(-1)[:60].astype(F32)
    np.testing.assert_array_equal(got[:5], np.sort(snake)[-5:])
    np.testing.assert_array_equal(snake[got[5:].astype(int)], got[:5])


def test_exponential_and_activate2_on_gen4(instruct, normal):
    x = normal(4, 9)

    def body(dst, a):
        peak = nl.ndarray((4, 1), nl.float32)
        nisa.tensor_reduce(dst=peak, op=nl.maximum, data=a, axis=1)
        nisa.exponential(
            dst=dst[:, 0:9], src=a, max_value=peak, reduce_res=dst[:, 9:10], reduce_cmd=nisa.reduce_cmd.reset_reduce
        )

    got = instruct(body, (4, 10), nl.float32, x, target="gen4")
    e = np.exp(x - x.max(axis=1, keepdims=True))
    np.testing.assert_allclose(got, np.concatenate([e, e.sum(axis=1, keepdims=True)], axis=1), rtol=1e-6)
    got = instruct(
        lambda dst, a: nisa.activate2(
            dst=dst, op=nl.relu, data=a, imm0=2.0, imm1=1.0, op0=nl.multiply, op1=nl.subtract, reverse1=True
        ),
        (4, 9),
        nl.float32,
        x,
        target="gen4",
    )
    np.testing.assert_array_equal(got, np.maximum(1 - 2 * x, 0))
    with pytest.raises(NkiValidationError, match="gen4"):
        instruct(body, (4, 10), nl.float32, x)


def test_random_numbers_are_seeded_and_in_range(instruct):
    def body(dst):
        nisa.rand2(dst=dst, min=-2.0, max=3.0)

    got = instruct(body, (128, 64), nl.float32, target="gen4")
    assert got.min() >= -2 and got.max() < 3
    assert abs(got.mean() - 0.5) < 0.1

    def seeded(dst):
        seed = nl.ndarray((1, 1), nl.uint32)
        nisa.memset(dst=seed, value=11)
        nisa.set_rng_seed(src_seeds=seed)
        nisa.rng(dst=dst)

    first = instruct(seeded, (4, 8), nl.uint32)
    np.testing.assert_array_equal(first, instruct(seeded, (4, 8), nl.uint32))
    assert len(np.unique(first)) == 32


def test_dropout_does_not_rescale(instruct):
    x = np.full((128, 64), 3.0, F32)
    got = instruct(lambda dst, a: nisa.dropout(dst=dst, data=a, prob=0.25), (128, 64), nl.float32, x)
    assert set(np.unique(got)) == {0.0, 3.0}
    assert 0.2 < (got == 0).mean() < 0.3


# -- DMA ------------------------------------------------------------------------------------------------------------


def test_dma_transposes_have_fixed_axes(instruct, normal):
    for shape, axes in (((5, 7), (1, 0)), ((3, 5, 7), (2, 1, 0)), ((3, 4, 5, 7), (3, 1, 2, 0))):
        x = normal(*shape)
        want = x.transpose(axes)
        got = instruct(lambda dst, a: nisa.dma_transpose(dst=dst, src=a), want.shape, nl.float32, x)
        np.testing.assert_array_equal(got, want)
        with pytest.raises(NkiValidationError, match="axes"):
            instruct(
                lambda dst, a, axes=axes: nisa.dma_transpose(dst=dst, src=a, axes=tuple(sorted(axes))),
                want.shape,
                nl.float32,
                x,
            )


def test_dma_casts_and_reshapes(emulate, normal):
    x = normal(24)

    def kernel(src):
        tile = nl.ndarray((4, 6), nl.bfloat16)
        nisa.dma_copy(dst=tile, src=src)  # [24] float32 to [4, 6] bfloat16
        out = nl.ndarray((1, 24), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=tile)
        return out

    np.testing.assert_array_equal(emulate(kernel, x)[0], x.astype(ml_dtypes.bfloat16).astype(F32))


def test_indirect_gather_scatter_and_out_of_bounds(emulate, normal):
    table = normal(10, 6)
    index = np.array([[3], [0], [9], [3]], np.int32)

    def gather(src, idx, mode):
        i = nl.ndarray((4, 1), nl.int32)
        nisa.dma_copy(dst=i, src=idx)
        tile = nl.ndarray((4, 6), nl.float32)
        nisa.memset(dst=tile, value=-1.0)
        rows = src.ap(pattern=[[6, 4], [1, 6]], offset=0, vector_offset=i, indirect_dim=0)
        nisa.dma_copy(dst=tile, src=rows, oob_mode=mode)
        out = nl.ndarray((4, 6), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=tile)
        return out

    error, skip = nisa.oob_mode.error, nisa.oob_mode.skip
    np.testing.assert_array_equal(emulate(gather, table, index, error), table[index[:, 0]])
    bad = np.array([[3], [-1], [10], [2]], np.int32)
    with pytest.raises(IndexError, match="out of bounds"):
        emulate(gather, table, bad, error)
    want = table[[3, 0, 0, 2]]
    want[1:3] = -1
    np.testing.assert_array_equal(emulate(gather, table, bad, skip), want)

    def scatter(src, idx):
        i, tile = nl.ndarray((4, 1), nl.int32), nl.ndarray((4, 6), nl.float32)
        nisa.dma_copy(dst=i, src=idx)
        nisa.dma_copy(dst=tile, src=src)
        out = nl.ndarray((10, 6), nl.float32, buffer=nl.shared_hbm)
        zero = nl.zeros((10, 6), nl.float32)
        nisa.dma_copy(dst=out, src=zero)
        nisa.dma_copy(dst=out.vector_select(0, i), src=tile)
        nisa.dma_compute(dst=out.vector_select(0, i), srcs=[tile, out.vector_select(0, i)], reduce_op=nl.add)
        return out

    rows = normal(4, 6)
    unique = np.array([[3], [0], [9], [7]], np.int32)
    want = np.zeros((10, 6), F32)
    want[unique[:, 0]] = 2 * rows
    np.testing.assert_array_equal(emulate(scatter, rows, unique), want)


def test_gathering_transpose_reads_indices_by_column(emulate, normal):
    table = normal(50, 8).astype(ml_dtypes.bfloat16)
    index = np.arange(16, dtype=np.uint32)[:, None] * 3

    def kernel(src, idx):
        i = nl.ndarray((16, 1), nl.uint32)
        nisa.dma_copy(dst=i, src=idx)
        tile = nl.ndarray((8, 16), nl.bfloat16)
        nisa.dma_transpose(dst=tile, src=src.vector_select(0, i))
        out = nl.ndarray((8, 16), nl.bfloat16, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=tile)
        return out

    np.testing.assert_array_equal(emulate(kernel, table, index).astype(F32), table[index[:, 0]].T.astype(F32))


def test_dma_compute_sums_in_float32(instruct):
    x = np.array([[256.0, 1.0]], ml_dtypes.bfloat16)
    got = instruct(
        lambda dst, a: nisa.dma_compute(dst=dst, srcs=[a[:, 0:1], a[:, 1:2], a[:, 1:2]], reduce_op=nl.add),
        (1, 1),
        nl.bfloat16,
        x,
    )
    assert float(got[0, 0]) == 258.0  # 256 + 1 alone would round back to 256


# -- fresh memory -----------------------------------------------------------------------------------------------------


def test_fresh_memory_is_poison(instruct):
    for dtype in (nl.float32, nl.bfloat16, nl.float8_e5m2):
        got = instruct(lambda dst: None, (2, 3), dtype)
        assert np.isnan(got.astype(F32)).all()
    for dtype in (nl.int32, nl.uint8):
        assert (instruct(lambda dst: None, (2, 3), dtype) == 4).all()


def test_gpsimd_integer_wraps_uint32(instruct):
    a = np.array([[0, 5]], np.uint32)
    b = np.array([[1, 3]], np.uint32)
    got = instruct(
        lambda dst, x, y: nisa.tensor_tensor(dst=dst, data1=x, data2=y, op=nl.subtract), (1, 2), nl.uint32, a, b
    )
    assert got[0].tolist() == [0xFFFFFFFF, 2]


def test_packed_words_come_from_unsigned_integers(instruct):
    words = np.arange(64, dtype=np.uint32).reshape(32, 2) * 0x01020304

    def body(dst, a):
        packed = nl.ndarray((32, 2), nl.float8_e4m3fn_x4)
        nisa.dma_copy(dst=packed, src=a)
        nisa.tensor_copy(dst=dst, src=packed.view(nl.uint32))

    np.testing.assert_array_equal(instruct(body, (32, 2), nl.uint32, words, target="gen4"), words)
    with pytest.raises(NkiValidationError, match="without a cast"):
        instruct(
            lambda dst, a: nisa.dma_copy(dst=nl.ndarray((32, 2), nl.float8_e4m3fn_x4), src=a.view(nl.float32)),
            (32, 2),
            nl.uint32,
            words,
            target="gen4",
        )
