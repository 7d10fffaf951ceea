"""Compiles every Triton kernel ahead of time for every target on a machine without a GPU, and checks what came out.

    python bench/triton_aot.py [--targets sm_90 gfx942] [--ops attention] [--case d128] [--shard 0/4] [--out table.json]

Compiled are the kernel's own choice for each case and the configuration that the tuning tables ship for it. One row for
each launch: registers, spilled bytes, shared and tensor memory against the target's limit (which Triton
checks only at launch), and matrix instructions. A row fails if it does not compile, needs more than the target has, or
is meant for the matrix units and shows no such instruction. Each target runs in a process of its own with a time limit,
since a backend may crash or hang.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import triton

from isotile import registry, tuning
from isotile.backends import triton_launch
from isotile.tuning.cases import cases
from isotile.tuning.targets import TARGETS, excess, resources

PLAIN_KERNELS = (
    "matmul_combine_kernel",
    "copy_rows_kernel",
    "sum_partials_kernel",
    "attention_combine_kernel",
    "attention_delta_kernel",
    "quantize_rows_kernel",
    "dequantize_kernel",
    "widen_rows_kernel",
    "quantized_linear_combine_kernel",
)
MATRIX_OPS = (
    "matmul",
    "grouped_matmul",
    "grouped_matmul_backward",
    "quantized_linear",
    "quantized_linear_backward",
    "attention",
    "attention_backward",
)


def compile_target(name, ops, wanted, shard):
    """In the worker: one JSON line for each launch, of the kernel's own choice and of the shipped configuration."""
    target = TARGETS[name]
    triton.runtime.driver.set_active(triton_launch.OfflineDriver(target.kind, target.arch))
    index, count = shard
    for i, (op, label, views, scalars) in enumerate(cases()):
        if (ops and op not in ops) or wanted not in label or i % count != index:
            continue
        module = registry.kernel_module("triton", op)
        reason = module.supports(**views, **scalars)
        if reason:
            print(json.dumps({"target": name, "op": op, "case": label, "refused": reason}), flush=True)
            continue
        shipped = tuning.read(tuning.package_folder(), "triton", name, op)
        configs = [None, *(entry["config"] for entry in shipped if entry["case"] == label)]
        for launch in [one for config in configs for one in module.prepare(**views, **scalars, config=config)]:
            began = time.monotonic()
            row = {
                "target": name,
                "op": op,
                "case": label,
                "kernel": launch.kernel.__name__,
                "config": {k: val for k, val in launch.meta.items() if isinstance(val, int) and val > 1},
            }
            try:
                compiled = triton_launch.compile_launch(launch)
            except Exception as error:  # the row is the report; every failure is counted by the parent
                row["error"] = f"{type(error).__name__}: {str(error)[-300:]}"
            else:
                row.update(resources(compiled, target.kind), seconds=round(time.monotonic() - began, 2))
                if reason := excess(row, name):
                    row["error"] = reason
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
