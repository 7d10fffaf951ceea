"""Kernels as others write them for NKI 0.6, run unmodified through `import nki`: varied idioms, NumPy's answers."""

from __future__ import annotations

import dataclasses
import importlib.util
import pathlib
import typing

import ml_dtypes
import numpy as np
import pytest
import torch

from isotile import nki_emulator

_spec = importlib.util.spec_from_file_location("nki_adapter", pathlib.Path(__file__).parent / "adapter.py")
adapter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(adapter)  # installs the alias that the next lines import

import nki  # noqa: E402
import nki.isa as nisa  # noqa: E402
import nki.language as nl  # noqa: E402
import nki.typing as nt  # noqa: E402
from nki.isa import oob_mode, reduce_cmd  # noqa: E402
from nki.isa.constants import engine  # noqa: E402

F32, BF16 = np.float32, ml_dtypes.bfloat16


def run(kernel, *arrays, target="gen3", **kwargs):
    with nki_emulator.session(target):
        return nki.simulate(kernel)(*arrays, **kwargs)


def agree(got, wanted, tolerance=1e-5):
    got, wanted = np.asarray(got, F32), np.asarray(wanted, F32)
    assert got.shape == wanted.shape
    np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance)


def load(x):
    tile = nl.ndarray(x.shape, dtype=x.dtype, buffer=nl.sbuf)
    nisa.dma_copy(dst=tile, src=x)
    return tile


def store(tile):
    if nl.is_psum(tile.buffer):
        copied = nl.ndarray(tile.shape, tile.dtype)
        nisa.tensor_copy(copied, tile)
        tile = copied
    out = nl.ndarray(tile.shape, tile.dtype, buffer=nl.shared_hbm)
    nisa.dma_copy(dst=out, src=tile)
    return out


def test_tiled_matmul_in_affine_ranges(normal):
    @nki.jit
    def kernel(lhs_t, rhs):
        k, m = lhs_t.shape
        _, n = rhs.shape
        tile_m, tile_k, tile_n = nl.tile_size.gemm_stationary_fmax, nl.tile_size.pmax, nl.tile_size.gemm_moving_fmax
        out = nl.ndarray((m, n), dtype=lhs_t.dtype, buffer=nl.shared_hbm)
        for i in nl.affine_range(m // tile_m):
            for j in nl.sequential_range(n // tile_n):
                acc = nl.ndarray((tile_m, tile_n), nl.float32, buffer=nl.psum)
                for s in nl.static_range(0, k // tile_k, 1):
                    a = load(lhs_t[s * tile_k : (s + 1) * tile_k, i * tile_m : (i + 1) * tile_m])
                    b = load(rhs[nl.ds(s * tile_k, tile_k), nl.ds(j * tile_n, tile_n)])
                    nisa.nc_matmul(dst=acc, stationary=a, moving=b)
                result = nl.ndarray(acc.shape, dtype=out.dtype, buffer=nl.sbuf)
                nisa.tensor_copy(dst=result, src=acc)
                nisa.dma_copy(dst=out[i * tile_m : (i + 1) * tile_m, j * tile_n : (j + 1) * tile_n], src=result)
        return out

    a, b = normal(256, 256).astype(BF16), normal(256, 512).astype(BF16)
    agree(run(kernel, a, b), (a.astype(F32).T @ b.astype(F32)).astype(BF16), 2e-2)


def test_results_by_nl_functions_and_annotations(normal):
    @nki.jit
    def kernel(x: nt.tensor[128, 64], y: nt.tensor) -> nt.tensor:
        a, b = nl.load(x), nl.load(y)
        d = nl.exp(nl.negative(nl.multiply(nl.add(a, b), 0.5)))
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        sums = nl.ndarray((128, 1), x.dtype, buffer=nl.shared_hbm)
        nl.store(out, d)
        nl.store(dst=sums, value=nl.sum(d, axis=-1))
        return out, sums

    x, y = normal(128, 64), normal(128, 64)
    got, sums = run(kernel, x, y)
    want = np.exp(-(x + y) / 2)
    agree(got, want)
    agree(sums, want.sum(1, keepdims=True), 1e-4)


def test_dtypes_by_name_numpy_and_nl(normal):
    @nki.jit
    def kernel(x):
        tiles = [
            nl.ndarray((4, 4), dtype="float32"),
            nl.ndarray((4, 4), dtype=np.float32, buffer=nl.sbuf),
            nl.zeros((4, 4), dtype=x.dtype),
            nl.ndarray((4, 4), dtype=ml_dtypes.bfloat16),
        ]
        for tile in tiles:
            nisa.memset(tile, 1)
        assert all(t.dtype == nl.float32 and t.dtype == "float32" and t.dtype == np.float32 for t in tiles[:3])
        assert str(tiles[3].dtype) == "bfloat16" and tiles[3].dtype in (nl.bfloat16, nl.float16)
        return tuple(store(t) for t in tiles)

    for got in run(kernel, normal(4, 4)):
        agree(got, np.ones((4, 4)))


def test_configuration_objects_and_buffers_kept_in_them(normal):
    class Config(nl.NKIObject):
        scale: float
        bias: float = 1.0
        extra: typing.Any = None

    @dataclasses.dataclass(frozen=True)
    class Shape(nl.NKIObject):
        rows: int
        columns: int = 4
        names: list = dataclasses.field(default_factory=list)

    class Pool(nl.NKIObject):
        def __init__(self, count):
            self.count, self.tiles = count, []

        def take(self, shape, dtype=nl.float32):
            self.tiles.append(nl.ndarray(shape, dtype, buffer=nl.sbuf, address=(0, 0)))
            return self.tiles[-1]

    def helper(pool, x, *, scale, bias=0.0):
        tile = pool.take(x.shape)
        nisa.dma_copy(tile, x)
        nisa.tensor_scalar(tile, tile, nl.multiply, scale, op1=nl.add, operand1=bias)

    @nki.jit(mode="auto", debug_kernel=True)
    def kernel(x, config=None, count=2, **rest):
        assert config.extra is None and Shape(rows=3).names == []
        pool = Pool(count)
        helper(pool, x, scale=config.scale, bias=config.bias)
        return store(pool.tiles[0])

    x = normal(4, 4)
    agree(run(kernel, x, config=Config(scale=3.0), count=1), 3 * x + 1)


def test_index_forms(normal):
    @nki.jit
    def kernel(x):
        tile = load(x.reshape((128, 4, 64)))
        turned = nl.ndarray((128, 4, 64), nl.float32)
        for j in range(4):
            nisa.tensor_copy(dst=turned[:, j, :], src=tile[:, -1 - j])
        out = nl.ndarray((128, 4, 64), nl.float32, buffer=nl.shared_hbm)
        for j in range(4):
            nisa.dma_copy(dst=out[:, j, 0:32], src=turned[:, j, nl.ds(32, 32)])
            nisa.dma_copy(dst=out[0:128, j, 32:], src=turned[..., j, :32])
        return out

    x = normal(128, 256)
    want = x.reshape(128, 4, 64)[:, ::-1]
    agree(run(kernel, x), np.concatenate([want[..., 32:], want[..., :32]], -1))


def test_access_patterns_and_rearranged_views(normal):
    @nki.jit
    def kernel(x):
        tile = load(x)
        a, b, c = (nl.ndarray(s, nl.float32) for s in ((128, 4, 64), (128, 64), (64, 128)))
        nisa.tensor_copy(dst=a, src=tile.ap([[256, 128], [1, 4], [4, 64]]))
        nisa.tensor_copy(dst=b, src=tile.ap(pattern=[[256, 128], [0, 64]], offset=3))
        nisa.dma_copy(dst=c, src=x.ap([[1, 64], [256, 128]], offset=5))
        d = nl.ndarray((128, 64, 4), nl.float32)
        nisa.tensor_copy(dst=d, src=tile.rearrange(("p", ("a", "b")), ("p", "b", "a"), {"a": 4}))
        return store(a), store(b), store(c), store(d)

    x = normal(128, 256)
    a, b, c, d = run(kernel, x)
    agree(a, x.reshape(128, 64, 4).transpose(0, 2, 1))
    agree(b, np.repeat(x[:, 3:4], 64, 1))
    agree(c, x[:, 5:69].T)
    agree(d, x.reshape(128, 4, 64).transpose(0, 2, 1))


def test_heads_are_gathered_by_permuted_hbm_views(normal):
    @nki.jit
    def kernel(x):
        batch, heads, tokens, width = x.shape
        out = nl.ndarray((batch, tokens, heads * width), x.dtype, buffer=nl.shared_hbm)
        by_head = out.reshape((batch, tokens, heads, width)).permute((0, 2, 1, 3))
        for b in range(batch):
            for h in range(heads):
                nisa.dma_copy(dst=by_head[b, h], src=load(x[b, h]))
        return out

    x = normal(2, 3, 16, 8)
    agree(run(kernel, x), x.transpose(0, 2, 1, 3).reshape(2, 16, 24))


def test_device_loop_with_a_loaded_trip_count(normal):
    @nki.jit
    def kernel(x, count):
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=x)
        trips = nisa.register_alloc()
        nisa.register_load(trips, load(count.reshape((1, 1))))

        def body(i):
            tile = nl.ndarray((128, 64), nl.float32)
            nisa.dma_copy(dst=tile, src=x[nl.ds(i * 128, 128), :])
            nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=3.0)
            nisa.dma_copy(dst=out.ap([[64, 128], [1, 64]], scalar_offset=i * 128, indirect_dim=0), src=tile)

        nl.fori_loop(0, trips, body)
        return out

    x = normal(512, 64)
    want = x.copy()
    want[:384] *= 3
    agree(run(kernel, x, np.array([3], np.int32)), want)


def test_two_cores_exchange_sums(normal):
    @nki.jit
    def kernel(x):
        cores, me = nl.num_programs(axes=0), nl.program_id(axis=0)
        rows = x.shape[0] // cores
        out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
        tile = load(x[me * rows : (me + 1) * rows])
        mine, other = nl.ndarray((rows, 1), nl.float32), nl.ndarray((rows, 1), nl.float32)
        nisa.tensor_reduce(dst=mine, op=nl.add, data=tile, axis=1)
        nisa.sendrecv(src=mine, dst=other, send_to_rank=1 - me, recv_from_rank=1 - me, pipe_id=0)
        nisa.tensor_tensor(dst=mine, data1=mine, data2=other, op=nl.add)
        nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=mine)
        nisa.dma_copy(dst=out[nl.ds(me * rows, rows), :], src=tile)
        nisa.core_barrier(out, (0, 1))
        return out

    x = normal(128, 64)
    agree(run(kernel[2], x), x * np.tile(x[:64].sum(1) + x[64:].sum(1), 2)[:, None], 1e-4)


def test_gather_and_scatter_by_a_vector_of_rows(normal):
    @nki.jit
    def kernel(x, index):
        rows = load(index)
        tile = nl.ndarray((64, 32), nl.float32)
        nisa.memset(tile, 0)
        pattern = [[32, 64], [1, 32]]
        nisa.dma_copy(
            dst=tile,
            src=x.ap(pattern=pattern, offset=0, vector_offset=rows, indirect_dim=0),
            dge_mode=nisa.dge_mode.swdge,
            oob_mode=oob_mode.skip,
        )
        out = nl.ndarray((100, 32), nl.float32, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=nl.zeros((100, 32), nl.float32))
        nisa.dma_copy(dst=out.ap(pattern, vector_offset=rows), src=tile, oob_mode=oob_mode.skip)
        return out

    index = np.random.default_rng(3).permutation(100)[:64].astype(np.int32)[:, None]
    index[5] = 1000
    x = normal(100, 32)
    want = np.zeros_like(x)
    kept = index[index < 100]
    want[kept] = x[kept]
    agree(run(kernel, x, index), want)


def test_gathering_transpose_takes_columns_of_indices(normal):
    @nki.jit
    def kernel(table, index):
        out = nl.ndarray((64, 256), nl.bfloat16)
        rows = table.ap([[64, 256], [1, 64]], vector_offset=load(index))
        nisa.dma_transpose(dst=out, src=rows, axes=(1, 0), dge_mode=nisa.dge_mode.swdge)
        return store(out)

    table = normal(300, 64).astype(BF16)
    index = np.random.default_rng(4).integers(0, 300, (128, 2)).astype(np.uint32)
    agree(run(kernel, table, index), table[index.T.reshape(-1)].T)


@pytest.mark.parametrize("group", [16, 32])
def test_indirect_elements_snake_over_the_engines_group(normal, group):
    @nki.jit
    def vector(x, index, weight):
        tile = nl.ndarray((128, 32), nl.float32)
        nisa.tensor_copy(tile, load(x).indirect(load(index), 32))
        return store(tile)

    @nki.jit
    def tensor(x, index, weight):
        acc = nl.ndarray((16, 32), nl.float32, buffer=nl.psum)
        nisa.nc_matmul(acc, load(weight), load(x).indirect(load(index), 32))
        return store(acc)

    x, weight = normal(128, 64), normal(128, 16)
    index = np.random.default_rng(5).integers(0, 64, (128, 32 // group)).astype(np.uint16)
    picked = np.stack([x[p, index[p // group * group :][:group].T.reshape(-1)] for p in range(128)])
    want = picked if group == 16 else weight.T @ picked
    agree(run(vector if group == 16 else tensor, x, index, weight, target="gen4"), want, 1e-4)


def test_flash_attention_tile_with_positional_arguments(normal):
    @nki.jit
    def kernel(q, k, v, scale=0.125):
        width, queries = q.shape
        keys = k.shape[1]
        q_tile, k_tile = load(q), load(k)
        out = nl.ndarray((queries, width), nl.float32, buffer=nl.shared_hbm)
        for i in range(queries // 128):
            product = nl.ndarray((128, keys), nl.float32, buffer=nl.psum)
            nisa.nc_matmul(product, q_tile[:, i * 128 : (i + 1) * 128], k_tile)
            score = nl.ndarray((128, keys), nl.float32)
            nisa.tensor_copy(score, product)
            nisa.affine_select(score, [[-1, keys]], 1, score, -9e4, nl.greater_equal, offset=i * 128)
            top, total = nl.ndarray((128, 1), nl.float32), nl.ndarray((128, 1), nl.float32)
            nisa.tensor_reduce(top, nl.maximum, score, axis=1, negate=True)
            nisa.tensor_scalar(top, top, nl.multiply, scale)
            power = nl.ndarray((128, keys), nl.bfloat16)
            nisa.activation(
                dst=power, op=nl.exp, data=score, bias=top, scale=scale, reduce_op=nl.add, reduce_res=total,
                reduce_cmd=reduce_cmd.reset_reduce,
            )  # fmt: skip
            acc = nl.ndarray((128, width), nl.float32, buffer=nl.psum)
            for j in range(keys // 128):
                bank = nl.ndarray((128, 128), nl.bfloat16, buffer=nl.psum)
                nisa.nc_transpose(dst=bank, data=power[:, nl.ds(j * 128, 128)], engine=engine.tensor)
                turned, values = nl.ndarray((128, 128), nl.bfloat16), nl.ndarray((128, width), nl.bfloat16)
                nisa.tensor_copy(turned, bank)
                nisa.dma_copy(values, v[j * 128 : (j + 1) * 128, :])
                nisa.nc_matmul(acc, turned, values)
            nisa.reciprocal(total, total)
            result = nl.ndarray((128, width), nl.float32)
            nisa.tensor_scalar(dst=result, data=acc, op0=nl.multiply, operand0=total)
            nisa.dma_copy(out[i * 128 : (i + 1) * 128], result)
        return out

    q, k, v = normal(64, 256), normal(64, 256), normal(256, 64)
    score = np.where(np.tril(np.ones((256, 256), bool)), q.T @ k / 8, -np.inf)
    weight = np.exp(score - score.max(1, keepdims=True))
    agree(run(kernel, q, k, v), weight @ v / weight.sum(1, keepdims=True), 2e-2)


def test_layer_norm_with_broadcast_rows(normal):
    @nki.jit
    def kernel(x, gain, shift):
        rows, width = x.shape
        tile = load(x)
        chunks = (width + 511) // 512
        stats, both = nl.ndarray((rows, chunks, 6), nl.float32), nl.ndarray((rows, 2), nl.float32)
        for c in range(chunks):
            nisa.bn_stats(dst=stats[:, c, :], data=tile[:, c * 512 : min(width, c * 512 + 512)])
        nisa.bn_aggr(dst=both, data=stats)
        rstd, eps = nl.ndarray((rows, 1), nl.float32), nl.full((rows, 1), 1e-5, nl.float32)
        nisa.activation(dst=rstd, op=nl.rsqrt, data=both[:, 1:2], bias=eps)
        y = nl.ndarray((rows, width), nl.float32)
        nisa.tensor_scalar(y, tile, nl.subtract, both[:, 0:1], op1=nl.multiply, operand1=rstd)
        g, b = nl.ndarray((rows, width), nl.float32), nl.ndarray((rows, width), nl.float32)
        nisa.dma_copy(dst=g, src=gain.reshape((1, width)).broadcast(0, rows))
        nisa.dma_copy(dst=b, src=shift.ap([[0, rows], [1, width]]))
        nisa.tensor_tensor(y, y, g, nl.multiply)
        nisa.tensor_tensor(y, y, b, nl.add)
        return store(y)

    x, g, b = normal(128, 1000), normal(1000), normal(1000)
    agree(run(kernel, x, g, b), (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-5) * g + b, 1e-4)


def test_sixteen_largest_in_two_rounds(normal):
    @nki.jit
    def kernel(x):
        values, places = nl.ndarray((16, 16), nl.float32), nl.ndarray((16, 16), nl.uint32)
        left = load(x)
        for r in range(2):
            found = values[:, r * 8 : (r + 1) * 8]
            nisa.max8(dst=found, src=left)
            nisa.nc_find_index8(dst=places[:, r * 8 : (r + 1) * 8], data=left, vals=found)
            rest = nl.ndarray(x.shape, nl.float32)
            nisa.nc_match_replace8(dst=rest, data=left, vals=found, imm=float("-inf"))
            left = rest
        return store(values), store(places)

    x = normal(16, 64)
    values, places = run(kernel, x)
    want = np.argsort(-x, 1)[:, :16]
    agree(values, np.take_along_axis(x, want, 1))
    np.testing.assert_array_equal(places, want)


def test_mx_quantised_matmul(normal):
    @nki.jit
    def kernel(a, b):
        packed, scales = [], []
        for x, dtype, kind in ((a, nl.float8_e4m3fn_x4, nl.uint8), (b, nl.float8_e5m2_x4, nl.float8_e8m0fnu)):
            tile = load(x)
            packed.append(nl.ndarray((128, tile.shape[1] // 4), dtype))
            scales.append(nl.ndarray((128, tile.shape[1] // 4), kind))
            nisa.quantize_mx(dst=packed[-1], src=tile, dst_scale=scales[-1])
        acc = nl.ndarray((64, 128), nl.float32, buffer=nl.psum)
        nisa.nc_matmul_mx(acc, packed[0], packed[1], scales[0], scales[1])
        return store(acc)

    a, b = normal(128, 256).astype(BF16), normal(128, 512).astype(BF16)
    left, right = (x.astype(F32).reshape(128, -1, 4).transpose(0, 2, 1).reshape(512, -1) for x in (a, b))
    want = left.T @ right
    assert np.abs(run(kernel, a, b, target="gen4") - want).max() < 0.1 * np.abs(want).max()


def test_in_place_outputs_tuples_dicts_and_inline_kernels(normal):
    @nki.jit
    def inner(x, out):
        nisa.dma_copy(dst=out, src=load(x))

    @nki.jit
    def kernel(pair, options, out):
        tile = load(pair[0])
        nisa.tensor_tensor(tile, tile, load(pair[1]), nl.add)
        nisa.tensor_scalar(tile, tile, nl.multiply, options["scale"])
        scratch = nl.ndarray(tile.shape, tile.dtype, buffer=nl.hbm)
        nisa.dma_copy(scratch, tile)
        inner(scratch, out)

    x, y, out = normal(4, 4), normal(4, 4), np.zeros((4, 4), F32)
    assert run(kernel, (x, y), {"scale": 2.0}, out) is None
    agree(out, 2 * (x + y))


def test_torch_tensors_keep_their_dtype():
    @nki.jit
    def kernel(x):
        tile = load(x)
        nisa.activation(dst=tile, op=nl.gelu_apprx_tanh, data=tile)
        return store(tile)

    x = torch.linspace(-3, 3, 32).reshape(4, 8).bfloat16()
    got = nki.simulate(kernel)(x)
    want = torch.nn.functional.gelu(x.float(), approximate="tanh").bfloat16()
    torch.testing.assert_close(got, want, rtol=2**-7, atol=2**-7)


def test_math_needs_no_import(normal):
    """The parser front end injected it; older kernels, and the helpers that they call, rely on that."""
    source = """
import nki, nki.language as nl, nki.isa as nisa
def half(n):
    return math.ceil(n / 2)
@nki.jit
def kernel(x):
    tile = nl.load(x)
    nisa.tensor_scalar(dst=tile, data=tile, op0=nl.multiply, operand0=half(3) / math.sqrt(16))
    out = nl.ndarray(x.shape, x.dtype, buffer=nl.shared_hbm)
    nl.store(out, tile)
    return out
"""
    names: dict = {}
    exec(compile(source, "kernel", "exec"), names)
    x = normal(4, 16)
    agree(run(names["kernel"], x), x / 2)
    with pytest.raises(NameError):
        eval("math", {})  # outside a kernel nothing was added


@pytest.mark.parametrize(
    ("module", "name", "hint"),
    [(nl, "arange", "nl.ds"), (nl, "par_dim", "partition dim"), (nisa, "tensor_copy_dynamic_src", "tensor_copy"),
     (nki, "benchmark", "nki.simulate")],
)  # fmt: skip
def test_removed_names_say_what_replaced_them(module, name, hint):
    with pytest.raises(AttributeError, match=hint):
        getattr(module, name)
