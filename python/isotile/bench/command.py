"""The command `isotile bench`: arguments in, rows and an exit code out."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..backends import BACKENDS
from ..spec import FLOATS
from ..testing.recipes import dtype_name
from . import machine, table, timing
from .contenders import RIVALS, Contender
from .modelled import ours
from .records import Writer
from .runner import Row, Runner
from .workloads import DIRECTIONS, UsageError, Workload, select

DTYPES = {dtype_name(d): d for d in FLOATS}
#: The goal for a small eager call, as a multiple of PyTorch's: see docs/benchmarking.md.
LAUNCH_CASE, LAUNCH_GOAL = ("layer_norm", "tiny", "float32", "forward"), 2.0
INTERRUPTED = 130


def _listed(text: str) -> list[str]:
    return [word for word in text.replace(",", " ").split() if word]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="isotile bench",
        description="Measures every operator on its spec's cases beside PyTorch. Nothing wrong is timed.",
        epilog="isotile bench compare A.jsonl B.jsonl puts two runs side by side; bench report RUN.jsonl plots one.",
    )
    made.add_argument("ops", nargs="*", metavar="OP", help="operators; default: all")
    made.add_argument("--cases", metavar="NAMES", help="names or glob patterns; default: the cases tagged bench")
    made.add_argument("--backends", metavar="NAMES", help="default: all that run on this device without emulation")
    made.add_argument(
        "--against", metavar="NAMES", default="torch", help=f"rivals among {', '.join(RIVALS)}, or none; default: torch"
    )
    made.add_argument("--dtypes", metavar="NAMES", help=f"among {', '.join(DTYPES)}; default: each case's own")
    made.add_argument("--direction", choices=(*DIRECTIONS, "both"), default="forward", help="default: forward")
    made.add_argument("--threads", type=int, metavar="N", help="default: PyTorch's")
    made.add_argument("--out", type=Path, metavar="DIR", help="write JSON lines and CSV there")
    made.add_argument("--quick", action="store_true", help="smoke cases, few short rounds: a trial, not a measurement")
    made.add_argument("--warm", action="store_true", help="do not rotate over copies larger than the cache")
    made.add_argument("--fresh-peaks", action="store_true", help="measure the roofline again")
    return made


def _contenders(args: argparse.Namespace, made: argparse.ArgumentParser) -> list[Contender]:
    if args.backends is None:
        names = [n for n, b in BACKENDS.items() if b.serves("cpu") and b.unavailable("cpu") is None]
    else:
        names = _listed(args.backends)
        for name in names:
            if name not in BACKENDS:
                made.error(f"--backends: no backend {name!r}; there are {', '.join(BACKENDS)}")
            reason = BACKENDS[name].unavailable("cpu")
            if reason is not None:
                made.error(f"--backends: {name} is not available: {reason}")
    rivals = [] if args.against == "none" else _listed(args.against)
    for name in rivals:
        if name not in RIVALS:
            made.error(f"--against: no rival {name!r}; there are {', '.join(RIVALS)}")
    return [*map(ours, dict.fromkeys(names)), *(RIVALS[n](n) for n in dict.fromkeys(rivals))]


def run(argv: Sequence[str]) -> int:
    """Runs the benchmarks. Returns 0, 1 if anything was wrong or failed, 130 if interrupted."""
    made = parser()
    args = made.parse_args(argv)
    contenders = _contenders(args, made)
    dtypes = None
    if args.dtypes is not None:
        unknown = [d for d in _listed(args.dtypes) if d not in DTYPES]
        if unknown:
            made.error(f"--dtypes: {', '.join(unknown)}: not among {', '.join(DTYPES)}")
        dtypes = [DTYPES[d] for d in _listed(args.dtypes)]
    directions = DIRECTIONS if args.direction == "both" else (args.direction,)
    try:
        cases = None if args.cases is None else _listed(args.cases)
        workloads = select(args.ops, cases, dtypes, directions, args.quick)
    except UsageError as error:
        made.error(str(error))
    if args.threads is not None and args.threads < 1:
        made.error(f"--threads: wanted at least 1, got {args.threads}")
    before = torch.get_num_threads()
    torch.set_num_threads(args.threads or before)
    try:
        return _measure(args, list(argv), contenders, workloads, table.console())
    finally:
        torch.set_num_threads(before)


def _measure(
    args: argparse.Namespace, argv: list[str], contenders: list[Contender], workloads: list[Workload], console: Console
) -> int:
    effort = timing.Effort.quick() if args.quick else timing.Effort()
    header = {
        **machine.provenance(argv),
        "contenders": {c.name: c.settings() for c in contenders},
        "effort": vars(effort),
        "warm": args.warm,
    }
    console.print(_banner(header), markup=False)
    writer = Writer(args.out, header) if args.out is not None else None
    rows: list[Row] = []
    complete = False
    peaks: machine.Peaks | None = None
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("roofline", total=len(workloads))
            peaks = machine.Peaks(args.quick, args.fresh_peaks)
            console.print(_roofline(peaks, workloads), markup=False)
            runner = Runner(contenders, effort, peaks, args.warm)
            lines = table.Table(console.width, sum(not c.ours for c in contenders))
            title = None
            for workload in workloads:
                progress.update(task, description=str(workload))
                if (workload.spec.name, workload.direction) != title:
                    title = workload.spec.name, workload.direction
                    console.print(f"\n[bold]{' '.join(title)}[/]\n{lines.header()}")
                for i, row in enumerate(runner.rows(workload)):
                    rows.append(row)
                    if writer is not None:
                        writer.write(row)
                    console.print(lines.line(row, first=i == 0))
                progress.advance(task)
        complete = True
    except KeyboardInterrupt:
        console.print(f"[yellow]interrupted: {len(rows)} rows were measured[/]")
    finally:
        if writer is not None:
            end = {"kind": "end", "date": machine.now(), "complete": complete, "rows": len(rows)}
            writer.write(end | {"peaks": None if peaks is None else peaks.values})
            writer.close()
    failures = _report(rows, args, console)
    if writer is not None:
        console.print(f"{writer.jsonl}\n{writer.csv}", markup=False)
    if not complete:
        return INTERRUPTED
    return 1 if failures else 0


def _banner(header: dict[str, Any]) -> str:
    git = header["git"]
    version = f"isotile {header['isotile']}"
    if git:
        version += f" ({git['commit'][:10]}{'+' if git['changed'] else ''})"
    return (
        f"{version}, PyTorch {header['torch']}, {header['processor']} ({header['instruction_set']}), "
        f"{header['threads']} threads; {', '.join(header['contenders'])}"
    )


def _roofline(peaks: machine.Peaks, workloads: list[Workload]) -> str:
    dtypes = dict.fromkeys(w.dtype for w in workloads)
    tops = ", ".join(f"{peaks.flops(d) / 1e12:.3g} TFLOP/s {dtype_name(d)}" for d in dtypes)
    return f"roofline: {peaks.bandwidth() / 1e9:.3g} GB/s copied, {tops}; measured {peaks.values['date']}"


def _report(rows: list[Row], args: argparse.Namespace, console: Console) -> list[Row]:
    """What is below the table: the legend, the cost of a small call, failures. Returns the failures."""
    if rows:
        console.print(f"\n[dim]{table.LEGEND}[/]")
    for row in rows:
        key = (row["op"], row["case"], row["dtype"], row["direction"])
        launch = key == LAUNCH_CASE and row["ours"] and row["contender"] != "reference"
        if launch and "torch" in row.get("speed_vs", {}):
            ratio = 1 / row["speed_vs"]["torch"]["median"]
            met = "met" if ratio <= LAUNCH_GOAL else "[yellow]not met[/]"
            met += "" if row["speed_vs"]["torch"]["quiet"] else "; the machine was busy"
            console.print(
                f"launch cost on {row['contender']}: a layer_norm of 16x256 float32 takes {ratio:.2f} times as long as "
                f"torch.nn.functional.layer_norm (goal: at most {LAUNCH_GOAL:g}, {met})"
            )
    failures = [r for r in rows if _failed(r, asked=args.backends is not None)]
    for row in failures:
        who = f"{row['op']} {row['case']} {row['dtype']} {row['direction']} on {row['contender']}"
        console.print(f"[bold red]{who}: {row['status']}:[/] {escape(row['reason'])}")
    return failures


def _failed(row: Row, asked: bool) -> bool:
    """isotile must agree and run. A backend that nobody asked for may decline, a rival may have no such function."""
    if row["status"] in ("ok", "modelled"):
        return False
    if row["status"] == "error":
        return True
    return row["ours"] and (row["status"] == "wrong" or asked)
