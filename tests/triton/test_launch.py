"""The replaying launcher hands Triton's own launcher exactly what kernel[grid](...) hands it, on a made-up device."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest

SCRIPT = Path(__file__)


def _device():
    """An offline driver that pretends to load binaries and records every launch instead of making it."""
    import triton
    from _load import backend

    launch_module = backend("triton_launch")
    log = []

    class Utils:
        def get_device_properties(self, device):
            return {"max_shared_mem": 232448, "multiprocessor_count": 132}

        def load_binary(self, *args):
            return 1, 2, 32, 0, 1024

        def unload_module(self, module):
            pass

    class Launcher:
        def __init__(self, source, metadata):
            self.kernel = source.fn.__name__

        def __call__(self, *args):
            log.append((self.kernel, args))

    driver = launch_module.OfflineDriver("cuda", 90)
    driver.utils, driver.launcher_cls = Utils(), Launcher
    driver.get_current_stream = lambda device=None: 77
    triton.runtime.driver.set_active(driver)
    return launch_module, log


def _plain(args):
    """A recorded call with tensors as their pointers and descriptors spelled out."""
    out = []
    for arg in args:
        if hasattr(arg, "base") and hasattr(arg, "block_shape"):
            arg = ("descriptor", arg.base.data_ptr(), tuple(arg.shape), tuple(arg.strides), tuple(arg.block_shape))
        elif hasattr(arg, "data_ptr"):
            arg = arg.data_ptr()
        out.append(arg)
    return out


def _check():
    import torch
    from _load import kernel

    launch_module, log = _device()
    results = {}
    x, w, y = torch.randn(64, 256).bfloat16(), torch.randn(256), torch.empty(64, 256).bfloat16()
    a, b, c = (torch.empty(256, 256, dtype=torch.bfloat16) for _ in range(3))
    for op, tensors, scalars in (
        ("rms_norm", {"x": x, "weight": w, "y": y}, {"eps": 1e-6}),
        ("matmul", {"a": a, "b": b, "y": c}, {"activation": 2}),
    ):
        module = kernel(op)
        views = {name: launch_module.View.of(t) for name, t in tensors.items()}
        launches = module.prepare(**views, **scalars)
        replay = launch_module.Replay(launches, list(views.values()), "cpu")
        log.clear()
        for _ in range(2):  # the first compiles by Triton's own path, the second is the short one
            replay.run(list(tensors.values()))
        assert len(log) == 2 * len(launches), log
        half = len(log) // 2
        for (name, first), (again, second) in zip(log[:half], log[half:], strict=True):
            assert name == again
            # grid, stream, function, metadata; then launch metadata and hooks, which are nobody's; then arguments
            assert _plain(first[:6]) == _plain(second[:6])
            assert _plain(first[9:]) == _plain(second[9:]), (first[9:], second[9:])
            assert second[6] is None and second[7] is None and second[8] is None
        log.clear()
        shifted = {name: torch.empty(t.numel() + 1, dtype=t.dtype)[1:].view(t.shape) for name, t in tensors.items()}
        for _ in range(2):
            replay.run(list(shifted.values()))
        results[op] = sorted({name for name, _ in log})
        for kernel_name, args in log:
            assert not any(hasattr(arg, "block_shape") for arg in args), f"{kernel_name} got a misaligned descriptor"
        times = {"replay": [], "triton": []}
        for _ in range(200):
            began = time.perf_counter()
            replay.run(list(tensors.values()))
            middle = time.perf_counter()
            replay.steps[0].plain(list(tensors.values()))
            times["replay"].append(middle - began)
            times["triton"].append(time.perf_counter() - middle)
        for path, values in times.items():
            results[f"{op} {path} us"] = round(statistics.median(values) * 1e6, 2)
        log.clear()
    print(json.dumps(results))


def test_replay_equals_tritons_own_launch():
    child = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, timeout=300, check=False)
    assert child.returncode == 0, child.stderr[-3000:]
    results = json.loads(child.stdout.splitlines()[-1])
    assert results["rms_norm"] == ["norm_kernel"]
    assert results["matmul"] == ["matmul_kernel"], "a misaligned operand takes the pointer kernel"
    assert results["rms_norm replay us"] < results["rms_norm triton us"]


if __name__ == "__main__":
    sys.path.insert(0, str(SCRIPT.parent))
    _check()
else:
    pytestmark = pytest.mark.filterwarnings("ignore")
