"""The C++ matmul family straight through `_C.plan`: layouts and sizes that steer it into each of its inner paths."""

import ctypes
import itertools
import mmap

import pytest
import torch

_C = pytest.importorskip("isotile._C")

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.int32: 5}
ISAS = [i if isinstance(i, str) else i[0] for i in _C.instruction_sets() if isinstance(i, str) or i[1]]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ACTIVATIONS = [
    lambda x: x,
    torch.relu,
    torch.nn.functional.gelu,
    lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    torch.nn.functional.silu,
    torch.sigmoid,
    torch.tanh,
]


def run(isa, op, tensors, scalars=()):
    views = [None if t is None else (CODES[t.dtype], tuple(t.shape), tuple(t.stride())) for t in tensors]
    _C.plan(isa, op, views, list(map(float, scalars)))(*tensors)


def guarded(shape, dtype, layout="rows"):
    """An output of NaN inside NaN guard bands, and a check that the bands stayed NaN."""
    order = list(range(len(shape)))
    if layout == "columns":
        order[-1], order[-2] = order[-2], order[-1]
    pad = 2 if layout == "gaps" else 1
    numel = pad * pad * max(1, torch.Size(shape).numel()) + 128
    base = torch.full((numel,), float("nan"), dtype=dtype)
    strides, step = [0] * len(shape), pad
    for d in reversed(order):
        strides[d] = step
        step *= max(1, shape[d])
    out = base.as_strided(shape, strides, 64)

    def check():
        rest = base.clone()
        rest.as_strided(shape, strides, 64).fill_(float("nan"))
        assert rest.isnan().all(), "wrote outside its output"

    return out, check


def draw(shape, dtype, layout, generator, scale=1.0):
    """A random tensor in one of the layouts that the packing tells apart."""
    if layout == "columns":
        shape = (*shape[:-2], shape[-1], shape[-2])
    elif layout == "gaps":
        shape = (*shape[:-1], shape[-1] * 2)
    x = (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
    return x.mT if layout == "columns" else x[..., ::2] if layout == "gaps" else x


def tolerance(a, b, out_dtype, truth):
    """Rounding of k products and sums one after another in the accumulator, then of the result."""
    wide = a.dtype == torch.float64
    unit = 2.0**-53 if wide else 2.0**-24
    k = a.shape[-1]
    magnitude = a.double().abs() @ b.double().abs()
    tiny = 0.0 if wide else k * 2.0**-120
    return (k + 2) * unit * magnitude + torch.finfo(out_dtype).eps * truth.abs() + tiny + torch.finfo(out_dtype).tiny


def check_matmul(isa, a, b, out_dtype=None, bias=None, residual=None, activation=0, preactivation=False, layout="rows"):
    out_dtype = out_dtype or a.dtype
    loops = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    shape = (*loops, a.shape[-2], b.shape[-1])
    a, b = a.expand(*loops, *a.shape[-2:]), b.expand(*loops, *b.shape[-2:])
    y, y_check = guarded(shape, out_dtype, layout)
    z, z_check = guarded(shape, out_dtype, layout) if preactivation else (None, lambda: None)
    run(isa, "matmul", [a, b, bias, residual, y, z], [activation])
    pre = a.double() @ b.double()
    if bias is not None:
        pre = pre + bias.double()
    bound = tolerance(a, b, out_dtype, pre)
    if bias is not None:
        bound = bound + 2.0**-23 * bias.double().abs()
    if preactivation:
        assert ((z.double() - pre).abs() <= bound).all()
        z_check()
    truth = ACTIVATIONS[activation](pre)
    if activation:
        bound = 1.2 * bound + 2.0**-20 * (1 + pre.abs())
    if residual is not None:
        bound = bound + 2.0**-22 * residual.double().abs() + torch.finfo(out_dtype).eps * residual.double().abs()
        truth = truth + residual.double()
    error = (y.double() - truth).abs()
    assert (error <= bound).all(), (error / bound).max()
    y_check()
    return y


SIZES = [
    (1, 1, 1),
    (1, 70, 33),
    (2, 16, 64),
    (3, 17, 65),
    (4, 64, 200),
    (5, 128, 130),
    (6, 96, 64),
    (7, 63, 1),
    (16, 300, 257),
    (17, 1025, 70),
    (64, 64, 64),
    (67, 129, 131),
    (33, 1600, 40),
    (1, 1100, 300),
    (9, 2049, 19),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_layouts(isa, dtype):
    g = torch.Generator().manual_seed(1)
    for i, (m, k, n) in enumerate(SIZES):
        for la, lb in itertools.product(("rows", "columns", "gaps"), repeat=2):
            out = ("rows", "columns", "gaps")[i % 3]
            check_matmul(isa, draw((m, k), dtype, la, g), draw((k, n), dtype, lb, g), layout=out)


@pytest.mark.parametrize("m", [3, 40])
@pytest.mark.parametrize("isa", ISAS)
def test_rows_of_halves_of_pairs(isa, m):
    """bfloat16 goes two elements at a time, from rows as they lie where each begins with a whole pair."""
    g = torch.Generator().manual_seed(12)
    n = 70
    for k, row, batch, offset in [
        (64, 64, m * 64, 0),
        (63, 64, m * 64, 0),
        (64, 65, m * 65, 0),
        (64, 64, m * 64 + 1, 0),
        (64, 64, m * 64, 1),
        (1026, 1028, m * 1028, 2),
    ]:
        base = torch.full((3 * batch + offset,), float("nan")).bfloat16()
        a = base.as_strided((3, m, k), (batch, row, 1), offset).copy_(torch.randn((3, m, k), generator=g))
        check_matmul(isa, a, torch.randn((k, n), generator=g).bfloat16(), torch.float32)
        check_matmul(isa, a, torch.randn((3, k, n), generator=g).bfloat16(), torch.float32)
        check_matmul(isa, a[2], torch.randn((k, n), generator=g).bfloat16(), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_epilogue(isa, dtype):
    g = torch.Generator().manual_seed(2)
    out_dtype = dtype if dtype == torch.float64 else torch.float32
    for (m, k, n), activation in itertools.product([(1, 40, 70), (5, 600, 33), (13, 1030, 150)], range(7)):
        for extra in (torch.float32, dtype):
            check_matmul(
                isa, draw((m, k), dtype, "rows", g, k**-0.5), draw((k, n), dtype, "columns", g), out_dtype,
                bias=draw((n,), extra, "rows", g), residual=draw((m, n), extra, "gaps", g), activation=activation,
                preactivation=True, layout="gaps" if extra == dtype else "rows",
            )  # fmt: skip


@pytest.mark.parametrize("isa", ISAS)
def test_loops_and_zero_sizes(isa):
    g = torch.Generator().manual_seed(3)
    for dtype in (torch.float32, torch.bfloat16):
        for sa, sb in [((3, 1, 5, 20), (4, 20, 30)), ((2, 3, 4, 70), (70, 90)), ((3, 2, 1, 9), (3, 1, 9, 65)),
                       ((30, 8, 8), (30, 8, 8)), ((2, 1, 3, 4), (1, 5, 4, 3)), ((0, 3, 4), (4, 5)), ((2, 0, 4), (4, 5)),
                       ((2, 3, 0), (0, 5)), ((2, 3, 4), (4, 0))]:  # fmt: skip
            a, b = draw(sa, dtype, "rows", g), draw(sb, dtype, "rows", g)
            check_matmul(isa, a, b)
            check_matmul(isa, a, b.mT.contiguous().mT, bias=draw((sb[-1],), dtype, "rows", g), activation=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_small_integers_are_exact_and_rows_do_not_depend_on_the_batch(isa, dtype):
    g = torch.Generator().manual_seed(4)
    for k, n, transposed in itertools.product((64, 1000, 2500), (64, 130, 300), (False, True)):
        a = torch.randint(-4, 5, (70, k), generator=g).to(dtype)
        b = torch.randint(-4, 5, (k, n), generator=g).to(dtype)
        b = b.mT.contiguous().mT if transposed else b
        y = torch.empty(70, n, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        run(isa, "matmul", [a, b, None, None, y, None], [0])
        assert torch.equal(y.double(), a.double() @ b.double())
        a, b = torch.randn(70, k, generator=g).to(dtype), torch.randn(b.shape, generator=g).to(dtype)
        b = b.mT.contiguous().mT if transposed else b
        run(isa, "matmul", [a, b, None, None, y, None], [0])
        for rows in (1, 2, 3, 4, 5, 8, 16, 17, 33):
            part = torch.empty(rows, n, dtype=y.dtype)
            run(isa, "matmul", [a[7 : 7 + rows], b, None, None, part, None], [0])
            assert torch.equal(part, y[7 : 7 + rows]), (k, n, transposed, rows)
        for layout in ("rows", "columns", "gaps"):  # neither on b's layout
            other = torch.empty(*b.shape, 2, dtype=dtype)[..., 0] if layout == "gaps" else torch.empty_like(b)
            other = other if layout != "columns" else torch.empty(n, k, dtype=dtype).mT
            other.copy_(b)
            for rows in (1, 3, 16, 70):
                part = torch.empty(rows, n, dtype=y.dtype)
                run(isa, "matmul", [a[:rows], other, None, None, part, None], [0])
                assert torch.equal(part, y[:rows]), (k, n, layout, rows)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("isa", ISAS[-1:])
def test_many_chunks(isa, dtype):
    """Sizes at which tiles cut k, share a packed side, and cut both sides into tasks; either operand on either side."""
    g = torch.Generator().manual_seed(7)
    for (m, k, n), layout in itertools.product(
        [(530, 1100, 70), (70, 1100, 530), (1050, 300, 40)], ("rows", "columns")
    ):
        a, b = (torch.randint(-4, 5, s, generator=g).to(dtype) for s in ((m, k), (k, n)))
        b = b.mT.contiguous().mT if layout == "columns" else b
        y, check = guarded((m, n), torch.float32)
        run(isa, "matmul", [a, b, None, None, y, None], [0])
        assert torch.equal(y, a.float() @ b.float())
        a = draw((m, k), dtype, "rows", g)
        run(isa, "matmul", [a, b, None, None, y, None], [0])
        alone = torch.empty(1, n)
        run(isa, "matmul", [a[m // 2 : m // 2 + 1], b, None, None, alone, None], [0])
        assert torch.equal(alone, y[m // 2 : m // 2 + 1])
        check()


def at_the_end_of_memory(x):
    """A copy of a matrix whose last element is the last that may be read: beyond it lies a page without access."""
    page, libc = mmap.PAGESIZE, ctypes.CDLL(None, use_errno=True)
    rows = x.mT if x.stride(-1) != 1 else x
    pages = -(-rows.numel() * x.element_size() // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    end = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * page
    assert libc.mprotect(ctypes.c_void_p(end), ctypes.c_size_t(page), 0) == 0
    flat = torch.frombuffer(memory, dtype=torch.uint8)[: pages * page].view(x.dtype)
    copy = flat[-rows.numel() :].view(rows.shape).copy_(rows)
    return copy.mT if x.stride(-1) != 1 else copy


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_nothing_beyond_the_last_element_is_read(isa, dtype):
    g = torch.Generator().manual_seed(9)
    for (m, k, n), la, lb in itertools.product(
        [(1, 64, 33), (5, 65, 64), (17, 96, 47), (40, 33, 70)], ("rows", "columns"), ("rows", "columns")
    ):
        a, b = (at_the_end_of_memory(draw(s, dtype, layout, g)) for s, layout in (((m, k), la), ((k, n), lb)))
        check_matmul(isa, a, b)


IN_PLACE = [  # m, k, n: at what size b is no longer read in place, and every width of the last vectors
    *((m, k, n) for m in (1, 4, 16, 17) for k in (0, 1, 767, 768, 769, 776, 1536) for n in (17, 63, 64, 65)),
    *((m, 256, n) for m in (16, 17) for n in (127, 128, 129)),
    *((m, 512, n) for m in (1, 16, 17) for n in (511, 512, 513)),
    *((m, 5, n) for m in (1, 2, 3, 5, 6, 7, 13) for n in range(1, 70)),
    *((m, k, n) for m in (100, 250) for k, n in ((768, 64), (769, 130), (1540, 200))),  # b in place, or on its way
    *((2100, k, 64) for k in (600, 776)),  # more than one block of rows, whatever the cache
]


@pytest.mark.parametrize("isa", ISAS)
def test_products_read_in_place_have_the_bits_of_packed_ones(isa):
    """b by columns is packed, b by rows only if it is large. Before each of its rows lies NaN, after the last no page.

    Likewise after each row of a result: NaN, which stays there. Rows of a are packed if they lie across, or so far
    apart that they would meet in a cache.
    """
    g = torch.Generator().manual_seed(10)
    for m, k, n in IN_PLACE:
        a, b = draw((m, k), torch.float32, "rows", g), draw((k, n), torch.float32, "columns", g)
        wide = torch.full((k, n + 3), float("nan"))
        wide[:, 3:] = b
        far = torch.full((m, 1 << 14), float("nan"))[:, :k].copy_(a)
        apart = at_the_end_of_memory(wide)[:, 3:] if k > 0 else wide[:, 3:]
        bias, residual = draw((n,), torch.float32, "rows", g), draw((m, n), torch.float32, "gaps", g)
        for extra in ((None, None), (bias, residual)):
            packed = torch.empty(m, n)
            run(isa, "matmul", [a, b, *extra, packed, None], [0])
            for left, right in ((a, apart), (a.mT.contiguous().mT, apart), (a, apart.clone()), (far, apart)):
                y, check = guarded((m, n + 3), torch.float32)
                run(isa, "matmul", [left, right, *extra, y[:, :n], None], [0])
                assert torch.equal(y[:, :n], packed), (m, k, n)
                assert y[:, n:].isnan().all(), (m, k, n)
                check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_infinities_everywhere(isa, dtype):
    """More than one row and column that are not finite, neighbours too, with everything that an epilogue does."""
    g = torch.Generator().manual_seed(8)
    for layout, out in itertools.product(("rows", "columns", "gaps"), ("rows", "columns", "gaps")):
        a, b = draw((3, 21, 70), dtype, layout, g), draw((70, 90), dtype, layout, g)
        a[0, 4:6, 3], a[1, 20, 69], a[2, 0, 0] = float("inf"), float("-inf"), float("nan")
        b[5, 8:11], b[69, 89] = float("inf"), float("-inf")
        bias, residual = draw((90,), dtype, "rows", g), draw((3, 21, 90), dtype, "gaps", g)
        y, check = guarded((3, 21, 90), torch.promote_types(dtype, torch.float32), out)
        run(isa, "matmul", [a, b.expand(3, 70, 90), bias, residual, y, None], [1])
        z = a.double() @ b.double() + bias.double()
        truth = z.relu() + residual.double()
        assert torch.equal(y.isnan(), truth.isnan()) and torch.equal(y.isinf(), truth.isinf())
        assert torch.equal(y.double()[truth.isinf()], truth[truth.isinf()])
        check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_infinity_stay_in_their_row_and_column(isa, dtype):
    g = torch.Generator().manual_seed(5)
    for m, transposed in itertools.product((1, 3, 20), (False, True)):
        a, b = draw((m, 90), dtype, "rows", g), draw((90, 100), dtype, "columns" if transposed else "rows", g)
        a[0, 89], b[3, 99], b[89, 5] = float("nan"), float("inf"), float("inf")
        y, check = guarded((m, 100), dtype)
        run(isa, "matmul", [a, b, None, None, y, None], [0])
        truth = a.double() @ b.double()
        assert torch.equal(y.isnan(), truth.isnan()) and torch.equal(y.isinf(), truth.isinf())
        check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS)
def test_grouped(isa, dtype):
    g = torch.Generator().manual_seed(6)
    for (total, k, n), ends, layout in itertools.product(
        [(40, 30, 50), (37, 65, 130)],
        [[10, 10, 25, 37], [0, 0, 0, 0], [1, 2, 3, 4], [37, 37, 37, 37]],
        ("rows", "columns", "gaps"),
    ):
        offsets = torch.tensor(ends, dtype=torch.int32)
        a, b = draw((total, k), dtype, layout, g), draw((4, k, n), dtype, layout, g)
        grad = draw((total, n), dtype, layout, g)
        starts = [0, *ends]
        y, y_check = guarded((total, n), dtype)
        grad_a, a_check = guarded((total, k), dtype, "columns")
        grad_b, b_check = guarded((4, k, n), dtype, "gaps")
        run(isa, "grouped_matmul", [a, b, offsets, y])
        run(isa, "grouped_matmul_backward", [grad, a, b, offsets, grad_a, grad_b])
        for i in range(4):
            rows = slice(starts[i], starts[i + 1])
            for out, left, right in (
                (y[rows], a[rows], b[i]), (grad_a[rows], grad[rows], b[i].mT), (grad_b[i], a[rows].mT, grad[rows])
            ):  # fmt: skip
                truth = left.double() @ right.double()
                assert ((out.double() - truth).abs() <= tolerance(left, right, dtype, truth)).all()
        assert (y[ends[-1] :] == 0).all() and (grad_a[ends[-1] :] == 0).all()
        y_check(), a_check(), b_check()
        alone, check = guarded((4, k, n), dtype)
        mixed = grad.to(torch.float32) if dtype != torch.float64 else grad
        run(isa, "grouped_matmul_backward", [mixed, a, b, offsets, None, alone])
        assert not alone.isnan().any()
        check()
