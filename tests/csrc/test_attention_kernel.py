"""The C++ attention kernels, straight through _C.plan, against plain float64 PyTorch."""

import ctypes
import mmap
import os
import random
import zlib

import numpy as np
import pytest
import torch

try:
    import _C  # a build directory on sys.path, during development
except ImportError:
    _C = pytest.importorskip("isotile._C")

CODES = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.bool: 4, torch.int32: 5,
    torch.int64: 6,
}  # fmt: skip
EPS = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10, torch.float64: 1e-13}
OPTIONS = dict(
    dropout_p=0.0, is_causal=False, scale=1.0, bottom_right=False, window_left=-1, window_right=-1, softcap=0.0
)
TENSORS = ("query", "key", "value", "attn_mask", "sinks", "alibi_slopes", "seqlens_k", "dropout_seed")


if hasattr(_C, "set_parallel"):
    _lib = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
    _C.set_parallel(
        *(ctypes.cast(getattr(_lib, n), ctypes.c_void_p).value for n in ("torch_parallel_for", "torch_get_num_threads"))
    )


def sets():
    names = [name for name, runs in _C.instruction_sets() if runs]
    wanted = os.environ.get("ISOTILE_TEST_ISA")
    return [name for name in names if wanted in (None, name)]


def run(isa, op, tensors, scalars):
    views = [None if t is None else (CODES[t.dtype], tuple(t.shape), tuple(t.stride())) for t in tensors]
    _C.plan(isa, op, views, [float(s) for s in scalars])(*tensors)


def scalars(o):
    return [o[name] for name in OPTIONS]


def keep_mask(seed, shape, p):
    """Philox-4x32-10 as docs/design.md states it: bool [b, hq, sq, sk]."""
    b, hq, sq, sk = shape
    low32 = np.uint64(0xFFFFFFFF)
    x0 = np.broadcast_to(np.arange(sk, dtype=np.uint64), shape)
    x1 = np.broadcast_to(np.arange(sq, dtype=np.uint64)[:, None], shape)
    x2 = np.broadcast_to(np.arange(b * hq, dtype=np.uint64).reshape(b, hq, 1, 1), shape)
    x3 = np.zeros(shape, dtype=np.uint64)
    k0, k1 = np.uint64(seed & 0xFFFFFFFF), np.uint64((seed >> 32) & 0xFFFFFFFF)
    for _ in range(10):
        first, second = np.uint64(0xD2511F53) * x0, np.uint64(0xCD9E8D57) * x2
        x0, x1, x2, x3 = (
            (second >> np.uint64(32)) ^ x1 ^ k0,
            second & low32,
            (first >> np.uint64(32)) ^ x3 ^ k1,
            first & low32,
        )
        k0, k1 = (k0 + np.uint64(0x9E3779B9)) & low32, (k1 + np.uint64(0xBB67AE85)) & low32
    return torch.from_numpy((x0 >> np.uint64(8)).astype(np.float64) * 2.0**-24 >= p)


def reference(t, o):
    """(out, lse), differentiable, in float64, on [b, h, s, d] without NaN at hidden places."""
    q, k, v = t["query"], t["key"], t["value"]
    b, hq, sq, _ = q.shape
    sk, group = k.shape[2], hq // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    score = o["scale"] * (q @ k.transpose(-1, -2))
    if o["softcap"]:
        score = o["softcap"] * torch.tanh(score / o["softcap"])
    keys = torch.full((b,), sk) if t["seqlens_k"] is None else t["seqlens_k"].long()
    key = torch.arange(sk)
    position = torch.arange(sq)[None] + (keys[:, None] - sq if o["bottom_right"] else 0)  # [b, sq]
    position, keys = position[:, None, :, None], keys[:, None, None, None]
    if t["alibi_slopes"] is not None:
        score = score - t["alibi_slopes"].double()[:, None, None] * (position - key).abs()
    seen = (key < keys).expand(b, 1, sq, sk)
    if o["is_causal"]:
        seen = seen & (key <= position)
    if o["window_left"] >= 0:
        seen = seen & (key >= position - o["window_left"])
    if o["window_right"] >= 0:
        seen = seen & (key <= position + o["window_right"])
    mask = t["attn_mask"]
    if mask is not None and mask.dtype == torch.bool:
        seen = seen & mask
    elif mask is not None:
        seen = seen & (mask != -torch.inf)
        score = score + mask.masked_fill(mask == -torch.inf, 0)
    score = score.masked_fill(~seen, -torch.inf)
    if t["sinks"] is not None:
        score = torch.cat([score, t["sinks"].double()[:, None, None].expand(b, hq, sq, 1)], -1)
    any_seen = (score != -torch.inf).any(-1, keepdim=True)
    lse = torch.logsumexp(score.masked_fill(~any_seen, 0), -1, keepdim=True)
    p = torch.exp(score - lse).masked_fill(~any_seen, 0)[..., :sk]
    if o["dropout_p"]:
        p = p * keep_mask(int(t["dropout_seed"]), p.shape, o["dropout_p"]) / (1 - o["dropout_p"])
    return p @ v, lse.masked_fill(~any_seen, -torch.inf)[..., 0]


def spread(x, how, rng):
    """x with other strides: transposed storage, gaps, an offset."""
    if how == 0 or x is None:
        return x
    order = list(range(x.ndim))
    rng.shuffle(order)
    if how == 1:
        order = list(range(x.ndim - 2)) + [x.ndim - 2, x.ndim - 1] if x.ndim > 1 else order
    shape = [x.shape[i] for i in order]
    store = torch.full(
        [n + 1 if i + 1 == len(shape) and how == 2 else n for i, n in enumerate(shape)], 77, dtype=torch.float64
    )
    store = store.to(x.dtype)[..., : shape[-1]]
    view = store.permute([order.index(i) for i in range(x.ndim)])
    view.copy_(x)
    return view


def draw(rng, dtype, **fixed):
    b, hk, group = rng.choice([1, 1, 2, 3]), rng.choice([1, 2, 3]), rng.choice([1, 1, 2, 4, 5])
    sq, sk = rng.choice([1, 2, 5, 17, 64, 130, 200]), rng.choice([1, 3, 16, 50, 128, 193, 400])
    d, dv = rng.choice([1, 3, 8, 16, 33, 64, 80, 128]), rng.choice([1, 5, 16, 40, 64, 72])
    b, hk, group, sq, sk, d, dv = (
        fixed.pop(n, x) for n, x in zip("b hk group sq sk d dv".split(), (b, hk, group, sq, sk, d, dv))
    )
    hq = hk * group
    g = torch.Generator().manual_seed(rng.randrange(2**31))
    normal = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    o = dict(
        OPTIONS, is_causal=rng.random() < 0.5, scale=rng.choice([max(d, 1) ** -0.5, 0.3, -0.2]), bottom_right=rng.random() < 0.5,  # noqa: E501
        window_left=rng.choice([-1, -1, 0, 7, 100]), window_right=rng.choice([-1, -1, 0, 5]),
        softcap=rng.choice([0.0, 0.0, 1.5]), dropout_p=rng.choice([0.0, 0.0, 0.3]),
    )  # fmt: skip
    t = dict(query=normal(b, hq, sq, d), key=normal(b, hk, sk, d), value=normal(b, hk, sk, dv))
    kind = rng.choice(["none", "none", "bool", "float"])
    mask = None
    if kind == "bool":
        mask = torch.rand(b, hq, sq, sk, generator=g) < 0.7
    elif kind == "float":
        mask = torch.randn(b, hq, sq, sk, generator=g, dtype=torch.float64).to(rng.choice([torch.float32, dtype]))
        mask[torch.rand(b, hq, sq, sk, generator=g) < 0.2] = -torch.inf
    t["attn_mask"] = mask
    t["sinks"] = normal(hq) if rng.random() < 0.4 else None
    t["alibi_slopes"] = torch.rand(hq, generator=g) * 0.2 if rng.random() < 0.3 else None
    t["seqlens_k"] = (
        torch.randint(0, sk + 1, (b,), generator=g, dtype=rng.choice([torch.int32, torch.int64]))
        if rng.random() < 0.4
        else None
    )
    t["dropout_seed"] = torch.tensor([rng.randrange(-(2**63), 2**63)])
    o.update({n: x for n, x in fixed.items() if n in OPTIONS})
    t.update({n: x for n, x in fixed.items() if n in TENSORS})
    return t, o


def wide(t):
    return {n: x.double().clone() if x is not None and x.is_floating_point() else x for n, x in t.items()}


def new(shape, dtype, how, rng):
    return spread(torch.full(shape, torch.nan, dtype=dtype), how, rng)


def forward(isa, t, o, how=0, rng=random):
    q, v = t["query"], t["value"]
    out = new((*q.shape[:-1], v.shape[-1]), q.dtype, how, rng)
    lse = new(q.shape[:-1], torch.float64 if q.dtype == torch.float64 else torch.float32, how, rng)
    run(isa, "attention", [t[n] for n in TENSORS] + [out, lse], scalars(o))
    return out, lse


def backward(isa, t, o, out, lse, grad_out, grad_lse, how=0, rng=random):
    grads = {n: new(t[n].shape, t[n].dtype, how, rng) for n in ("query", "key", "value")}
    mask = t["attn_mask"]
    grads["attn_mask"] = (
        new(mask.shape, mask.dtype, how, rng) if mask is not None and mask.is_floating_point() else None
    )
    grads["sinks"] = new(t["sinks"].shape, t["sinks"].dtype, 0, rng) if t["sinks"] is not None else None
    run(
        isa,
        "attention_backward",
        [grad_out, grad_lse] + [t[n] for n in TENSORS] + [out, lse] + list(grads.values()),
        scalars(o),
    )
    return grads


def close(name, got, want, eps, terms=1e-3):
    """|got - want| <= eps * (largest |want| + terms), terms: the size of what cancels where the sum is small."""
    got = got.double()
    if got.numel() == 0:
        return
    assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN pattern"
    assert torch.equal(got.isinf(), want.isinf()), f"{name}: infinities"
    ok = want.isfinite()
    size = want[ok].abs().max().item() if ok.any() else 0
    error = (got[ok] - want[ok]).abs().max().item() if ok.any() else 0
    assert error <= eps * (size + terms), (
        f"{name}: error {error:.3g}, size {size:.3g}, limit {eps * (size + terms):.3g}"
    )


def check_case(isa, seed, dtype, gradients, **fixed):
    rng = random.Random(zlib.crc32(f"{seed}".encode()))
    t, o = draw(rng, dtype, **fixed)
    w = wide(t)
    how = rng.choice([0, 1, 2])
    given = {
        n: spread(x, how, rng) if n not in ("dropout_seed", "seqlens_k", "sinks", "alibi_slopes") else x
        for n, x in t.items()
    }
    leaves = [
        n for n in ("query", "key", "value", "attn_mask", "sinks") if w[n] is not None and w[n].is_floating_point()
    ]
    for n in leaves:
        w[n].requires_grad_(gradients)
    want_out, want_lse = reference(w, o)
    if t["seqlens_k"] is not None:  # what stands beyond must not matter
        for i, n in enumerate(t["seqlens_k"].tolist()):
            given["key"][i, :, n:] = torch.nan
            given["value"][i, :, n:] = torch.inf
    out, lse = forward(isa, given, o, how, rng)
    eps = EPS[dtype]
    close("out", out, want_out.detach(), 4 * eps)
    close("lse", lse, want_lse.detach(), 8 * (2e-6 if dtype != torch.float64 else eps))
    if not gradients:
        return
    with_lse = rng.random() < 0.5
    grad_out = torch.randn(want_out.shape, dtype=torch.float64).to(dtype)
    grad_lse = torch.randn(want_lse.shape).to(lse.dtype) if with_lse else None
    total = (want_out * grad_out.double()).sum()
    if with_lse:
        total = total + (want_lse.masked_fill(want_lse.isinf(), 0) * grad_lse.double()).sum()
    wants = torch.autograd.grad(total, [w[n] for n in leaves], allow_unused=True)
    grads = backward(isa, given, o, out, lse, spread(grad_out, how, rng), grad_lse, how, rng)
    for n, want in zip(leaves, wants):
        want = torch.zeros_like(w[n]) if want is None else torch.nan_to_num(want, nan=0.0)
        close(f"grad {n}", grads[n], want, 12 * max(eps, EPS[grads[n].dtype]), terms=1)


@pytest.mark.parametrize("isa", sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_forward(isa, dtype, seed):
    check_case(isa, seed, dtype, gradients=False)


@pytest.mark.parametrize("isa", sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("seed", range(100, 125))
def test_backward(isa, dtype, seed):
    check_case(isa, seed, dtype, gradients=True)


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("isa", sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [dict(b=1, hk=1, group=2, sq=210, sk=450), dict(b=2, hk=2, group=4, sq=1, sk=1500)], ids=str
)
def test_results_do_not_depend_on_threads_or_batch(isa, dtype, shape, threads):
    for seed in range(4):
        t, o = draw(random.Random(seed), dtype, d=40, dv=24, dropout_p=0.0, **shape)
        results = []
        for n in (1, 2, 3):
            threads(n)
            out, lse = forward(isa, t, o)
            g = torch.Generator().manual_seed(1)
            grad_out = torch.randn(out.shape, generator=g).to(dtype)
            grads = backward(isa, t, o, out, lse, grad_out, None)
            results.append([out, lse, *(x for x in grads.values() if x is not None)])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))
        last = {
            n: x[-1:] if n in ("query", "key", "value", "attn_mask", "seqlens_k") and x is not None else x
            for n, x in t.items()
        }
        out, lse = forward(isa, last, o)
        assert torch.equal(out, results[0][0][-1:]) and torch.equal(lse, results[0][1][-1:])
        grads = backward(isa, last, o, out, lse, grad_out[-1:].contiguous(), None)
        assert torch.equal(grads["query"], results[0][2][-1:]) and torch.equal(grads["value"], results[0][4][-1:])


@pytest.mark.parametrize("isa", sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("sq", [1, 3, 40])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_hidden_never_leaks(isa, dtype, sq, bad):
    """One key is hidden from half of the rows: those rows' results are as if it were finite, the others see it."""
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, s, 24, generator=g, dtype=torch.float64).to(dtype) for s in (2 * sq, 37, 37))
    mask = torch.ones(1, 2, 2 * sq, 37, dtype=torch.bool)
    mask[:, :, ::2, 20] = False
    o = dict(OPTIONS, scale=0.2)
    t = dict.fromkeys(TENSORS) | dict(query=q, key=k, value=v, attn_mask=mask)
    grad_out = torch.randn(q.shape, generator=g).to(dtype)
    out, lse = forward(isa, t, o)
    grads = backward(isa, t, o, out, lse, grad_out, None)
    for where in ("value", "key", "query", "grad_out"):
        t2, g2 = dict(t), grad_out.clone()
        if where in ("value", "key"):
            t2[where] = t[where].clone()
            t2[where][:, :, 20] = bad
        elif where == "query":
            t2["query"] = q.clone()
            t2["query"][:, :, 1::2] = bad
        else:
            g2[:, :, 1::2] = bad
        out2, lse2 = forward(isa, t2, o)
        assert torch.equal(out2[:, :, ::2], out[:, :, ::2]) and torch.equal(lse2[:, :, ::2], lse[:, :, ::2]), where
        if where != "grad_out":
            assert not out2[:, :, 1::2].isfinite().all(-1).any(), where
        grads2 = backward(isa, t2, o, out2, lse2, g2, None)
        assert torch.equal(grads2["query"][:, :, ::2], grads["query"][:, :, ::2]), where
        if where in ("query", "grad_out"):  # key 20 sees odd rows only; every other key sees them too
            assert (
                grads2["value"].isfinite().sum() == 0
                or where == "query"
                or not grads2["value"].isfinite().all(-1).any()
            )
    # rows that see nothing: zero, whatever they hold
    mask[:, :, 1::2] = False
    t["query"] = q.clone()
    t["query"][:, :, 1::2] = bad
    grad_out[:, :, 1::2] = bad
    out, lse = forward(isa, t, o)
    assert (out[:, :, 1::2] == 0).all() and (lse[:, :, 1::2] == -torch.inf).all()
    grads = backward(isa, t, o, out, lse, grad_out, None)
    assert all(grads[n].isfinite().all() for n in ("query", "key", "value")) and (grads["query"][:, :, 1::2] == 0).all()


@pytest.mark.parametrize("isa", sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_many_loop_dims_and_broadcast_strides(isa, dtype):
    g = torch.Generator().manual_seed(0)
    q = torch.randn(2, 1, 3, 4, 9, 20, generator=g, dtype=torch.float64).to(dtype).expand(2, 2, 3, 4, 9, 20)
    k = torch.randn(2, 2, 1, 2, 11, 20, generator=g, dtype=torch.float64).to(dtype).expand(2, 2, 3, 2, 11, 20)
    v = torch.randn(1, 1, 1, 2, 11, 7, generator=g, dtype=torch.float64).to(dtype).expand(2, 2, 3, 2, 11, 7)
    mask = torch.randn(1, 2, 1, 1, 1, 11, generator=g).expand(2, 2, 3, 4, 9, 11)
    lens = torch.tensor([3, 11, 0]).expand(2, 2, 3)
    t = dict.fromkeys(TENSORS) | dict(query=q, key=k, value=v, attn_mask=mask, seqlens_k=lens)
    o = dict(OPTIONS, is_causal=True, bottom_right=True, scale=0.3)
    out, lse = forward(isa, t, o)
    flat = {n: x.reshape(12, *x.shape[3:]) if x is not None else None for n, x in wide(t).items()}
    want, want_lse = reference(flat, o)
    close("out", out.flatten(0, 2), want, 4 * EPS[dtype])
    close("lse", lse.flatten(0, 2), want_lse, 2e-5)


@pytest.mark.parametrize("isa", sets())
@pytest.mark.parametrize("zero", ["b", "sq", "sk", "d", "dv"])
def test_zero_sizes(isa, zero):
    t, o = draw(
        random.Random(5),
        torch.float32,
        **(dict(b=2, hk=2, group=2, sq=3, sk=9, d=8, dv=5, window_left=-1, window_right=-1) | {zero: 0}),
    )
    t.update(attn_mask=None, sinks=None, seqlens_k=None)
    w = wide(t)
    out, lse = forward(isa, t, o)
    grads = backward(isa, t, o, out, lse, torch.ones_like(out), None)
    if zero == "sk":
        assert (out == 0).all() and (lse == -torch.inf).all()
    elif out.numel():
        close("out", out, reference(w, o)[0], 1e-5)
    assert all(x is None or x.isfinite().all() for x in grads.values())


@pytest.mark.parametrize("isa", sets())
def test_large_head_dims(isa):
    for d, dv in ((512, 512), (640, 96), (100, 777)):
        for dtype in (torch.float32, torch.bfloat16):
            t, o = draw(
                random.Random(d),
                dtype,
                b=1,
                hk=1,
                group=1,
                sq=70,
                sk=260,
                d=d,
                dv=dv,
                scale=d**-0.5,
                attn_mask=None,
                dropout_p=0.0,
            )
            w = wide(t)
            out, lse = forward(isa, t, o)
            close("out", out, reference(w, o)[0], 4 * EPS[dtype])
            grads = backward(isa, t, o, out, lse, torch.ones_like(out), None)
            leaves = [w[n].requires_grad_() for n in ("query", "key", "value")]
            for n, want in zip(("query", "key", "value"), torch.autograd.grad(reference(w, o)[0].sum(), leaves)):
                close(n, grads[n], torch.nan_to_num(want, nan=0.0), 12 * EPS[dtype], terms=1)


def at_the_end_of_memory(shape):
    """A float32 tensor with a page that nobody may read behind it, and what keeps it alive."""
    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 4 * page)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + 3 * page
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address), ctypes.c_size_t(page), 0) == 0
    count = torch.Size(shape).numel()
    return torch.frombuffer(memory, dtype=torch.float32, count=count, offset=3 * page - 4 * count).view(shape), memory


@pytest.mark.parametrize("isa", sets())
def test_nothing_behind_dense_keys_and_values_is_read(isa):
    o = {**OPTIONS, "scale": 0.3}
    draw = torch.Generator().manual_seed(1)
    query, out = torch.randn(1, 1, 40, 32, generator=draw), torch.empty(1, 1, 40, 32)
    (key, _one), (value, _two) = (at_the_end_of_memory((1, 1, 35, 32)) for _ in range(2))  # 35: no multiple of lanes
    for t in (key, value):
        t.copy_(torch.randn(t.shape, generator=draw))
    run(isa, "attention", [query, key, value, None, None, None, None, None, out, None], scalars(o))
    want = torch.softmax(0.3 * query.double() @ key.double().mT, -1) @ value.double()
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("isa", sets())
def test_a_hidden_infinity_in_dense_values_counts_for_nothing(isa):
    o = {**OPTIONS, "scale": 0.3, "is_causal": True}
    draw = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(1, 1, 48, 32, generator=draw) for _ in range(3))
    value[..., 20, :] = torch.inf
    kept, out = value.clone(), torch.empty(1, 1, 48, 32)
    run(isa, "attention", [query, key, value, None, None, None, None, None, out, None], scalars(o))
    assert torch.equal(value, kept)
    score = (0.3 * query.double() @ key.double().mT).masked_fill(torch.ones(48, 48).triu(1).bool(), -torch.inf)
    want = torch.softmax(score, -1)[..., :20] @ value.double()[..., :20, :]
    torch.testing.assert_close(out[..., :20, :].double(), want[..., :20, :], rtol=1e-5, atol=1e-6)
    assert (out[..., 20:, :] == torch.inf).all()
