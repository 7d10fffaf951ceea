"""Views, objects, registers, loops, launches and two cores of the emulator."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
import pytest

from isotile import nki_emulator
from isotile.nki_emulator import NKIObject, NkiValidationError
from isotile.nki_emulator import isa as nisa
from isotile.nki_emulator import language as nl

F32 = np.float32


def inside(body, target="gen3"):
    def kernel():
        body()

    with nki_emulator.session(target):
        nki_emulator.simulate(nki_emulator.jit(kernel))()


# -- views ----------------------------------------------------------------------------------------------------------


def test_on_chip_views_stay_two_dimensional():
    def body():
        t = nl.ndarray((8, 4, 6), nl.float32)
        assert t[0].shape == (1, 4, 6)
        assert t[:, 1].shape == (8, 6)
        assert t[:, 1, 2].shape == (8, 1)
        assert t[3, 1, 2].shape == (1, 1)
        assert t[-1, -1].shape == (1, 6)
        assert t[..., 2].shape == (8, 4)
        assert t[:, nl.ds(1, 2), 0:6:2].shape == (8, 2, 3)
        h = nl.ndarray((8, 4, 6), nl.float32, buffer=nl.hbm)
        assert h[0].shape == (4, 6)
        assert h[0, 1].shape == (6,)
        assert h[0, 1, 2].shape == ()
        assert nl.hbm is nl.private_hbm

    inside(body)


@pytest.mark.parametrize(
    "view",
    [
        lambda t: t[0:9],
        lambda t: t[3:3],
        lambda t: t[0:8:2],
        lambda t: t.permute((1, 0, 2)),
        lambda t: t.broadcast(0, 8),
        lambda t: t.expand_dim(0),
        lambda t: t.reshape((4, 8, 6)),
        lambda t: t.reshape((8, 25)),
        lambda t: t.flatten_dims(0, 1),
        lambda t: t.permute((0, 2, 1)).flatten_dims(1, 2),
        lambda t: t.view(nl.bfloat16).permute((0, 2, 1)).view(nl.float32),
        lambda t: t.ap([[12, 4], [1, 6]]),
        lambda t: t.slice(1, 2, 5),
        lambda t: t[:, :, :, :],
        lambda t: t.broadcast(1, 8),
        lambda t: t.rearrange(("p", "a", "b"), ("a", "p", "b")),
    ],
)
def test_illegal_views_are_refused(view):
    with pytest.raises((NkiValidationError, IndexError)):
        inside(lambda: view(nl.ndarray((8, 4, 6), nl.float32)))


def test_views_show_the_right_elements(instruct, normal):
    x = normal(4, 6, 10)
    views = {
        "permute": (lambda t: t.permute((0, 2, 1)), lambda a: a.transpose(0, 2, 1)),
        "select": (lambda t: t.select(1, 2), lambda a: a[:, 2]),
        "step": (lambda t: t[:, 1:6:2, ::3], lambda a: a[:, 1:6:2, ::3]),
        "reshape": (lambda t: t.reshape((4, 3, 20)), lambda a: a.reshape(4, 3, 20)),
        "split": (lambda t: t.reshape_dim(2, (5, -1)), lambda a: a.reshape(4, 6, 5, 2)),
        "flatten": (lambda t: t.flatten_dims(1, 2), lambda a: a.reshape(4, 60)),
        "broadcast": (lambda t: t[:, 0:1].broadcast(1, 3), lambda a: np.broadcast_to(a[:, :1], (4, 3, 10))),
        "rearrange": (
            lambda t: t.rearrange(("p", ("a", "b"), "c"), ("p", "b", "c", "a"), {"b": 2}),
            lambda a: a.reshape(4, 3, 2, 10).transpose(0, 2, 3, 1),
        ),
        "merge": (lambda t: t.rearrange(("p", "a", "b"), ("p", ("a", "b"))), lambda a: a.reshape(4, 60)),
        "ap": (
            lambda t: t.ap([[60, 4], [7, 3], [2, 5]], offset=4),
            lambda a: np.stack([a.reshape(4, 60)[:, 4 + 7 * i : 4 + 7 * i + 10 : 2] for i in range(3)], axis=1),
        ),
    }
    for name, (make, want) in views.items():
        wanted = want(x)
        got = instruct(lambda dst, t, make=make: nisa.tensor_copy(dst=dst, src=make(t)), wanted.shape, nl.float32, x)
        np.testing.assert_array_equal(got, wanted, err_msg=name)


def test_an_outer_ap_replaces_the_inner_one():
    def body():
        t = nl.ndarray((8, 12), nl.float32)
        inner = t.ap([[12, 4], [1, 3]], offset=5)
        assert inner.ap([[12, 2], [1, 2]], offset=0).offset == 0
        assert t[2:6].ap([[12, 4], [1, 12]]).offset == 24  # None keeps the view's own start

    inside(body)


def test_a_bad_pattern_fails_only_when_used():
    def unused():
        nl.ndarray((8, 12), nl.float32).ap([[12, 8], [1, 24]])

    inside(unused)

    def used():
        t = nl.ndarray((8, 12), nl.float32)
        nisa.tensor_copy(dst=nl.ndarray((8, 24), nl.float32), src=t.ap([[12, 8], [1, 24]]))

    with pytest.raises(IndexError, match="leaves the storage"):
        inside(used)


def test_reinterpreting_views_rescale_the_last_dim(instruct):
    x = np.arange(8, dtype=F32).reshape(2, 4)
    got = instruct(lambda dst, t: nisa.tensor_copy(dst=dst, src=t.view(nl.uint8)), (2, 16), nl.uint8, x)
    np.testing.assert_array_equal(got, x.view(np.uint8))

    def narrow():
        t = nl.ndarray((2, 3), nl.uint8)
        t.view(nl.float32)

    with pytest.raises(NkiValidationError, match="whole number"):
        inside(narrow)


def test_tensors_have_no_python_value():
    def body(use):
        t = nl.ndarray((2, 3), nl.float32)
        use(t)

    for use in (bool, iter, lambda t: t + t, lambda t: t.__setitem__(0, 1.0)):
        with pytest.raises(TypeError):
            inside(lambda use=use: body(use))


def test_dtypes_print_hash_and_compare_plainly():
    assert str(nl.float8_e4m3fn_x4) == "float8_e4m3fn_x4"
    assert nl.float8_e4m3fn_x4 != nl.float8_e5m2_x4
    assert len({nl.float8_e4m3fn_x4, nl.float8_e5m2_x4, nl.float4_e2m1fn_x4, nl.uint32}) == 4
    assert (nl.float8_e4m3fn_x4.itemsize, nl.float4_e2m1fn_x4.itemsize) == (4, 2)
    assert nl.float32 == "float32"
    assert nl.float32 == F32
    assert np.zeros(2, dtype=nl.bfloat16).dtype == ml_dtypes.bfloat16


# -- objects --------------------------------------------------------------------------------------------------------


def test_objects_get_constructors():
    class Plain(NKIObject):
        rows: int
        name = "x"
        sizes = [1, 2]  # noqa: RUF012

        def __post_init__(self):
            self.doubled = None if self.rows is None else 2 * self.rows

    a = Plain(rows=3)
    assert (a.rows, a.name, a.sizes, a.doubled) == (3, "x", [1, 2], 6)
    assert Plain().rows is None
    assert Plain(name="y").name == "y"
    assert Plain().sizes is not Plain().sizes
    with pytest.raises(TypeError, match="no attribute"):
        Plain(colour=1)

    class Heir(Plain):
        extra: int = 7

    assert (Heir(1).rows, Heir(rows=1, extra=2).extra) == (1, 2)


def test_dataclass_objects_default_missing_fields():
    @dataclass
    class Config(NKIObject):
        size: int = 4
        after_default: int
        tags: list = field(default_factory=list)
        loose = 5

        def __post_init__(self):
            self.seen = True

    c = Config()
    assert (c.size, c.after_default, c.tags, c.loose, c.seen) == (4, None, [], 5, True)
    assert Config(after_default=1, loose=6).loose == 6
    assert Config().tags is not Config().tags

    @dataclass(frozen=True)
    class Frozen(NKIObject):
        size: int
        scale: float = 1.0

    assert Frozen(3).size == 3
    with pytest.raises(AttributeError):
        Frozen(3).size = 4

    class Undecorated(Config):
        more: int = 9

    assert (Undecorated(more=1).more, Undecorated().size) == (1, 4)


def test_objects_carry_tensors_into_a_kernel(emulate, normal):
    class Pack(NKIObject):
        x: object
        scale: float

    def kernel(pack):
        out = nl.ndarray(pack.x.shape, nl.float32, buffer=nl.shared_hbm)
        tile = nl.load(pack.x)
        nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=pack.scale)
        nl.store(out, tile)
        return out

    x = normal(4, 5)
    np.testing.assert_array_equal(emulate(kernel, Pack(x=x, scale=2.0)), 2 * x)


# -- registers and loops ----------------------------------------------------------------------------------------------


def test_dynamic_loop_with_a_register_offset(emulate, normal):
    x = normal(6, 8, 4)

    def kernel(src):
        out = nl.ndarray((8, 4), nl.float32, buffer=nl.shared_hbm)
        total, tile = nl.zeros((8, 4), nl.float32), nl.ndarray((8, 4), nl.float32)

        def body(i):
            nisa.dma_copy(dst=tile, src=src.ap([[4, 8], [1, 4]], offset=0, scalar_offset=i, indirect_dim=0))
            nisa.tensor_tensor(dst=total, data1=total, data2=tile, op=nl.add)

        nl.fori_loop(1, 6, body, step=2)
        nisa.dma_copy(dst=out, src=total)
        return out

    np.testing.assert_allclose(emulate(kernel, x), x[1] + x[3] + x[5], rtol=1e-6)


def test_while_loop_checks_first_and_registers_hide_their_value(emulate):
    def kernel(count):
        out = nl.ndarray((1, 1), nl.int32, buffer=nl.shared_hbm)
        left, done = nisa.register_alloc(), nisa.register_alloc(0)
        nisa.register_load(left, count)

        def body():
            nisa.register_move(done, done + 3)
            nisa.register_move(left, left - 1)
            return left

        nl.while_loop(left, body)
        nisa.register_store(out, done)
        return out

    for n in (0, 4):
        assert emulate(kernel, np.array([[n]], np.int32))[0, 0] == 3 * n

    def peek(use):
        use(nisa.register_alloc(2))

    for use in (int, range, float):
        with pytest.raises(TypeError, match="no Python value"):
            inside(lambda use=use: peek(use))
    with pytest.raises(NkiValidationError, match="before"):
        inside(lambda: nisa.register_move(nisa.register_alloc(), nisa.register_alloc()))


def test_loop_variable_is_read_only_and_no_reorder_bars_loops():
    with pytest.raises(NkiValidationError, match="read-only"):
        inside(lambda: nl.fori_loop(0, 1, lambda i: nisa.register_move(i, 3)))

    def body():
        with nl.no_reorder():
            nl.fori_loop(0, 1, lambda i: None)

    with pytest.raises(NkiValidationError, match="no_reorder"):
        inside(body)


def test_run_time_index_is_resolved_when_used_and_bounded(emulate, normal):
    x = normal(5, 4)

    def kernel(src, where):
        out = nl.ndarray((2, 4), nl.float32, buffer=nl.shared_hbm)
        i = nl.load(where)
        view = src.select(0, i)
        tile = nl.ndarray((2, 4), nl.float32)
        nisa.dma_copy(dst=tile[0:1], src=view)
        nisa.tensor_scalar(dst=i, data=i, op0=nl.add, operand0=2.0)
        nisa.dma_copy(dst=tile[1:2], src=view)
        nl.store(out, tile)
        return out

    np.testing.assert_array_equal(emulate(kernel, x, np.array([[2]], np.int32)), x[[2, 4]])
    with pytest.raises(IndexError, match="run-time index 5"):
        emulate(kernel, x, np.array([[3]], np.int32))


# -- launches -------------------------------------------------------------------------------------------------------


def _copy(src):
    out = nl.ndarray(src.shape, src.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=src)
    return out


def test_jit_takes_options_and_runs_inline_and_directly(normal):
    inner = nki_emulator.jit(_copy, mode="baremetal", debug_kernel=True)

    @nki_emulator.jit(experimental_flags="x")
    def outer(src):
        assert nl.program_ndim() == 0
        assert nl.num_programs() == nl.num_programs(axes=0) == 1
        assert nl.num_programs((0,)) == 1
        assert nl.program_id(axis=0) == 0
        return inner(src), inner[1](src)

    x = normal(3, 4)
    for got in outer.with_schedule([("a", "b")])(x):
        np.testing.assert_array_equal(got, x)


def test_outputs_are_shared_hbm(emulate, normal):
    def kernel(src):
        out = nl.ndarray(src.shape, src.dtype, buffer=nl.hbm)
        nisa.dma_copy(dst=out, src=src)
        return out

    with pytest.raises(NkiValidationError, match="shared_hbm"):
        emulate(kernel, normal(3, 4))


def test_passed_buffers_are_updated_in_place(emulate, normal):
    def kernel(src, dst):
        nisa.dma_copy(dst=dst, src=src)
        return dst

    x = normal(3, 4)
    held = np.zeros((4, 3), F32)
    got = emulate(kernel, x.T, held)  # a strided input, an updated buffer
    np.testing.assert_array_equal(held, x.T)
    assert got is held
    wide = np.zeros((4, 6), F32)
    emulate(kernel, x.T, wide[:, ::2])
    np.testing.assert_array_equal(wide[:, ::2], x.T)


def test_torch_tensors_in_and_out():
    torch = pytest.importorskip("torch")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int32):
        x = torch.arange(12, dtype=torch.float32).reshape(3, 4).to(dtype)
        got = nki_emulator.simulate(nki_emulator.jit(_copy))(x)
        assert got.dtype == dtype
        assert torch.equal(got, x)


def test_target_comes_from_the_environment(monkeypatch):
    def version():
        found = []

        def kernel():
            found.append(nisa.get_nc_version())
            assert nl.tile_size.sbuf_fmax_bytes == {2: 176, 3: 208, 4: 240}[found[0]] * 1024

        nki_emulator.simulate(nki_emulator.jit(kernel))()
        return found[0]

    assert version() == nisa.nc_version.gen4  # the SDK's default
    for name, want in (("trn1", 2), ("inf2", 2), ("gen2", 2), ("trn2", 3), ("gen3", 3), ("trn3", 4), ("gen4", 4)):
        monkeypatch.setenv("NEURON_PLATFORM_TARGET_OVERRIDE", name)
        assert version() == nisa.nc_version(want)
    assert nisa.nc_version.gen2 < nisa.nc_version.gen3
    monkeypatch.setenv("NEURON_LOGICAL_NC_CONFIG", "1")
    with pytest.raises(NkiValidationError, match="NEURON_LOGICAL_NC_CONFIG"):
        nki_emulator.simulate(nki_emulator.jit(_copy)[2])(np.zeros((2, 2), F32))


def test_operations_need_a_kernel():
    with pytest.raises(RuntimeError, match="active kernel"):
        nl.ndarray((2, 2), nl.float32)
    with pytest.raises(RuntimeError, match="active kernel"):
        _ = nl.tile_size.sbuf_fmax_bytes
    assert nl.tile_size.pmax == 128


# -- two cores ------------------------------------------------------------------------------------------------------


def test_two_cores_share_outputs_and_exchange_tiles(emulate, normal):
    x = normal(8, 6)

    def kernel(src):
        me = nl.program_id(0)
        assert (nl.program_ndim(), nl.num_programs(0)) == (1, 2)
        out = nl.ndarray((8, 6), nl.float32, buffer=nl.shared_hbm)
        scratch = nl.ndarray((8, 6), nl.float32, buffer=nl.shared_hbm)
        mine, theirs = nl.ndarray((4, 6), nl.float32), nl.ndarray((4, 6), nl.float32)
        nisa.dma_copy(dst=mine, src=src[nl.ds(4 * me, 4)])
        nisa.sendrecv(src=mine, dst=theirs, send_to_rank=1 - me, recv_from_rank=1 - me, pipe_id=0)
        nisa.dma_copy(dst=scratch[nl.ds(4 * me, 4)], src=theirs)
        nisa.core_barrier(data=scratch, cores=(0, 1))
        whole = nl.ndarray((4, 6), nl.float32)
        nisa.dma_copy(dst=whole, src=scratch[nl.ds(4 * (1 - me), 4)])  # what the other core wrote: my own rows
        nisa.tensor_tensor(dst=whole, data1=whole, data2=mine, op=nl.add)
        nisa.dma_copy(dst=out[nl.ds(4 * me, 4)], src=whole)
        return out

    for _ in range(5):
        np.testing.assert_array_equal(emulate(kernel, x, cores=2), 2 * x)


def test_diverged_barrier_is_an_error_not_a_hang(emulate, normal):
    def kernel(src):
        out = nl.ndarray(src.shape, src.dtype, buffer=nl.shared_hbm)
        if nl.program_id(0) == 0:
            nisa.core_barrier(data=out, cores=(0, 1))
        return out

    with pytest.raises(NkiValidationError, match="diverged"):
        emulate(kernel, normal(2, 2), cores=2)


def test_an_error_on_one_core_is_the_error_reported(emulate, normal):
    def kernel(src):
        out = nl.ndarray(src.shape, src.dtype, buffer=nl.shared_hbm)
        if nl.program_id(0) == 1:
            raise ValueError("core one")
        nisa.core_barrier(data=out, cores=(0, 1))
        return out

    with pytest.raises(ValueError, match="core one"):
        emulate(kernel, normal(2, 2), cores=2)


def test_launch_sizes():
    for grid in (0, 3, (1, 2)):
        with pytest.raises(NkiValidationError):
            nki_emulator.jit(_copy)[grid]
    with pytest.raises(NkiValidationError, match="gen2"), nki_emulator.session("trn1"):
        nki_emulator.simulate(nki_emulator.jit(_copy)[2])(np.zeros((2, 2), F32))


# -- nl functions -----------------------------------------------------------------------------------------------------


def test_tile_functions(emulate, normal):
    x, w = normal(8, 16), normal(1, 16)

    def kernel(src, weight):
        a, b = nl.load(src), nl.broadcast_to(nl.load(weight), (8, 16))
        parts = [
            nl.softmax(a, axis=-1),
            nl.rms_norm(a, b, axis=1, n=16),
            nl.where(nl.greater(a, 0.0), a, nl.negative(a)),
            nl.subtract(1.0, nl.multiply(a, b)),
            nl.cos(a),
        ]
        small = [nl.mean(a, axis=1), nl.var(a, axis=1), nl.sum(a, axis=1, keepdims=True), nl.max(a, axis=1)]
        out = nl.ndarray((len(parts), 8, 16), nl.float32, buffer=nl.shared_hbm)
        more = nl.ndarray((len(small), 8, 1), nl.float32, buffer=nl.shared_hbm)
        for i, part in enumerate(parts):
            nl.store(out[i], part)
        for i, part in enumerate(small):
            nl.store(more[i], part)
        return out, more

    out, more = emulate(kernel, x, w)
    e = np.exp(x - x.max(1, keepdims=True))
    rms = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-6) * w
    want = [e / e.sum(1, keepdims=True), rms, np.abs(x), 1 - x * w, np.cos(x)]
    np.testing.assert_allclose(out, np.stack(want), rtol=2e-5, atol=1e-6)
    want = [x.mean(1), x.var(1), x.sum(1), x.max(1)]
    np.testing.assert_allclose(more[:, :, 0], np.stack(want), rtol=2e-5, atol=1e-6)


def test_identity_transpose_and_matmul(emulate, normal):
    x, y = normal(16, 24), normal(16, 20)

    def kernel(a, b):
        out = nl.ndarray((24, 20), nl.float32, buffer=nl.shared_hbm)
        eye = nl.shared_identity_matrix(16, nl.float32)
        assert nl.shared_identity_matrix(16, nl.float32) is eye
        assert nl.shared_identity_matrix(16).dtype == nl.uint8
        assert eye.buffer is nl.sbuf
        at = nl.transpose(nl.load(a))
        nl.store(out, nl.copy(nl.matmul(nl.transpose(at), nl.load(b), transpose_x=True)))
        return out

    np.testing.assert_allclose(emulate(kernel, x, y), x.T @ y, rtol=1e-5, atol=1e-5)


def test_install_aliases_the_modules():
    code = """
from isotile import nki_emulator
assert nki_emulator.install()
import nki, nki.language as nl, nki.isa as nisa, nki.isa.constants, nki.collectives, nki.typing as nt, nki.compiler
from nki.isa.constants import dge_mode, oob_mode
from nki.language import NKIObject
import numpy as np
@nki.jit
def kernel(x: nt.tensor[4, 4]):
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=x)
    return out
assert (nki.simulate(kernel)(np.ones((4, 4), np.float32)) == 1).all()
nki_emulator.uninstall()
import sys
assert "nki" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
