"""The command `isotile bench`: arguments in, rows and an exit code out."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ..backends import BACKENDS
from ..interrupt import INTERRUPTED, interruptible
from ..spec import FLOATS
from ..testing.recipes import dtype_name
from . import gpu_suite, machine, money, table, timing, traces
from .contenders import Contender
from .modelled import ours
from .peers import RIVALS, OnnxRuntime
from .records import Writer
from .runner import Row, Runner
from .suites import SUITES
from .workloads import DIRECTIONS, UsageError, Workload, select

DTYPES = {dtype_name(d): d for d in FLOATS}
#: The goal for a small eager call, as a multiple of PyTorch's: see docs/benchmarking.md.
LAUNCH_CASE, LAUNCH_GOAL = ("layer_norm", "tiny", "float32", "forward"), 2.0


def _listed(text: str) -> list[str]:
    return [word for word in text.replace(",", " ").split() if word]


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="isotile bench",
        description="Measures every operator on its spec's cases beside PyTorch. Nothing wrong is timed.",
        epilog="isotile bench compare A.jsonl B.jsonl puts two runs side by side; bench report RUN.jsonl plots one; "
        "bench readme RUN.jsonl prints its table in Markdown; bench trace MODEL.py measures what your own model calls.",
    )
    made.add_argument("ops", nargs="*", metavar="OP", help="operators; default: all")
    add_options(made)
    return made


def add_options(made: argparse.ArgumentParser) -> None:
    """The options of a run, which `bench trace` shares."""
    made.add_argument(
        "--cases",
        metavar="NAMES",
        help="names or glob patterns, or a recording (.json); default: those tagged bench",
    )
    made.add_argument(
        "--suite",
        choices=(*SUITES, *gpu_suite.SUITES),
        help="a fixed set of rows instead of the specs' cases; h100 has options of its own: --suite h100 --help",
    )
    made.add_argument("--backends", metavar="NAMES", help="default: all that run on this device without emulation")
    made.add_argument(
        "--against", metavar="NAMES", help=f"rivals among {', '.join(RIVALS)}; none; all that are installed. "
        "Default: torch; for a suite, all",
    )  # fmt: skip
    made.add_argument("--dtypes", metavar="NAMES", help=f"among {', '.join(DTYPES)}; default: each case's own")
    made.add_argument("--direction", choices=(*DIRECTIONS, "both"), help="default: forward; for a suite, both")
    made.add_argument("--threads", metavar="N[,N]", help="default: PyTorch's number; for a suite, 1 and it")
    made.add_argument(
        "--price", action="append", default=[], metavar="DEVICE=USD", help="what an hour of a machine costs"
    )
    made.add_argument("--out", type=Path, metavar="DIR", help="write JSON lines and CSV there")
    made.add_argument("--quick", action="store_true", help="smoke cases, few short rounds: a trial, not a measurement")
    made.add_argument(
        "--budget", type=float, metavar="SECONDS", help="for the samples of one workload, beyond the least; default: 8"
    )
    made.add_argument("--warm", action="store_true", help="do not rotate over copies larger than the cache")
    made.add_argument(
        "--constant-weights", action="store_true",
        help="linear as isotile.nn.Linear(constant_weight=True), to be compared with rivals that pack weights once",
    )  # fmt: skip
    made.add_argument("--fresh-peaks", action="store_true", help="measure the roofline again")


def _contenders(
    args: argparse.Namespace, made: argparse.ArgumentParser, threads: list[int]
) -> tuple[list[Contender], dict[str, str]]:
    """Who is measured, and the rivals that were asked for and are not here, with the reason."""
    if args.backends is None:
        names = [n for n, b in BACKENDS.items() if b.serves("cpu") and b.unavailable("cpu") is None]
        if args.suite is not None:
            names.remove("reference")
    else:
        names = _listed(args.backends)
        for name in names:
            if name not in BACKENDS:
                made.error(f"--backends: no backend {name!r}; there are {', '.join(BACKENDS)}")
            reason = BACKENDS[name].unavailable("cpu")
            if reason is not None:
                made.error(f"--backends: {name} is not available: {reason}")
    against = args.against = args.against or ("torch" if args.suite is None else "all")
    rivals = [] if against == "none" else _listed(against)
    everyone = rivals == ["all"]
    if everyone:
        rivals = list(RIVALS)
    for name in rivals:
        if name not in RIVALS:
            made.error(f"--against: no rival {name!r}; there are {', '.join(RIVALS)}")
    missing = {n: reason for n in dict.fromkeys(rivals) if (reason := RIVALS[n].missing()) is not None}
    OnnxRuntime.most_threads = max(threads)
    backends = [ours(n, args.constant_weights) for n in dict.fromkeys(names)]
    found = [*backends, *(RIVALS[n](n) for n in dict.fromkeys(rivals) if n not in missing)]
    return found, {} if everyone else missing


def _threads(args: argparse.Namespace, made: argparse.ArgumentParser) -> list[int]:
    if args.threads is None:
        return [torch.get_num_threads()] if args.suite is None else sorted({1, torch.get_num_threads()})
    found = []
    for word in _listed(args.threads):
        if not word.isdecimal() or int(word) < 1:
            made.error(f"--threads: wanted at least 1, got {word}")
        found.append(int(word))
    return list(dict.fromkeys(found))


def _workloads(args: argparse.Namespace, dtypes: list[torch.dtype] | None) -> list[Workload]:
    cases = None if args.cases is None else _listed(args.cases)
    pool: list[Workload] | None = None
    if args.suite is not None:
        pool = list(SUITES[args.suite]())
    elif cases is not None and len(cases) == 1 and cases[0].endswith(".json"):
        pool, cases = traces.workloads(Path(cases[0])), None
    if args.direction is None:
        directions: tuple[str, ...] = ("forward",) if pool is None else DIRECTIONS
    else:
        directions = DIRECTIONS if args.direction == "both" else (args.direction,)
    return select(args.ops, cases, dtypes, directions, args.quick, pool)


def run(argv: Sequence[str]) -> int:
    """Runs the benchmarks. Returns 0, 1 if anything was wrong or failed, 130 if interrupted."""
    made = parser()
    args = made.parse_args(argv)
    if args.suite in gpu_suite.SUITES:
        return gpu_suite.run(argv)
    return start(args, made, list(argv))


def start(args: argparse.Namespace, made: argparse.ArgumentParser, argv: list[str]) -> int:
    """The run that parsed arguments ask for; `argv` is kept as its command."""
    threads = _threads(args, made)
    contenders, missing = _contenders(args, made, threads)
    dtypes = None
    if args.dtypes is not None:
        unknown = [d for d in _listed(args.dtypes) if d not in DTYPES]
        if unknown:
            made.error(f"--dtypes: {', '.join(unknown)}: not among {', '.join(DTYPES)}")
        dtypes = [DTYPES[d] for d in _listed(args.dtypes)]
    try:
        workloads = _workloads(args, dtypes)
        prices = money.parse(args.price)
    except (UsageError, money.PriceError) as error:
        made.error(str(error))
    before = torch.get_num_threads()
    try:
        return _measure(args, argv, contenders, missing, workloads, threads, prices, table.console())
    finally:
        torch.set_num_threads(before)


def _measure(
    args: argparse.Namespace,
    argv: list[str],
    contenders: list[Contender],
    missing: dict[str, str],
    workloads: list[Workload],
    threads: list[int],
    prices: dict[str, float],
    console: Console,
) -> int:
    effort = timing.Effort.quick() if args.quick else timing.Effort()
    if args.budget is not None:
        effort = dataclasses.replace(effort, budget_s=args.budget)
    torch.set_num_threads(threads[0])
    header = {
        **machine.provenance(argv),
        "threads": threads[0] if len(threads) == 1 else threads,
        "contenders": {c.name: c.settings() for c in contenders},
        "rivals": [c.name for c in contenders if not c.ours],
        "missing_rivals": missing,
        "prices": prices,
        "effort": vars(effort),
        "warm": args.warm,
    }
    console.print(_banner(header), markup=False)
    for contender in contenders:
        if not contender.ours:
            console.print(f"rival {contender.name}: {_spelled(contender.settings())}", markup=False)
    for name, reason in missing.items():
        console.print(f"[yellow]rival {name} is not here:[/] {escape(reason)}")
    writer = Writer(args.out, header) if args.out is not None else None
    rows: list[Row] = []
    complete = False
    peaks: dict[str, dict[str, Any]] = {}
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    try:
        with (
            interruptible() as check_signals,
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ):
            task = progress.add_task("roofline", total=len(workloads) * len(threads))
            for count in threads:
                torch.set_num_threads(count)
                roof = machine.Peaks(args.quick, args.fresh_peaks)
                peaks[str(count)] = roof.values
                console.print(f"{count} thread{'s' * (count > 1)}, {_roofline(roof, workloads)}", markup=False)
                runner = Runner(contenders, effort, roof, args.warm)
                lines = table.Table(console.width, sum(not c.ours for c in contenders), bool(prices))
                title = None
                for workload in workloads:
                    progress.update(task, description=str(workload))
                    if (workload.spec.name, workload.direction) != title:
                        title = workload.spec.name, workload.direction
                        console.print(f"\n[bold]{' '.join(title)}[/]\n{lines.header()}")
                    for i, row in enumerate(runner.rows(workload)):
                        money.add(prices, header, row)
                        rows.append(row)
                        if writer is not None:
                            writer.write(row)
                        if row["ours"] or row["status"] != "unserved" or args.against != "all":
                            console.print(lines.line(row, first=i == 0))
                    check_signals()
                    progress.advance(task)
        complete = True
    except KeyboardInterrupt:
        console.print(f"[yellow]interrupted: {len(rows)} rows were measured[/]")
    finally:
        if writer is not None:
            end = {"kind": "end", "date": machine.now(), "complete": complete, "rows": len(rows)}
            writer.write(end | {"peaks": peaks})
            writer.close()
    failures = _report(rows, args, console)
    if writer is not None:
        console.print(f"{writer.jsonl}\n{writer.csv}", markup=False)
    if not complete:
        return INTERRUPTED
    return 1 if failures else 0


def _spelled(settings: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items())


def _banner(header: dict[str, Any]) -> str:
    git = header["git"]
    version = f"isotile {header['isotile']}"
    if git:
        version += f" ({git['commit'][:10]}{'+' if git['changed'] else ''})"
    return (
        f"{version}, PyTorch {header['torch']}, {header['processor']} ({header['instruction_set']}), "
        f"threads {header['threads']}; {', '.join(header['contenders'])}"
    )


def _roofline(peaks: machine.Peaks, workloads: list[Workload]) -> str:
    dtypes = dict.fromkeys(w.dtype for w in workloads)
    tops = ", ".join(f"{peaks.flops(d) / 1e12:.3g} TFLOP/s {dtype_name(d)}" for d in dtypes)
    return f"roofline: {peaks.bandwidth() / 1e9:.3g} GB/s, {tops}; measured {peaks.values['date']}"


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
    _pass(rows, console)
    failures = [r for r in rows if _failed(r, asked=args.backends is not None)]
    for row in failures:
        who = f"{row['op']} {row['case']} {row['dtype']} {row['direction']} on {row['contender']}"
        console.print(f"[bold red]{who}: {row['status']}:[/] {escape(row['reason'])}")
    return failures


def _pass(rows: list[Row], console: Console) -> None:
    """What all calls of a recorded program take together, among the calls that every side has a figure for."""
    if all(r.get("count", 1) == 1 for r in rows):
        return
    for threads in dict.fromkeys(r["threads"] for r in rows):
        times: dict[str, dict[str, float]] = {}
        for row in rows:
            if row["threads"] == threads and row["status"] == "ok":
                times.setdefault(row["contender"], {})[row["case"]] = row["count"] * row["median_s"]
        known = set.intersection(*map(set, times.values())) if times else set()
        total = len({r["case"] for r in rows})
        spelled = ", ".join(f"{who} {table.seconds(sum(t[c] for c in known))}" for who, t in times.items())
        if known:
            console.print(f"all recorded calls that everyone has ({len(known)} of {total}), in one pass: {spelled}")


def _failed(row: Row, asked: bool) -> bool:
    """isotile must agree and run. A backend that nobody asked for may decline, a rival may have no such function."""
    if row["status"] in ("ok", "modelled"):
        return False
    if row["status"] == "error":
        return True
    return row["ours"] and (row["status"] == "wrong" or asked)
