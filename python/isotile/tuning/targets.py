"""GPU architectures that kernels are compiled for, and what a compiled kernel needs of them."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

#: Columns of tensor memory (Blackwell). A kernel that wants more compiles to a trap.
TENSOR_MEMORY = 512
MATRIX_INSTRUCTIONS = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")


@dataclasses.dataclass(frozen=True)
class Target:
    """`shared`: bytes that one program may use. `bandwidth` in bytes/s and `flops` (dense bfloat16) a second are the
    maker's figures for the usual device of that architecture; they only scale modelled times."""

    kind: str
    arch: int | str
    shared: int
    device: str
    bandwidth: float
    flops: float


TARGETS = {
    "sm_80": Target("cuda", 80, 166912, "A100 SXM 80GB", 2.04e12, 312e12),
    "sm_89": Target("cuda", 89, 101376, "L40S", 0.86e12, 362e12),
    "sm_90": Target("cuda", 90, 232448, "H100 SXM", 3.35e12, 989e12),
    "sm_100": Target("cuda", 100, 232448, "B200", 8.0e12, 2250e12),
    "sm_120": Target("cuda", 120, 101376, "RTX PRO 6000 Blackwell", 1.79e12, 503e12),
    "gfx942": Target("hip", "gfx942", 65536, "MI300X", 5.3e12, 1307e12),
    "gfx950": Target("hip", "gfx950", 163840, "MI355X", 8.0e12, 2500e12),
}


def resources(compiled: Any, kind: str) -> dict[str, Any]:
    """Registers, spilled bytes, matrix instructions, shared and tensor memory of a compiled Triton kernel."""
    memory = {
        "shared": compiled.metadata.shared,
        "tensor_memory": getattr(compiled.metadata, "tmem_size", None) or 0,
    }
    if kind == "hip":
        text = compiled.asm["amdgcn"]
        found = {name: re.search(rf"\.{name}:\s*(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count")}
        count = len(re.findall(r"\bv_mfma\w+", text))
        return {
            "registers": int(m[1]) if (m := found["vgpr_count"]) else None,
            "spill": int(m[1]) * 4 if (m := found["vgpr_spill_count"]) else None,
            "matrix": {"v_mfma": count} if count else {},
            **memory,
        }
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        command = [str(tool), "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    usage = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx = compiled.asm["ptx"]
    return {
        "registers": usage.get("REG"),
        "spill": usage.get("STACK", 0) + usage.get("LOCAL", 0),
        "matrix": {name: ptx.count(name) for name in MATRIX_INSTRUCTIONS if name in ptx},
        **memory,
    }


def excess(facts: dict[str, Any], target: str) -> str | None:
    """What a compiled kernel needs beyond what its target has, which Triton says only at the launch; else None."""
    limit = TARGETS[target].shared
    if facts["shared"] > limit:
        return f"{facts['shared']} bytes of shared memory, {target} has {limit}"
    if facts["tensor_memory"] > TENSOR_MEMORY:
        return f"{facts['tensor_memory']} columns of tensor memory, {target} has {TENSOR_MEMORY}"
    return None
