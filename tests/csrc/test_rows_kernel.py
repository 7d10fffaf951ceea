"""The kernels over rows where a call outgrows the caches: compiled for a CPU whose caches are tiny, bit for bit."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from isotile import _C

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "c++")
FLAGS = {
    "scalar": (),
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4",),
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
    "amx": ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}
CODES = {torch.float32: 0, torch.bfloat16: 1}
OPS = ("softmax", "softmax_backward", "layer_norm", "layer_norm_backward")
L2, LAST_LEVEL = 1 << 13, 1 << 16
#: rows, n: in float32 near, far, past the caches (twice), and rows too long to ask for the next.
SIZES = [(2, 131), (9, 131), (97, 192), (97, 131), (3, 1031)]
SHIM = """
#include "base/cpu.h"
#include "base/tensor_view.h"
namespace isotile {
int64_t l1_cache_bytes() { return 4096; }
int64_t l2_cache_bytes() { return %d; }
int64_t last_level_cache_bytes() { return %d; }
bool cpu_runs(const char*) { return true; }
}
"""
CALL = """
namespace isotile::%(isa)s { void %(op)s(const TensorView*, const double*); }
extern "C" __attribute__((visibility("default"))) void run_%(op)s(const isotile::TensorView* t, const double* s) {
  isotile::%(isa)s::%(op)s(t, s);
}
"""


class View(ctypes.Structure):
    """TensorView of csrc/base/tensor_view.h."""

    _fields_ = (
        ("data", ctypes.c_void_p), ("dtype", ctypes.c_int32), ("ndim", ctypes.c_int32),
        ("size", ctypes.c_int64 * 12), ("stride", ctypes.c_int64 * 12),
    )  # fmt: skip

    def __init__(self, t):
        super().__init__()
        self.ndim = -1
        if t is not None:
            self.data, self.dtype, self.ndim = t.data_ptr(), CODES[t.dtype], t.dim()
            self.size[: t.dim()], self.stride[: t.dim()] = t.shape, t.stride()


@pytest.fixture(scope="module", params=[name for name, runs in _C.instruction_sets() if runs and name in FLAGS])
def kernels(request, tmp_path_factory):
    """The instruction set, and its kernels in a library of their own."""
    if shutil.which(COMPILER) is None:
        pytest.skip(f"no C++ compiler named {COMPILER}")
    isa, folder = request.param, tmp_path_factory.mktemp(request.param)
    shim, library = folder / "shim.cc", folder / "rows.so"
    shim.write_text(SHIM % (L2, LAST_LEVEL) + "".join(CALL % {"isa": isa, "op": op} for op in OPS))
    sources = [shim, *(ROOT / "csrc/ops" / f"{op}.cc" for op in OPS)]
    sources += [ROOT / "csrc/base" / name for name in ("error.cc", "parallel.cc", "scratch.cc")]
    command = [COMPILER, "-std=c++17", "-O1", "-fPIC", "-shared", "-fvisibility=hidden", "-ffp-contract=off", "-w"]
    command += ["-fno-math-errno", "-fno-trapping-math", f"-I{ROOT / 'csrc'}", *FLAGS[isa]]
    command += [f"-DISOTILE_ISA={isa}", f"-DISOTILE_ISA_{isa}=1", *map(str, sources), "-o", str(library)]
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    return isa, ctypes.CDLL(str(library))


def guarded(shape, dtype, offset):
    """An output in a field of NaN, `offset` elements from an aligned address, and the field."""
    n = torch.Size(shape).numel()
    field = torch.full((n + 192,), float("nan"), dtype=dtype)
    start = -field.data_ptr() % 64 // field.element_size() + 64 + offset
    return field[start : start + n].view(shape), field


@pytest.mark.parametrize("offset", [0, 3])
@pytest.mark.parametrize("dtype", list(CODES))
@pytest.mark.parametrize(("rows", "n"), SIZES)
@pytest.mark.parametrize("op", OPS)
def test_the_caches_change_no_bit(kernels, op, rows, n, dtype, offset):
    isa, library = kernels
    draw = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(rows, n, generator=draw).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(n, generator=draw).to(dtype) for _ in range(2))
    shapes = [(rows, n), (n,), (n,)] if op == "layer_norm_backward" else [(rows, n)]
    inputs = {
        "softmax": [x],
        "softmax_backward": [grad, torch.softmax(x.float(), -1).to(dtype)],
        "layer_norm": [x, weight, bias, None],
        "layer_norm_backward": [grad, None, x, weight],
    }[op]
    absent = [None] if op == "layer_norm" else []
    results = []
    for tiny in (False, True):
        outs, fields = zip(*(guarded(shape, dtype, offset) for shape in shapes), strict=True)
        tensors = [*inputs, *outs, *absent]
        if tiny:
            views = (View * len(tensors))(*map(View, tensors))
            getattr(library, f"run_{op}")(views, (ctypes.c_double * 2)(1e-5, 0))
        else:
            described = [None if t is None else (CODES[t.dtype], tuple(t.shape), tuple(t.stride())) for t in tensors]
            _C.plan(isa, op, described, [1e-5, 0.0])(*tensors)
        for out, field in zip(outs, fields, strict=True):
            assert not out.isnan().any()
            assert int(field.isnan().sum()) == field.numel() - out.numel(), "wrote outside its output"
        results.append(outs)
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)
