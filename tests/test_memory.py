"""Nothing grows: no leak over 10,000 calls of any operator, and attention's memory is linear in the sequence length."""

from __future__ import annotations

import ctypes
import gc
import json
import mmap
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import isotile
from isotile import huge_pages, library

sys.path.insert(0, str(Path(__file__).parent))
from _calls import NAMES, as_tuple, calls

pytestmark = pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="counts memory with mallinfo2, of the GNU C library 2.33"
)

CALLS = 10_000
#: The smallest thing that a call can leak is one block of CPython's or the C library's allocator: 16 bytes.
ALLOWED = 16 * CALLS
#: The allocators' own pools may still fill during a round or two; a leak grows in every one.
ROUNDS = 4
HUGE = 2 << 20


class MallInfo(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks")),
        *((name, ctypes.c_size_t) for name in ("uordblks", "fordblks", "keepcost")),
    ]


def live_bytes():
    """Bytes in use, not bytes resident: what was freed earlier must not hide what leaks now.

    All of the C library's blocks, and the least that CPython's own (of at most 512 bytes) can take.
    """
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallInfo
    info = mallinfo()
    return info.uordblks + info.hblkhd + 16 * sys.getallocatedblocks()


def check_plateau(call):
    """Fails unless the memory in use stays still over one of a few rounds of `CALLS` calls."""
    for _ in range(CALLS // 10):
        call()
    grown = []
    for _ in range(ROUNDS):
        gc.collect()
        before = live_bytes()
        for _ in range(CALLS):
            call()
        gc.collect()
        grown.append(live_bytes() - before)
        if grown[-1] <= ALLOWED:
            return
    raise AssertionError(f"memory in use grew by {grown} bytes in rounds of {CALLS} calls, allowed {ALLOWED}")


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_calls_leave_nothing_behind(name):
    function, tensors = calls()[name]

    def call():
        function(*tensors)

    assert isotile.explain("matmul", torch.ones(2, 2), torch.ones(2, 2)).backend == "cpu"
    with torch.no_grad():
        check_plateau(call)


@pytest.mark.parametrize("name", NAMES)
def test_ten_thousand_gradients_leave_nothing_behind(name):
    function, tensors = calls(grad=True)[name]
    upstream = [torch.ones_like(r) for r in as_tuple(function(*tensors))]

    def call():
        torch.autograd.grad(as_tuple(function(*tensors)), tensors, upstream)

    check_plateau(call)


def test_ten_thousand_plans_leave_nothing_behind():
    x = torch.ones(3, 8)
    operator = library.operator("layer_norm")

    def call():
        operator.plans.clear()
        isotile.layer_norm(x, 8)

    check_plateau(call)


def test_ten_thousand_refusals_leave_nothing_behind():
    a, b = torch.ones(3, 4), torch.ones(5, 6)

    def call():
        with pytest.raises(ValueError, match="k = 4"):
            isotile.matmul(a, b)

    check_plateau(call)


@pytest.mark.parametrize("leak", (object, lambda: bytearray(1024)), ids=("object", "block"))
def test_the_check_sees_a_leak(leak):
    kept = []
    with pytest.raises(AssertionError, match="memory in use grew"):
        check_plateau(lambda: kept.append(leak()))


# --- attention -------------------------------------------------------------------------------------------------------

#: Prints how far the peak of resident memory rises over what stood before: VmHWM, since a child's ru_maxrss starts at
#: its parent's. Run once on short sequences first, so that code and thread pools are there.
MEASURE = """
import json, sys, torch, isotile
backend, dtype, sequence, gradient = json.loads(sys.argv[1])

def status(name):
    for line in open("/proc/self/status"):
        if line.startswith(name + ":"):
            return int(line.split()[1]) * 1024

def run(sequence):
    q, k, v = (torch.randn(1, 1, sequence, 32).to(getattr(torch, dtype)).requires_grad_(gradient) for _ in range(3))
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts again from now
    before = status("VmRSS")
    with isotile.use_backend(backend):
        out = isotile.attention(q, k, v, is_causal=True)
        if gradient:
            out.backward(torch.ones_like(out))
    return status("VmHWM") - before

torch.set_num_threads(2)
run(256)
print(json.dumps(run(sequence)))
"""


def peak_rise(*arguments):
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(arguments)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def linear_allowance(sequence, dtype, gradient):
    """Results and gradients, once more for what the backward keeps in float32, and 16 MiB for two threads' blocks."""
    item = getattr(torch, dtype).itemsize
    tensors = 4 if gradient else 1  # out; grad_query, grad_key, grad_value
    return sequence * (32 * (tensors * item + (tensors + 1) * 4) + 4 * 4) + (16 << 20)


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "backward"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_memory_is_linear_at_16384(dtype, gradient):
    sequence = 16384
    scores = sequence * sequence * 4
    allowed = linear_allowance(sequence, dtype, gradient)
    assert allowed < scores / 16
    rise = peak_rise("cpu", dtype, sequence, gradient)
    said = f"the peak rose by {rise >> 20} MiB; allowed {allowed >> 20}, the scores alone {scores >> 20}"
    assert rise <= allowed, said


def test_the_measure_sees_a_score_matrix():
    sequence = 4096
    assert (
        peak_rise("reference", "float32", sequence, False)
        >= sequence * sequence * 4
        > linear_allowance(sequence, "float32", False)
    )


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="this system has no transparent huge pages")
def test_large_results_are_to_be_on_huge_pages(monkeypatch):
    advised = []

    class Library:
        def madvise(self, start, size, advice):
            advised.append((start.value, size.value, advice.value))

    monkeypatch.setattr(huge_pages, "_C_LIBRARY", Library())
    monkeypatch.setattr(library.operator("softmax"), "plans", {})
    isotile.softmax(torch.zeros(1024, 8191))
    assert not advised  # the C library may have that memory at hand
    for _ in range(2):
        y = isotile.softmax(torch.zeros(1025, 8192))
        ((start, size, advice),) = advised
        assert advice == mmap.MADV_HUGEPAGE and start % HUGE == size % HUGE == 0
        assert y.data_ptr() <= start < y.data_ptr() + HUGE
        assert y.data_ptr() + y.nbytes - HUGE < start + size <= y.data_ptr() + y.nbytes
        advised.clear()
