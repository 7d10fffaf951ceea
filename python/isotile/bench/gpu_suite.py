"""`isotile bench --suite h100`: the rows and the counting of the published measurements of an H100, on the GPU here.

Each row is one shape, run by isotile and by every rival that can be imported, in turn, with a cold L2 (`gpu_timing`).
Counting: attention 4 b h s s d operations, halved when causal, backward 2.5 times forward; norms one read and one
write of x, backward three; decode K and V once. A row's result is first held against the first rival's; a wrong one
gets no figure. Needs nothing but PyTorch and Triton. Rows are written as they are measured, and the run stops at its
limit of time, on Ctrl-C, or at the end, with the bars that the rows meet.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import fnmatch
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import isotile

from ..interrupt import INTERRUPTED, interruptible
from ..state import use_backend
from . import machine

BF16, F32 = torch.bfloat16, torch.float32
Call = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the suite.

    Attributes:
        work: operations of a call, or bytes where `unit` is "GB/s".
        make: makes the contenders on a device: name -> call; isotile's begin with "isotile". An entry that is a
            sentence says why that rival is not there.
        precision: of float32 products during the row.
    """

    section: str
    case: str
    work: float
    unit: str
    make: Callable[[torch.device], dict[str, Call | str]]
    precision: str = "highest"


def _optional(bind: Callable[[], Call]) -> Call | str:
    """A rival from another library, or why it is not there."""
    try:
        return bind()
    except ImportError as error:
        return f"not importable: {error}"


def _randn(device: torch.device, *shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


# --- rows ------------------------------------------------------------------------------------------------------------


def _copy() -> Row:
    def make(device: torch.device) -> dict[str, Call | str]:
        source = torch.zeros(2**31 // 2, device=device, dtype=BF16)
        target = torch.empty_like(source)
        return {"torch.copy_": lambda: target.copy_(source)}

    return Row("ceiling", "copy 4.3GB", 2.0 * 2**31, "GB/s", make)


def _product(m: int, n: int, k: int, dtype: torch.dtype = BF16, tf32: bool = False, batch: int = 0) -> Row:
    def make(device: torch.device) -> dict[str, Call | str]:
        if batch:
            a, b = _randn(device, batch, m, k), _randn(device, batch, k, n)
            return {"cublas": lambda: torch.bmm(a, b), "isotile": lambda: isotile.matmul(a, b)}
        x, w, bias = (_randn(device, *s, dtype=dtype) for s in ((m, k), (n, k), (n,)))

        def quack() -> Call:
            from quack.gemm_interface import gemm

            return lambda: gemm(x, w.t())

        made: dict[str, Call | str] = {"cublas": lambda: F.linear(x, w), "isotile": lambda: isotile.linear(x, w)}
        if dtype == BF16:
            made["cublas+bias+gelu"] = lambda: F.gelu(F.linear(x, w, bias))
            made["isotile+bias+gelu"] = lambda: isotile.linear(x, w, bias, activation="gelu")
            made["quack"] = _optional(quack)
        return made

    name = {BF16: "bf16", F32: "tf32" if tf32 else "fp32"}[dtype]
    case = f"{name} m{m} n{n} k{k}" if dtype == BF16 else f"{name} {m}^3"
    if batch:
        case = f"bmm b{batch} {m}^3"
    return Row("matmul", case, 2.0 * max(batch, 1) * m * n * k, "TFLOP/s", make, "high" if tf32 else "highest")


def _sdpa(name: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> Call:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = SDPBackend.FLASH_ATTENTION if name == "flash2" else SDPBackend.CUDNN_ATTENTION
    gqa = q.shape[1] != k.shape[1]

    def call() -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=gqa)

    return call


def _attention_forms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> dict[str, Call | str]:
    gqa = q.shape[1] != k.shape[1]
    turned = [t.transpose(1, 2) for t in (q, k, v)]

    def flash4() -> Call:
        from flash_attn.cute import flash_attn_func

        def call() -> torch.Tensor:
            out = flash_attn_func(*turned, causal=causal)
            return (out[0] if isinstance(out, tuple) else out).transpose(1, 2)

        return call

    return {
        "cudnn": _sdpa("cudnn", q, k, v, causal),
        "flash2": _sdpa("flash2", q, k, v, causal),
        "isotile": lambda: isotile.attention(q, k, v, is_causal=causal, enable_gqa=gqa),
        "fa4_cute": _optional(flash4),
    }


def _backward(forms: dict[str, Call | str], inputs: list[torch.Tensor]) -> dict[str, Call | str]:
    """The gradient of each form, on a kept graph."""
    made: dict[str, Call | str] = {}
    grad = None
    for name, form in forms.items():
        if isinstance(form, str):
            made[name] = form
            continue
        try:
            with use_backend("triton") if name.startswith("isotile") else contextlib.nullcontext():
                y = form()
        except Exception as error:
            if name.startswith("isotile"):
                raise
            made[name] = f"{type(error).__name__}: {str(error)[:200]}"  # a rival that does not take this shape
            continue
        grad = torch.randn_like(y) if grad is None else grad
        made[name] = functools.partial(torch.autograd.grad, y, inputs, grad, retain_graph=True)
    return made


def _attention(direction: str, b: int, h: int, hk: int, s: int, d: int, causal: bool) -> Row:
    def make(device: torch.device) -> dict[str, Call | str]:
        q, k, v = (_randn(device, b, heads, s, d) for heads in (h, hk, hk))
        if direction == "att_fwd":
            return _attention_forms(q, k, v, causal)
        inputs = [t.requires_grad_() for t in (q, k, v)]
        return _backward(_attention_forms(q, k, v, causal), inputs)

    work = 4.0 * b * h * s * s * d * (0.5 if causal else 1.0) * (2.5 if direction == "att_bwd" else 1.0)
    return Row(direction, f"b{b} h{h}/{hk} s{s} d{d} {'causal' if causal else 'full'}", work, "TFLOP/s", make)


def _decode(b: int, h: int, hk: int, keys: int, d: int) -> Row:
    def make(device: torch.device) -> dict[str, Call | str]:
        q, k, v = (_randn(device, b, heads, n, d) for heads, n in ((h, 1), (hk, keys), (hk, keys)))
        return _attention_forms(q, k, v, False)

    return Row("att_dec", f"b{b} h{h}/{hk} kv{keys} d{d}", 2.0 * b * hk * keys * d * 2, "GB/s", make)


def _norm_forms(op: str, x: torch.Tensor, w: torch.Tensor, bias: torch.Tensor) -> dict[str, Call | str]:
    n = x.shape[-1]
    if op == "softmax":
        torch_form: Callable[..., torch.Tensor] = lambda x: torch.softmax(x, -1)  # noqa: E731
        operands: tuple[torch.Tensor, ...] = (x,)
    elif op == "layernorm":
        torch_form, operands = (lambda x, w, bias: F.layer_norm(x, (n,), w, bias)), (x, w, bias)
    else:
        torch_form, operands = (lambda x, w: F.rms_norm(x, (n,), w, 1e-6)), (x, w)
    compiled = torch.compile(torch_form, fullgraph=True, dynamic=False)

    def liger() -> Call:
        if op == "softmax":
            from liger_kernel.ops.softmax import LigerSoftmaxFunction

            return lambda: LigerSoftmaxFunction.apply(x)
        if op == "layernorm":
            from liger_kernel.ops.layer_norm import LigerLayerNormFunction

            return lambda: LigerLayerNormFunction.apply(x, w, bias, 1e-5)
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return lambda: LigerRMSNormFunction.apply(x, w, 1e-6)

    def quack() -> Call:
        if op == "softmax":
            from quack import softmax

            return lambda: softmax(x)
        if op == "layernorm":
            raise ImportError("quack has no layer norm with gradients")
        from quack import rmsnorm

        return lambda: rmsnorm(x, w, eps=1e-6)

    ours: dict[str, Call] = {
        "softmax": lambda: isotile.softmax(x),
        "layernorm": lambda: isotile.layer_norm(x, n, w, bias),
        "rmsnorm": lambda: isotile.rms_norm(x, n, w, 1e-6),
    }
    return {
        "torch": lambda: torch_form(*operands),
        "isotile": ours[op],
        "liger": _optional(liger),
        "quack": _optional(quack),
        "compile": lambda: compiled(*operands),
    }


def _norm(section: str, rows: int, n: int, dtype: torch.dtype = BF16) -> Row:
    op = {"ln_bwd": "layernorm", "rms_bwd": "rmsnorm"}.get(section, section)

    def make(device: torch.device) -> dict[str, Call | str]:
        x, w, bias = (_randn(device, *s, dtype=dtype) for s in ((rows, n), (n,), (n,)))
        if section == op:
            return _norm_forms(op, x, w, bias)
        inputs = [t.requires_grad_() for t in ((x, w, bias) if op == "layernorm" else (x, w))]
        return _backward(_norm_forms(op, x, w, bias), inputs)

    passes = 2 if section == op else 3
    name = "bf16" if dtype == BF16 else "fp32"
    return Row(section, f"{name} {rows}x{n}", float(passes * rows * n * dtype.itemsize), "GB/s", make)


PRODUCTS = (
    (8192, 8192, 8192), (4096, 4096, 4096), (2048, 2048, 2048), (1024, 1024, 1024), (512, 512, 512),
    (4096, 14336, 4096), (4096, 4096, 14336), (8192, 1024, 8192), (1, 4096, 4096), (16, 4096, 4096),
    (64, 14336, 4096), (256, 4096, 4096), (1000, 1000, 1000), (4095, 4097, 4111),
)  # fmt: skip
#: batch, query heads, key heads, tokens, head size, causal
ATTENTION = (
    (2, 32, 32, 4096, 128, True), (2, 32, 32, 4096, 128, False), (16, 16, 16, 1024, 64, True),
    (8, 16, 16, 2048, 64, False), (4, 32, 8, 2048, 128, True), (1, 32, 8, 16384, 128, True),
    (4, 12, 12, 512, 64, False), (1, 16, 16, 8192, 256, True), (2, 32, 32, 1000, 128, True),
)  # fmt: skip
DECODE = ((64, 32, 8, 4096, 128), (1, 32, 8, 8192, 128), (16, 32, 32, 2048, 128))
NORMS = (
    (16384, 1024, BF16), (16384, 4096, BF16), (16384, 4096, F32), (8192, 8192, BF16), (4096, 16384, BF16),
    (4096, 16384, F32), (32768, 768, BF16), (1, 4096, BF16), (64, 4096, BF16), (2048, 50257, BF16),
)  # fmt: skip


def h100() -> Iterator[Row]:
    """The rows, those that the goals are counted by first."""
    yield _copy()
    for shape in PRODUCTS:
        yield _product(*shape)
    for heads in ATTENTION:
        yield _attention("att_fwd", *heads)
        yield _attention("att_bwd", *heads)
    for cache in DECODE:
        yield _decode(*cache)
    for rows, n, dtype in NORMS:
        for section in ("layernorm", "rmsnorm", "softmax", "ln_bwd", "rms_bwd"):
            if dtype == F32 and section.endswith("bwd"):
                continue
            if section == "softmax" and (rows, n) in ((16384, 1024), (8192, 8192), (32768, 768), (1, 4096), (64, 4096)):
                continue
            if section.endswith("bwd") and ((rows, n) == (1, 4096) or (section, n) == ("rms_bwd", 50257)):
                continue
            yield _norm(section, rows, n, dtype)
    for size in (2048, 4096):
        yield _product(size, size, size, F32)
        yield _product(size, size, size, F32, tf32=True)
    yield _product(512, 512, 512, batch=64)
    yield _product(128, 128, 128, batch=256)


SUITES = {"h100": h100}


# --- bars ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Bar:
    """What isotile's rows of some sections must reach: `mean` (geometric) and `least` of speed over the rivals'."""

    title: str
    sections: tuple[str, ...]
    rivals: tuple[str, ...]
    mean: float = 0.0
    least: float = 0.0
    cases: str = "*"
    but: tuple[str, ...] = ()


SKINNY = ("bf16 m1 *", "bf16 m16 *")
BARS = (
    Bar("matmul bf16, aligned", ("matmul",), ("cublas",), 0.95, 0.85, "bf16 *", (*SKINNY, "*4095*", "*1000*")),
    Bar("matmul, one row", ("matmul",), ("cublas",), least=1.5, cases="bf16 m1 *"),
    Bar("matmul, 16 rows", ("matmul",), ("cublas",), least=1.5, cases="bf16 m16 *"),
    Bar("matmul, misaligned", ("matmul",), ("cublas",), least=4.0, cases="*4095*"),
    Bar("attention forward, FlashAttention-2", ("att_fwd",), ("flash2",), mean=1.3),
    Bar("attention forward, cuDNN", ("att_fwd",), ("cudnn",), mean=0.9),
    Bar("attention backward, FlashAttention-2", ("att_bwd",), ("flash2",), least=1.0),
    Bar("attention backward, cuDNN", ("att_bwd",), ("cudnn",), mean=0.8),
    Bar("decode, cuDNN", ("att_dec",), ("cudnn",), least=1.0),
    Bar("norms and softmax, best of all", ("layernorm", "rmsnorm", "softmax"), ("*",), least=0.97),
    Bar("norms backward, best of all", ("ln_bwd", "rms_bwd"), ("*",), mean=1.2),
)


def judge(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bar with the speeds that the rows have: the fastest of its rivals over isotile, row by row."""
    verdicts = []
    for bar in BARS:
        speeds = {}
        cases = dict.fromkeys((r["section"], r["case"]) for r in records if r["section"] in bar.sections)
        for section, case in cases:
            if not fnmatch.fnmatchcase(case, bar.cases) or any(fnmatch.fnmatchcase(case, p) for p in bar.but):
                continue
            times = {
                r["cand"]: r["us"] for r in records if (r["section"], r["case"]) == (section, case) and r.get("us")
            }
            theirs = [
                us for name, us in times.items()
                if not name.startswith("isotile") and any(fnmatch.fnmatchcase(name, p) for p in bar.rivals)
            ]  # fmt: skip
            if theirs and "isotile" in times:
                speeds[f"{section} {case}"] = min(theirs) / times["isotile"]
        if not speeds:
            verdicts.append({"bar": bar.title, "rows": 0, "met": None})
            continue
        mean, worst = statistics.geometric_mean(speeds.values()), min(speeds, key=lambda name: speeds[name])
        met = mean >= bar.mean and speeds[worst] >= bar.least
        verdicts.append(
            {"bar": bar.title, "rows": len(speeds), "mean": mean, "least": speeds[worst], "worst": worst, "met": met,
             "wanted": {"mean": bar.mean, "least": bar.least}}
        )  # fmt: skip
    return verdicts


# --- running ---------------------------------------------------------------------------------------------------------


def agreement(ours: Any, theirs: Any) -> float:
    """The largest distance between two results, as a share of the second's norm."""
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else ((ours, theirs),)
    return max(
        float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30)) if b.numel() else 0.0
        for a, b in pairs
    )


#: Another function, not another rounding: each kernel's own bound is what `isotile verify` and the tests hold it to.
WRONG = 0.03


def measure(row: Row, clock: Any, device: torch.device) -> list[dict[str, Any]]:
    """The records of one row, a contender each."""
    torch.set_float32_matmul_precision(row.precision)
    base = {"kind": "row", "section": row.section, "case": row.case, "unit": row.unit}
    records: dict[str, dict[str, Any]] = {}
    calls: dict[str, Call] = {}
    made = row.make(device)
    results: dict[str, Any] = {}
    for name, call in made.items():
        record: dict[str, Any] = {**base, "cand": name}
        records[name] = record
        if isinstance(call, str):
            record.update(status="absent", reason=call)
            continue
        try:
            began = time.perf_counter()
            with use_backend("triton") if name.startswith("isotile") else contextlib.nullcontext():
                result = call()
            clock.synchronize()
            record["first_call_s"] = round(time.perf_counter() - began, 3)
            kind = "+bias+gelu" if "+" in name else ""
            truth = results.setdefault(kind, result)
            record["relative_error"] = agreement(result, truth)
        except Exception as error:  # one contender's failure is its row's, not the run's
            record.update(status="error", reason=f"{type(error).__name__}: {str(error)[:300]}")
            continue
        if record["relative_error"] > WRONG or math.isnan(record["relative_error"]):
            record.update(
                status="wrong", reason=f"{record['relative_error']:.3g} of the norm away from the first rival"
            )
            continue
        calls[name] = call
    results.clear()
    with use_backend("triton"):
        samples = clock.events(calls) if calls else {}
        for name, found in samples.items():
            median = statistics.median(found)
            low, *_, high = statistics.quantiles(found, n=4) if len(found) > 1 else (median, median)
            speed = row.work / median / (1e9 if row.unit == "GB/s" else 1e12)
            records[name].update(status="ok", us=median * 1e6, q1_us=low * 1e6, q3_us=high * 1e6, speed=speed)
            for column, of in (("graph_us", clock.graph), ("host_us", clock.host)):
                if column == "graph_us" and row.section.endswith("bwd"):
                    continue  # autograd's own threads are not captured
                try:
                    records[name][column] = of(calls[name]) * 1e6
                except Exception as error:  # a contender that cannot be captured keeps its other figures
                    records[name][column + "_reason"] = f"{type(error).__name__}: {str(error)[:200]}"
    return list(records.values())


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="isotile bench --suite h100", description=(__doc__ or "").split("\n\n")[0])
    words.add_argument("ops", nargs="*", metavar="SECTION", help="such as matmul, att_fwd; all if none")
    words.add_argument("--suite", choices=tuple(SUITES), default="h100")
    words.add_argument("--cases", default="*", help="a glob pattern of cases")
    words.add_argument("--device", default="cuda")
    words.add_argument("--minutes", type=float, default=9.0, help="stop after this long, keep what is measured")
    words.add_argument("--out", type=Path, help="folder for the JSON lines")
    words.add_argument("--list", action="store_true", help="only list the rows")
    return words


def run(argv: Sequence[str]) -> int:
    args = parser().parse_args(argv)
    chosen = [
        row for row in SUITES[args.suite]()
        if (not args.ops or row.section in args.ops) and fnmatch.fnmatchcase(row.case, args.cases)
    ]  # fmt: skip
    if args.list or not chosen:
        for row in chosen:
            print(f"{row.section:<10} {row.case:<36} {row.work:.4g} {'bytes' if row.unit == 'GB/s' else 'operations'}")
        return 0 if chosen else 2
    if not torch.cuda.is_available():
        print(f"isotile bench --suite {args.suite}: no GPU is here; --list shows the rows", file=sys.stderr)
        return 2
    from .gpu_timing import Clock

    device = torch.device(args.device)
    index = torch.cuda.current_device() if device.index is None else device.index
    torch.cuda.set_device(index)
    header = {**machine.provenance(argv), "gpu": torch.cuda.get_device_name(index), "suite": args.suite}
    return rows(chosen, Clock(index), torch.device("cuda", index), header, args)


def rows(chosen: Sequence[Row], clock: Any, device: torch.device, header: dict[str, Any], args: Any) -> int:
    """Measures the rows, prints and writes them. Returns 0, 1 if isotile failed somewhere, 130 if interrupted."""
    file = None
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        file = (args.out / f"{args.suite}-{header['date'][:19].replace(':', '')}.jsonl").open("w", encoding="utf-8")

    def write(record: dict[str, Any]) -> None:
        if file is not None:
            file.write(json.dumps(record) + "\n")
            file.flush()

    write({"kind": "run", **header})
    records: list[dict[str, Any]] = []
    began, left, code = time.monotonic(), 0, 0
    before = torch.get_float32_matmul_precision()
    print(f"{header['gpu']}, PyTorch {header['torch']}, isotile {header['isotile']}")
    try:
        with interruptible() as check_signals:
            for i, row in enumerate(chosen):
                if time.monotonic() - began > 60 * args.minutes:
                    left = len(chosen) - i
                    break
                found = measure(row, clock, device)
                records += found
                at = f"{i + 1}/{len(chosen)}, {time.monotonic() - began:.0f} s"
                print(f"\n[{at}] {row.section} {row.case}", flush=True)
                for record in found:
                    write(record)
                    print("   " + line(record), flush=True)
                torch.cuda.empty_cache()
                check_signals()
    except KeyboardInterrupt:
        code = INTERRUPTED
    finally:
        torch.set_float32_matmul_precision(before)
        verdicts = judge(records)
        write({"kind": "end", "complete": code == 0 and left == 0, "left": left, "bars": verdicts})
        if file is not None:
            file.close()
    print()
    for verdict in verdicts:
        if verdict["met"] is None:
            print(f"not measured  {verdict['bar']}")
            continue
        wanted = " and ".join(f"{kind} {limit:g}" for kind, limit in verdict["wanted"].items() if limit)
        print(
            f"{'met' if verdict['met'] else 'NOT MET':<13} {verdict['bar']}: mean {verdict['mean']:.2f}, least "
            f"{verdict['least']:.2f} ({verdict['worst']}), wanted {wanted}, {verdict['rows']} rows"
        )
    if left:
        print(f"{left} rows were not measured within {args.minutes:g} minutes")
    failed = [r for r in records if r["cand"].startswith("isotile") and r["status"] != "ok"]
    return code or (1 if failed or left else 0)


def line(record: dict[str, Any]) -> str:
    if record["status"] != "ok":
        return f"{record['cand']:<20} {record['status']}: {record['reason']}"
    graph = f"graph {record['graph_us']:9.1f} us" if "graph_us" in record else " " * 18
    host = f"host {record['host_us']:6.1f} us" if "host_us" in record else ""
    return (
        f"{record['cand']:<20} {record['us']:10.1f} us  {record['speed']:8.1f} {record['unit']:<8} {graph}  {host}  "
        f"error {record['relative_error']:.1e}"
    )
