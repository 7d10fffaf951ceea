"""Compiles every Triton kernel ahead of time for every target on a machine without a GPU, and checks what came out.

    python bench/triton_aot.py [--targets sm_90 gfx942] [--ops attention] [--case d128] [--shard 0/4] [--out table.json]

One row for each launch: registers, spilled bytes, shared and tensor memory against the target's limit (which Triton
checks only at launch), and matrix instructions. A row fails if it does not compile, needs more than the target has, or
is meant for the matrix units and shows no such instruction. Each target runs in a process of its own with a time limit,
since a backend may crash or hang.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TARGETS = {  # name: (kind, arch, shared bytes one program may use, matrix instruction)
    "sm_80": ("cuda", 80, 166912, "mma.sync"),
    "sm_89": ("cuda", 89, 101376, "mma.sync"),
    "sm_90": ("cuda", 90, 232448, "wgmma.mma_async"),
    "sm_100": ("cuda", 100, 232448, "tcgen05.mma"),
    "sm_120": ("cuda", 120, 101376, "mma.sync"),
    "gfx942": ("hip", "gfx942", 65536, "v_mfma"),
    "gfx950": ("hip", "gfx950", 163840, "v_mfma"),
}
TENSOR_MEMORY = 512  # columns, Blackwell; a kernel that wants more compiles to a trap
ANY_MATRIX = ("wgmma.mma_async", "tcgen05.mma", "mma.sync", "v_mfma")


def cases():
    """(op, label, views by name, scalars) for the shapes worth a row of the table."""
    sys.path.insert(0, str(ROOT / "tests" / "triton"))
    import torch
    from _load import backend

    View = backend("triton_launch").View
    bf16, f16, f32, i32, i64 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.int64

    def v(*shape, dtype=bf16, strides=None):
        step, made = 1, []
        for size in reversed(shape):
            made.append(step)
            step *= max(size, 1)
        return View(shape, tuple(strides) if strides else tuple(reversed(made)), dtype, torch.device("cpu"))

    for n in (768, 4096, 8192, 16384, 50257):
        x = v(4096, n)
        yield "rms_norm", f"bf16 4096x{n}", {"x": x, "weight": v(n), "y": v(4096, n)}, {}
        yield (
            "layer_norm",
            f"bf16 4096x{n} residual",
            {"x": x, "weight": v(n), "bias": v(n), "residual": v(4096, n), "y": v(4096, n), "sum": v(4096, n)},
            {},
        )
        yield "softmax", f"bf16 4096x{n}", {"x": x, "y": v(4096, n)}, {}
        yield "softmax_backward", f"bf16 4096x{n}", {"grad": x, "y": v(4096, n), "grad_x": v(4096, n)}, {}
        yield (
            "layer_norm_backward",
            f"bf16 4096x{n}",
            {"grad": x, "x": v(4096, n), "weight": v(n), "grad_x": v(4096, n), "grad_weight": v(n), "grad_bias": v(n)},
            {},
        )
        yield (
            "rms_norm_backward",
            f"bf16 4096x{n}",
            {"grad": x, "x": v(4096, n), "weight": v(n), "grad_x": v(4096, n), "grad_weight": v(n)},
            {},
        )
    yield (
        "rms_norm",
        "f32 4096x4096",
        {"x": v(4096, 4096, dtype=f32), "weight": v(4096), "y": v(4096, 4096, dtype=f32)},
        {},
    )
    yield from matmul_cases(v, bf16, f16, f32, i32)
    yield from quantized_cases(v, bf16, f16, f32)
    yield from attention_cases(v, bf16, f16, f32, i32, i64)


def matmul_cases(v, bf16, f16, f32, i32):
    def t(*shape, dtype=bf16):  # the last two dimensions stored transposed
        return v(*shape, dtype=dtype, strides=(1, shape[-2]))

    for m, n, k in (
        (8192, 8192, 8192),
        (4096, 4096, 4096),
        (1024, 1024, 1024),
        (256, 4096, 4096),
        (64, 14336, 4096),
        (16, 4096, 4096),
        (1, 4096, 4096),
        (4095, 4097, 4111),
        (1000, 1000, 1000),
    ):
        yield "matmul", f"bf16 {m}x{n}x{k} linear", {"a": v(m, k), "b": t(k, n), "y": v(m, n)}, {}
    for m, n, k in ((4096, 4096, 4096), (16, 4096, 4096)):
        yield (
            "matmul",
            f"bf16 {m}x{n}x{k} bias gelu residual preactivation",
            {"a": v(m, k), "b": v(k, n), "bias": v(n), "residual": v(m, n), "y": v(m, n), "preactivation": v(m, n)},
            {"activation": 2},
        )
    yield (
        "matmul",
        "f16 2048^3 a transposed",
        {"a": t(2048, 2048, dtype=f16), "b": v(2048, 2048, dtype=f16), "y": v(2048, 2048, dtype=f16)},
        {},
    )
    for tf32 in (False, True):
        x = v(2048, 2048, dtype=f32)
        yield (
            "matmul",
            f"f32 2048^3 tf32={tf32}",
            {"a": x, "b": v(2048, 2048, dtype=f32), "y": v(2048, 2048, dtype=f32)},
            {"allow_tf32": tf32},
        )
    yield "matmul", "bf16 bmm 64x512^3", {"a": v(64, 512, 512), "b": v(64, 512, 512), "y": v(64, 512, 512)}, {}
    yield (
        "matmul_epilogue_backward",
        "bf16 4096x4096 gelu",
        {"grad": v(4096, 4096), "preactivation": v(4096, 4096), "grad_z": v(4096, 4096)},
        {"activation": 2},
    )
    offsets = v(16, dtype=i32)
    yield (
        "grouped_matmul",
        "bf16 8192x4096x4096 g16",
        {"a": v(8192, 4096), "b": v(16, 4096, 4096), "offsets": offsets, "y": v(8192, 4096)},
        {},
    )
    yield (
        "grouped_matmul_backward",
        "bf16 8192x4096x4096 g16",
        {
            "grad": v(8192, 4096),
            "a": v(8192, 4096),
            "b": v(16, 4096, 4096),
            "offsets": offsets,
            "grad_a": v(8192, 4096),
            "grad_b": v(16, 4096, 4096),
        },
        {},
    )


def quantized_cases(v, bf16, f16, f32):
    import torch

    # the scheme's index in the kernel form, bytes of a row of 4096, group size, dtype of scales
    for index, (scheme, row_bytes, group_size, scales) in enumerate(
        (
            ("int8", 4096, -1, f32),
            ("int8_dynamic", 4096, -1, f32),
            ("int4", 2048, 128, bf16),
            ("int4_dynamic", 2048, 32, bf16),
            ("fp8", 4096, -1, f32),
            ("mxfp4", 2048, 32, torch.uint8),
            ("nvfp4", 2048, 16, torch.uint8),
        )
    ):
        groups = 1 if group_size == -1 else 4096 // group_size
        for m, dtype in ((1, bf16), (256, bf16), (8192, f16)):
            yield (
                "quantized_linear",
                f"{scheme} {str(dtype)[6:]} {m}x4096x4096",
                {
                    "x": v(m, 4096, dtype=dtype),
                    "packed": v(4096, row_bytes, dtype=torch.uint8),
                    "scales": v(4096, groups, dtype=scales),
                    "y": v(m, 4096, dtype=dtype),
                },
                {"scheme": index, "group_size": group_size},
            )


def attention_cases(v, bf16, f16, f32, i32, i64):
    plain = {
        "dropout_p": 0.0,
        "is_causal": 0,
        "scale": 0.125,
        "bottom_right": 0,
        "window_left": -1,
        "window_right": -1,
        "softcap": 0.0,
    }

    def tensors(b, hq, hk, sq, sk, d, dv=None, dtype=bf16, **extra):
        dv = dv or d
        return dict(
            query=v(b, hq, sq, d, dtype=dtype),
            key=v(b, hk, sk, d, dtype=dtype),
            value=v(b, hk, sk, dv, dtype=dtype),
            out=v(b, hq, sq, dv, dtype=dtype),
            lse=v(b, hq, sq, dtype=f32),
            **extra,
        )

    def backward(forward):
        query, key, value = forward["query"], forward["key"], forward["value"]
        return dict(
            grad_out=v(*forward["out"].shape, dtype=query.dtype),
            **forward,
            grad_query=v(*query.shape, dtype=query.dtype),
            grad_key=v(*key.shape, dtype=query.dtype),
            grad_value=v(*value.shape, dtype=query.dtype),
        )

    shapes = [
        ("h32 s4096 d128", tensors(2, 32, 32, 4096, 4096, 128)),
        ("h16 s1024 d64", tensors(16, 16, 16, 1024, 1024, 64)),
        ("h32/8 s2048 d128", tensors(4, 32, 8, 2048, 2048, 128)),
        ("h16 s8192 d256", tensors(1, 16, 16, 8192, 8192, 256)),
        ("h8 s1000 d96", tensors(2, 8, 8, 1000, 1000, 96)),
        ("h4 s512 d512", tensors(1, 4, 4, 512, 512, 512)),
        ("h8 s512 d64 f32", tensors(1, 8, 8, 512, 512, 64, dtype=f32)),
    ]
    for label, t in shapes:
        for causal in (0, 1):
            yield "attention", f"{label} causal={causal}", t, {**plain, "is_causal": causal}
            yield "attention_backward", f"{label} causal={causal}", backward(t), {**plain, "is_causal": causal}
    full = tensors(
        2,
        8,
        4,
        500,
        700,
        128,
        dv=64,
        attn_mask=v(2, 8, 500, 700, dtype=f32),
        sinks=v(8, dtype=f32),
        alibi_slopes=v(8, dtype=f32),
        seqlens_k=v(2, dtype=i32),
        dropout_seed=v(1, dtype=i64),
    )
    every = {**plain, "dropout_p": 0.1, "is_causal": 1, "bottom_right": 1, "window_left": 100, "softcap": 30.0}
    yield "attention", "every option", full, every
    yield (
        "attention_backward",
        "every option",
        {
            **backward(full),
            "grad_lse": v(2, 8, 500, dtype=f32),
            "grad_attn_mask": v(2, 8, 500, 700, dtype=f32),
            "grad_sinks": v(8, dtype=f32),
        },
        every,
    )
    for b, hq, hk, sk in ((64, 32, 8, 4096), (1, 32, 8, 8192), (16, 32, 32, 2048)):
        yield "attention", f"decode b{b} h{hq}/{hk} kv{sk} d128", tensors(b, hq, hk, 1, sk, 128), plain


PLAIN_KERNELS = (
    "matmul_combine_kernel",
    "copy_rows_kernel",
    "sum_partials_kernel",
    "attention_combine_kernel",
    "attention_delta_kernel",
    "quantize_rows_kernel",
    "dequantize_kernel",
    "quantized_linear_combine_kernel",
)
MATRIX_OPS = (
    "matmul",
    "grouped_matmul",
    "grouped_matmul_backward",
    "quantized_linear",
    "attention",
    "attention_backward",
)


def resources(compiled, kind):
    """Registers, spilled bytes, matrix instruction counts of a compiled kernel."""
    if kind == "hip":
        text = compiled.asm["amdgcn"]

        def read(name):
            return int(re.search(rf"\.{name}:\s*(\d+)", text).group(1))

        return {
            "registers": read("vgpr_count"),
            "spill": read("vgpr_spill_count") * 4,
            "matrix": {"v_mfma": count} if (count := len(re.findall(r"\bv_mfma\w+", text))) else {},
        }
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=False).stdout
    usage = {k: int(n) for k, n in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx = compiled.asm["ptx"]
    return {
        "registers": usage.get("REG"),
        "spill": usage.get("STACK", 0) + usage.get("LOCAL", 0),
        "matrix": {name: ptx.count(name) for name in ANY_MATRIX if name in ptx},
    }


def compile_target(name, ops, wanted, shard):
    """In the worker: one JSON line for each launch."""
    kind, arch, limit, _ = TARGETS[name]
    sys.path.insert(0, str(ROOT / "tests" / "triton"))
    import triton
    from _load import backend, kernel

    launch_module = backend("triton_launch")
    triton.runtime.driver.set_active(launch_module.OfflineDriver(kind, arch))
    index, count = shard
    for i, (op, label, views, scalars) in enumerate(cases()):
        if (ops and op not in ops) or wanted not in label or i % count != index:
            continue
        module = kernel(op)
        reason = module.supports(**views, **scalars)
        if reason:
            print(json.dumps({"target": name, "op": op, "case": label, "refused": reason}), flush=True)
            continue
        for launch in module.prepare(**views, **scalars):
            began = time.monotonic()
            row = {
                "target": name,
                "op": op,
                "case": label,
                "kernel": launch.kernel.__name__,
                "config": {k: val for k, val in launch.meta.items() if isinstance(val, int) and val > 1},
            }
            try:
                compiled = launch_module.compile_launch(launch)
            except Exception as error:  # the row is the report; every failure is counted by the parent
                row["error"] = f"{type(error).__name__}: {str(error)[-300:]}"
            else:
                row.update(
                    resources(compiled, kind),
                    shared=compiled.metadata.shared,
                    tensor_memory=getattr(compiled.metadata, "tmem_size", None) or 0,
                    seconds=round(time.monotonic() - began, 2),
                )
                if compiled.metadata.shared > limit:
                    row["error"] = f"{compiled.metadata.shared} bytes of shared memory, {name} has {limit}"
                elif row["tensor_memory"] > TENSOR_MEMORY:
                    row["error"] = f"{row['tensor_memory']} columns of tensor memory, {name} has {TENSOR_MEMORY}"
            print(json.dumps(row), flush=True)


def verdict(row):
    """What is wrong with a row, or None."""
    if "refused" in row:
        return f"refused: {row['refused']}"
    if "error" in row:
        return row["error"]
    if row["op"] in MATRIX_OPS and row["kernel"] not in PLAIN_KERNELS:
        if "f32" in row["case"] and "tf32=True" not in row["case"]:
            return None
        if not row["matrix"]:
            return "no matrix instructions"
    return None


def report(row):
    row["verdict"] = verdict(row)
    print(
        f"{row['target']:7} {row['op']:24} {row['case'][:44]:44} {row.get('kernel', '')[:34]:34} "
        f"{row.get('registers') or '':>4} {row.get('spill', ''):>5} {row.get('shared', ''):>7} "
        f"{row.get('tensor_memory') or '':>3} "
        f"{row.get('seconds', ''):>6} {json.dumps(row.get('matrix', {}))} {row['verdict'] or ''}",
        flush=True,
    )
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--ops", nargs="+", default=[])
    parser.add_argument("--case", default="", help="only cases with this text")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th case from the i-th")
    parser.add_argument("--timeout", type=int, default=900, help="seconds for one target")
    parser.add_argument("--out", help="write all rows as JSON")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shard = tuple(int(part) for part in options.shard.split("/"))
    if options.worker:
        return compile_target(options.worker, options.ops, options.case, shard)
    rows, failed = [], 0
    for target in options.targets:
        command = [sys.executable, __file__, "--worker", target, "--shard", options.shard, "--case", options.case]
        command += ["--ops", *options.ops] if options.ops else []
        with tempfile.TemporaryDirectory() as cache:
            environment = {**os.environ, "TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"}
            environment.pop("TRITON_INTERPRET", None)
            with tempfile.TemporaryFile("w+") as errors:
                worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
                watchdog = threading.Timer(options.timeout, worker.kill)
                watchdog.start()
                for line in worker.stdout:
                    if line.startswith("{"):
                        rows.append(report(json.loads(line)))
                        failed += rows[-1]["verdict"] is not None
                worker.wait()
                watchdog.cancel()
                errors.seek(0)
                err = errors.read()
        if worker.returncode != 0:
            failed += 1
            late = f" after {options.timeout} s" if worker.returncode == -9 else ""
            print(f"{target}: worker ended with {worker.returncode}{late}: {err[-500:]}", flush=True)
    if options.out:
        Path(options.out).write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} launches, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
