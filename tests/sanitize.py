"""Builds the extension with AddressSanitizer and UndefinedBehaviorSanitizer and runs the kernels' tests on it.

`make sanitize`, or `python tests/sanitize.py [--sets scalar,avx2] [pytest arguments]`. Any report fails, also one that
no test noticed. Then the leak check: every operator, forward and backward, under LeakSanitizer, where a leaked block
counts if the extension is on the stack that allocated it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import _copies

FOLDER = _copies.ROOT / "build" / "sanitize"
SETS = ("scalar", "avx2", "avx512", "avx512_bf16", "amx", "neon")
#: Every operator's drawn tests on the cpu backend, the kernels' own, and the quantised products' shapes.
TESTS = (
    "tests/test_ops.py",
    "tests/csrc/test_matmul_kernel.py",
    "tests/csrc/test_attention_kernel.py",
    "tests/test_quantized_linear.py",
    "-k",
    "not reference",
)

#: Only what is allocated in the second round of calls is looked at: imports and caches keep much on purpose.
LEAK_PROGRAM = """
import ctypes, os
sanitizer = ctypes.CDLL(None)
sanitizer.__lsan_disable()
import torch, isotile
from _calls import as_tuple, calls
from isotile.backends import BACKENDS
from isotile.backends.cpu import CpuBackend, extension
sets = [name for name, runs in extension()[0].instruction_sets() if runs]
BACKENDS.update({name: CpuBackend(name) for name in sets})

def everything():
    for name in sets:
        for function, tensors in calls(grad=True).values():
            with isotile.use_backend(name):
                results = as_tuple(function(*tensors))
                torch.autograd.grad(results, tensors, [torch.ones_like(r) for r in results])

everything()
sanitizer.__lsan_enable()
everything()
sanitizer.__lsan_disable()
found = sanitizer.__lsan_do_recoverable_leak_check()
print(f"leak check: ran on {', '.join(sets)}", flush=True)
os._exit(0)
"""


def library(name: str) -> str:
    """Where the compiler keeps a run-time library."""
    command = [os.environ.get("CXX", "c++"), f"-print-file-name={name}"]
    path = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        raise SystemExit(f"{command[0]} has no {name}; install the compiler's sanitizer libraries")
    return path


def build(sets: list[str]) -> Path:
    """The extension with sanitizers, for the given instruction sets."""
    left_out = {f"ISOTILE_COMPILES_{name}": "OFF" for name in SETS if name not in sets}
    folder = FOLDER / "-".join(sets)
    _copies.configure(_copies.ROOT, folder, ISOTILE_SANITIZE="address;undefined", **left_out)
    subprocess.run([_copies.tool("cmake"), "--build", str(folder), "--parallel", str(os.cpu_count() or 2)], check=True)
    return folder / f"_C{_copies.SUFFIX}"


def environment(site: Path, reports: Path, leaks: bool) -> dict[str, str]:
    """Of a process on the sanitized extension. Python itself is not built for it, so the run-time library comes first.

    The C++ library must be there when it starts, or it cannot pass PyTorch's exceptions on.
    """
    log = f"log_path={reports}/report:print_stacktrace=1"
    return _copies.environment(
        site,
        LD_PRELOAD=f"{library('libasan.so')} {library('libstdc++.so')}",
        ASAN_OPTIONS=f"{log}:detect_leaks={int(leaks)}:exitcode=86",
        UBSAN_OPTIONS=f"{log}:halt_on_error=0",
    )


def run_tests(site: Path, arguments: list[str]) -> bool:
    """The tests; False on a failure or a report."""
    with tempfile.TemporaryDirectory() as reports:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(arguments or TESTS)]
        env = environment(site, Path(reports), leaks=False)
        code = subprocess.run(command, cwd=_copies.ROOT, env=env, check=False).returncode
        found = sorted(Path(reports).iterdir())
        for report in found:
            print(report.read_text(errors="replace")[:8000], flush=True)
    print(f"sanitized tests: pytest's exit code {code}, {len(found)} sanitizer reports", flush=True)
    return code == 0 and not found


def run_leak_check(site: Path) -> bool:
    """LeakSanitizer in a process that calls everything; False if the extension leaked."""
    with tempfile.TemporaryDirectory() as reports:
        env = environment(site, Path(reports), leaks=True)
        env["PYTHONPATH"] += os.pathsep + str(_copies.ROOT / "tests")
        done = subprocess.run(
            [sys.executable, "-c", LEAK_PROGRAM], env=env, stdout=subprocess.PIPE, text=True, check=False
        )
        text = "".join(p.read_text(errors="replace") for p in sorted(Path(reports).iterdir()))
    if done.returncode or "ran on" not in done.stdout or "LeakSanitizer has encountered a fatal error" in text:
        print(f"the leak check did not run: exit code {done.returncode}\n{done.stdout}{text[:4000]}", flush=True)
        return False
    print(done.stdout, end="", flush=True)
    blocks = [b for b in text.split("\n\n") if "leak of" in b]
    ours = [b for b in blocks if f"_C{_copies.SUFFIX}" in b and "isotile" in b]
    for block in ours:
        print(block, flush=True)
    print(f"leak check: {len(ours)} leaks through the extension, {len(blocks) - len(ours)} others", flush=True)
    return not ours


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", default=",".join(SETS), help="instruction sets to build and test besides scalar")
    given, arguments = parser.parse_known_args()
    sets = [name for name in SETS if name in given.sets.split(",") or name == "scalar"]
    began = time.monotonic()
    extension = build(sets)
    built = time.monotonic()
    site = FOLDER / "site"
    _copies.lay_out(site, _copies.ROOT, extension)
    clean = run_tests(site, arguments)
    clean = run_leak_check(site) and clean
    print(f"build {built - began:.0f} s, tests {time.monotonic() - built:.0f} s: {'clean' if clean else 'NOT CLEAN'}")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
