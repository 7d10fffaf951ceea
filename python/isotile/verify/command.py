"""The command `isotile verify`: arguments in, a report and an exit code out."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..backends import BACKENDS
from ..interrupt import INTERRUPTED, interruptible
from ..record import NotARecording
from ..testing.recipes import kinds_of
from . import compare, plan, provenance, report, subjects
from .claims import CLAIMS, FAILS, HOLDS, NOT_RUN
from .run import Verifier

FAILED, USAGE = 1, 2
#: Seconds between writes of the report so far, which is what a killed run leaves.
CHECKPOINT_S = 20
EXAMPLES, SAMPLES = 48, 8


def main(argv: Sequence[str]) -> int:
    """Runs `isotile verify`, or one of its subcommands."""
    words = list(argv)
    if words[:1] == ["compare"]:
        return compare.run(words[1:])
    if words[:1] == ["check"]:
        return _check(words[1:])
    if words[:1] == ["report"]:
        return _report(words[1:])
    return run(words)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="isotile verify",
        description="Numerical conformance of every backend to the float64 reference and to each other, as a report.",
        epilog="isotile verify check REPORT.json: is it whole and unchanged? isotile verify compare A.json B.json: do "
        "machines that never met agree? isotile verify report REPORT.json: its HTML and JUnit XML again. "
        "Exit codes: 0 every claim holds, 1 one fails, 2 wrong usage, 130 interrupted.",
    )
    made.add_argument("ops", nargs="*", metavar="OP", help="operators; default: all, their backward operators too")
    made.add_argument(
        "--backends", metavar="NAMES", help="default: all that run on this machine's own hardware; cpu[avx2] is one "
        "instruction set",
    )  # fmt: skip
    made.add_argument(
        "--emulated", action="store_true", help="let the named backends run in an interpreter or emulator where the "
        "hardware is missing; the report says so",
    )  # fmt: skip
    made.add_argument("--dtypes", metavar="NAMES", help=f"among {', '.join(plan.DTYPES)}; default: all")
    made.add_argument(
        "--cases", type=Path, metavar="FILE", help="the calls that isotile.record or isotile bench trace recorded, "
        "instead of drawn ones",
    )  # fmt: skip
    made.add_argument("--seed", type=int, default=0, metavar="N", help="of all draws; default: 0")
    made.add_argument(
        "--examples", type=int, metavar="N", help=f"for each operator and dtype; default: {EXAMPLES}, or what "
        "--minutes allows",
    )  # fmt: skip
    made.add_argument("--minutes", type=float, metavar="M", help="draw examples for this long")
    made.add_argument(
        "--samples", type=int, default=SAMPLES, metavar="N", help=f"elements of each result that are written down for "
        f"comparison with other machines; default: {SAMPLES}",
    )  # fmt: skip
    made.add_argument("--out", type=Path, default=Path("verify"), metavar="DIR", help="default: verify/")
    made.add_argument("--name", metavar="STEM", help="of the files; default: the date and time")
    return made


def _listed(text: str) -> list[str]:
    return list(dict.fromkeys(word for word in text.replace(",", " ").split() if word))


def run(argv: list[str]) -> int:
    """Verifies. Returns 0, 1 if a claim fails, 2 for wrong usage, 130 if interrupted."""
    made = parser()
    args = made.parse_args(argv)
    if importlib.util.find_spec("rich") is None:
        made.error("the progress display needs rich: pip install 'isotile[verify]'")
    names = None if args.backends is None else _listed(args.backends)
    if names is not None and subjects.needs_interpreter(names, args.emulated):
        return _in_interpreter(argv)
    if names is None and args.emulated:
        made.error("--emulated: name the backends that may be emulated with --backends")
    if args.seed < 0:
        made.error(f"--seed: wanted at least 0, got {args.seed}")
    for option in ("examples", "minutes", "samples"):
        value = getattr(args, option)
        if value is not None and value <= 0:
            made.error(f"--{option}: wanted a number greater than 0, got {value}")
    dtypes = list(plan.DTYPES) if args.dtypes is None else _listed(args.dtypes)
    unknown = [d for d in dtypes if d not in plan.DTYPES]
    if unknown:
        made.error(f"--dtypes: {', '.join(unknown)}: not among {', '.join(plan.DTYPES)}")
    try:
        targets = plan.targets(args.ops, dtypes)
        if args.cases is not None:
            targets = plan.recorded(args.cases, args.ops, dtypes)
            if args.examples is None and args.minutes is None:  # each call with each kind of values
                args.examples = max(len(t.demands) * len(kinds_of(t.spec)) for t in targets)
    except KeyError as error:
        made.error(error.args[0])
    except NotARecording as error:
        made.error(f"--cases: {error}")
    absent: dict[str, str] = {}
    if names is None:
        backends, absent = subjects.native()
    else:
        try:
            backends = [subjects.find(n, args.emulated) for n in names]
        except subjects.Unavailable as error:
            made.error(f"--backends: {error}")
        absent = {n: "not asked for" for n in BACKENDS if n not in names and "[" not in n}
    return _verify(args, argv, targets, backends, absent)


def _in_interpreter(argv: list[str]) -> int:
    """This command again in a process that starts with Triton's interpreter on."""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", "isotile", "verify", *argv], environment)
    return USAGE  # not reached: the process is another one now


def _verify(
    args: argparse.Namespace,
    argv: list[str],
    targets: list[plan.Target],
    backends: list[subjects.Backend],
    absent: dict[str, str],
) -> int:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = compare.WIDTH
    about = provenance.provenance(argv)
    definition = plan.definition()
    stem = args.name or "verify-" + about["started"][:19].replace("-", "").replace(":", "").replace("T", "-")
    args.out.mkdir(parents=True, exist_ok=True)
    settings = {
        "seed": args.seed,
        "examples": args.examples or (None if args.minutes else EXAMPLES),
        "minutes": args.minutes,
        "samples": args.samples,
        "emulated": args.emulated,
        "cases": None if args.cases is None else args.cases.name,
        "targets": [list(t.key) for t in targets],
    }
    verifier = Verifier(backends, args.seed, args.samples)
    for target in targets:
        verifier.declare(target)
    began = time.monotonic()

    def sealed(complete: bool, stopped: str | None) -> dict[str, Any]:
        return report.make(
            about=about, records=verifier.records(), backends=[b.describe() for b in backends], absent=absent,
            definition=definition, settings=settings, complete=complete, stopped=stopped,
            elapsed_s=time.monotonic() - began,
        )  # fmt: skip

    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[failed]}"),
    )  # fmt: skip
    complete, stopped = False, None
    checkpoint = time.monotonic()
    deadline = None if args.minutes is None else began + 60 * args.minutes
    total = None if settings["examples"] is None else settings["examples"] * len(targets)
    try:
        with (
            interruptible() as check_signals,
            Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress,
        ):
            for backend in backends:
                said = f"{backend.name} on {backend.device}" + (f", in {backend.emulated}" if backend.emulated else "")
                console.print(said, markup=False)
            if absent:
                console.print(f"[dim]not verified: {', '.join(absent)}[/]")
            task = progress.add_task("verify", total=total, failed="")
            index = 0
            while settings["examples"] is None or index < settings["examples"]:
                for target in targets:
                    if deadline is not None and time.monotonic() > deadline:
                        break
                    progress.update(task, description=" ".join(target.key))
                    verifier.example(target, index)
                    check_signals()
                    failed = sum(bool(c.failed) for c in verifier.ledger.claims.values())
                    progress.update(task, advance=1, failed=f"[red]{failed} fail[/]" if failed else "")
                    if time.monotonic() - checkpoint > CHECKPOINT_S:
                        report.write(args.out / f"{stem}.json", report.spelled(sealed(False, "still running")))
                        checkpoint = time.monotonic()
                else:
                    index += 1
                    continue
                break
        complete = True
    except KeyboardInterrupt:
        stopped = "interrupted"
    found = sealed(complete, stopped)
    paths = report.write_all(found, args.out, stem)
    _summary(found, console)
    for path in paths:
        console.print(str(path), markup=False)
    if any(b.emulated is None and b.device != "cpu" for b in backends):
        console.print(
            f"To have this machine's results joined with others', send back {paths[0]}: it holds the results and what "
            "is listed under provenance in it, and no data of yours."
        )
    if not complete:
        return INTERRUPTED
    return FAILED if found["verdict"] == FAILS else 0


def _summary(found: dict[str, Any], console: Any) -> None:
    """A table of claims by operator and backend, then the failures, then the verdict."""
    from rich.markup import escape
    from rich.table import Table

    marks = {HOLDS: "[green]holds[/]", FAILS: "[bold red]fails[/]", NOT_RUN: "[dim]not run[/]"}
    table = Table(box=None, pad_edge=False)
    for column in ("operator", "backend", *(v for v in (HOLDS, FAILS, NOT_RUN)), "largest error"):
        table.add_column(column, justify="left" if column in ("operator", "backend") else "right")
    keys = dict.fromkeys((c["op"], c["backend"]) for c in found["claims"])
    for op, backend in keys:
        own = [c for c in found["claims"] if (c["op"], c["backend"]) == (op, backend)]
        counts = [sum(c["verdict"] == v for c in own) for v in (HOLDS, FAILS, NOT_RUN)]
        worst = max((c["worst"]["share"] for c in own if "worst" in c), default=None)
        table.add_row(
            op, escape(backend), str(counts[0]), f"[bold red]{counts[1]}[/]" if counts[1] else "0", str(counts[2]),
            "" if worst is None else f"{worst:.2f} of the bound",
        )  # fmt: skip
    console.print(table)
    for claim in found["claims"]:
        if claim["verdict"] == FAILS:
            title = CLAIMS[claim["claim"]][0]
            console.print(
                f"[bold red]fails:[/] {claim['op']} {claim['dtype']} on {escape(claim['backend'])}: {title} "
                f"({claim['failed']} of {claim['examples']} examples)"
            )
            console.print(
                f"  {claim['failures'][0]['message']}\n  repeat: {claim['failures'][0]['repeat']}", markup=False
            )
    if not found["complete"]:
        console.print(f"[yellow]incomplete: {found['stopped']}[/]")
    counts = found["counts"]
    examples = len(found["examples"])
    minutes = max(found["elapsed_s"], 1e-9) / 60
    console.print(
        f"{counts[HOLDS]} claims hold, {counts[FAILS]} fail, {counts[NOT_RUN]} were not run; {examples} examples in "
        f"{minutes:.1f} min ({examples / minutes:.0f} a minute); verdict: "
        + {HOLDS: marks[HOLDS], FAILS: marks[FAILS]}.get(found["verdict"], f"[yellow]{found['verdict']}[/]")
    )


def _read(path: Path, command: str) -> dict[str, Any] | None:
    try:
        return report.read(path)
    except (OSError, report.NotAReport) as error:
        print(f"isotile verify {command}: {error}", file=sys.stderr)
        return None


def check_parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="isotile verify check",
        description="Are reports whole and unchanged, and does every claim hold?",
        epilog="Exit codes: 0 yes, 1 no.",
    )
    made.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json")
    return made


def report_parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="isotile verify report", description="HTML and JUnit XML of a report.")
    made.add_argument("report", type=Path, metavar="REPORT.json")
    made.add_argument("--out", type=Path, metavar="DIR", help="default: beside the report")
    return made


def _check(argv: list[str]) -> int:
    """Returns 0 if every report is whole, unchanged and holds; 1 if one is not or does not."""
    worst = 0
    for path in check_parser().parse_args(argv).reports:
        found = _read(path, "check")
        if found is None:
            worst = FAILED
            continue
        counts = ", ".join(f"{n} {v}" for v, n in found["counts"].items())
        print(f"{path}: unchanged, {found['verdict']} ({counts}); results {found['digest']['results']}")
        worst = worst if found["verdict"] == HOLDS else FAILED
    return worst


def _report(argv: list[str]) -> int:
    """Returns 0, or 1 if the file is no report."""
    args = report_parser().parse_args(argv)
    found = _read(args.report, "report")
    if found is None:
        return FAILED
    folder = args.out or args.report.parent
    folder.mkdir(parents=True, exist_ok=True)
    for ending, text in ((".html", report.page(found)), (".xml", report.junit(found))):
        path = folder / (args.report.stem + ending)
        report.write(path, text)
        print(path)
    return 0
