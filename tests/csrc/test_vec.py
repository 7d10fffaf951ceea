"""What no operator's spec can say: the contracts of csrc/simd's headers, and what the linker sees of the kernels."""

import os
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from isotile import _C

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "c++")
X86_FLAGS = {
    "scalar": (),
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4",),
    "avx512_bf16": ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
    "amx": ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni", "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-pthread"),
}
#: GCC 12's AVX-512 header warns about its own undefined registers (GCC bug 105593).
QUIET = ("-Wno-uninitialized", "-Wno-maybe-uninitialized")


def build(compiler: str, isa: str, flags: tuple[str, ...], folder: Path) -> Path:
    program = folder / f"vec_test_{isa}"
    sources = [str(ROOT / "tests/csrc/vec_test.cc"), str(ROOT / "csrc/base/error.cc"), str(ROOT / "csrc/base/cpu.cc")]
    defines = [f"-DISOTILE_ISA={isa}", f"-DISOTILE_ISA_{isa}=1", f'-DISOTILE_TEST_NAME="{isa}"']
    command = [compiler, "-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", *QUIET, "-ffp-contract=off"]
    command += ["-fno-math-errno", "-fno-trapping-math", f"-I{ROOT / 'csrc'}", *defines, *flags, *sources]
    subprocess.run([*command, "-o", str(program)], check=True, capture_output=True, text=True, timeout=300)
    return program


@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"no C++ compiler named {COMPILER}")
@pytest.mark.parametrize(("isa", "runs"), _C.instruction_sets())
def test_vectors_keep_their_contract(isa, runs, tmp_path):
    if not runs:
        pytest.skip(f"this CPU does not run {isa}")
    program = build(COMPILER, isa, X86_FLAGS.get(isa, ()), tmp_path)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(platform.machine() == "aarch64", reason="the native test covers it")
@pytest.mark.parametrize("isa", ["scalar", "neon"])
def test_vectors_keep_their_contract_on_arm(isa, tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if not compiler or not emulator:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    program = build(compiler, isa, ("-static",), tmp_path)
    done = subprocess.run([emulator, str(program), "20011"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_kernel_objects_share_no_weak_symbols():
    """A weak function outside the set's namespace could be the copy that the linker keeps for the whole module."""
    objects = sorted(ROOT.glob("build/*/CMakeFiles/kernels_*.dir/csrc/ops/*.o"))
    if not objects or not shutil.which("nm"):
        pytest.skip("needs a build tree under build/, and nm")
    strays = []
    for path in objects:
        isa = path.parents[2].name.removeprefix("kernels_").removesuffix(".dir")
        listing = subprocess.run(["nm", "-C", str(path)], check=True, capture_output=True, text=True).stdout
        for line in listing.splitlines():
            kind, _, name = line[17:].partition(" ")
            if kind in "Wu" and line[:16].strip() and f"isotile::{isa}::" not in name:
                strays.append(f"{path.name} ({isa}): {name}")
    assert not strays, strays
