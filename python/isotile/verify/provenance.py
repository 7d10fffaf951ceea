"""What a reader must know of how a report came to be: machine, drivers, compilers, versions, files, settings."""

from __future__ import annotations

import hashlib
import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

import isotile

from .. import spec
from ..backends.cpu import extension
from ..bench.machine import commit, instruction_set, last_level_cache, now, processor

PACKAGES = (
    "isotile", "torch", "numpy", "triton", "ml_dtypes", "nki", "neuronx-cc", "torch-neuronx", "torch-xla",
    "libneuronxla", "nvidia-cublas", "nvidia-cudnn-cu13", "pytorch-triton-rocm",
)  # fmt: skip
#: Beginnings of the environment variables that can change a result.
ENVIRONMENT = ("ISOTILE_", "TRITON_", "NEURON_", "NKI_", "XLA_", "CUDA_", "HIP_", "ROCR_", "OMP_", "MKL_", "TORCH_")
#: Questions to the drivers, asked where the program is there.
QUESTIONS = {
    "nvidia-smi": ["--query-gpu=name,driver_version,vbios_version,memory.total,ecc.mode.current,clocks.max.sm",
                   "--format=csv,noheader"],
    "rocm-smi": ["--showproductname", "--showdriverversion", "--csv"],
    "neuron-ls": ["--json-output"],
    "neuronx-cc": ["--version"],
}  # fmt: skip


def provenance(command: Sequence[str]) -> dict[str, Any]:
    module, _ = extension()
    return {
        "started": now(),
        "command": " ".join(["isotile", "verify", *command]),
        "git": commit(),
        "packages": versions(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "system": platform.platform(),
        "machine": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "last_level_cache": last_level_cache(),
        "instruction_set": instruction_set(),
        "torch_instruction_set": torch.backends.cpu.get_cpu_capability(),
        "compilers": {
            "python": platform.python_compiler(),
            "isotile._C": getattr(module, "compiler", None),
            "torch": torch_built_with(),
        },
        "cuda": {"torch": torch.version.cuda, "hip": torch.version.hip, "cudnn": torch.backends.cudnn.version()},
        "drivers": {name: answer(name, words) for name, words in QUESTIONS.items() if shutil.which(name)},
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "numpy_bit_generator": np.random.PCG64.__name__,
        "environment": {k: v for k, v in sorted(os.environ.items()) if k.startswith(ENVIRONMENT)},
        "files": files(),
    }


def torch_built_with() -> str:
    """Compiler and libraries of PyTorch's build, without the settings, which hold paths of the machine that made it."""
    lines = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    return "; ".join(line for line in lines if line and not line.startswith(("PyTorch built with", "Build settings")))


def versions() -> dict[str, str]:
    """Installed packages that a result may depend on."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {**found, "isotile": isotile.__version__, "torch": torch.__version__}


def answer(program: str, words: list[str]) -> str:
    """What a program says, or how it failed to."""
    try:
        said = subprocess.run([program, *words], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"failed: {error}"
    return (said.stdout if said.returncode == 0 else f"exit {said.returncode}: {said.stderr}").strip()[:4000]


def files() -> dict[str, str]:
    """SHA-256 of everything that computes: references, kernels, the extension module, the Python around them."""
    package = Path(spec.__file__).parent
    roots = {"isotile": package}
    kernels = importlib.import_module("isotile.kernels").__path__
    roots["isotile/kernels"] = Path(next(iter(kernels)))
    found = {}
    for prefix, root in roots.items():
        for path in sorted(root.rglob("*")):
            if path.suffix in (".py", ".json") and "__pycache__" not in path.parts:
                found[f"{prefix}/{path.relative_to(root).as_posix()}"] = sha256(path)
    module, _ = extension()
    if module is not None:
        found["isotile/_C"] = sha256(Path(module.__file__))
    return found


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
