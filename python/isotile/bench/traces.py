"""`isotile bench trace MODEL.py`: records what a program calls, and measures exactly that."""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from .. import registry
from ..record import NotARecording, Recorded, load, record
from ..spec import Case
from ..testing.recipes import dtype_from_name
from .workloads import UsageError, Workload


def workloads(path: Path) -> list[Workload]:
    """The calls of a recording, each as a workload: what ran in a backward pass is a call of its own.

    Raises:
        UsageError: the file is no recording.
    """
    try:
        return [_workload(i, call) for i, call in enumerate(load(path))]
    except NotARecording as error:
        raise UsageError(str(error)) from None


def _workload(index: int, call: Recorded) -> Workload:
    spec, recipe = registry.spec(call.op), call.recipe()
    args = {n: tuple(t["shape"]) for n, t in call.tensors.items()} | call.scalars
    size = "x".join(map(str, next(iter(call.tensors.values()))["shape"]))
    dtype = dtype_from_name(recipe["dtype"])
    case = Case(f"call{index + 1}_{size}", "bench", args, (dtype,))
    return Workload(spec, case, dtype, "forward", given=recipe, count=call.count)


def parser() -> argparse.ArgumentParser:
    from . import command

    made = argparse.ArgumentParser(
        prog="isotile bench trace",
        description="Runs a program, records every isotile operator that it calls, and measures exactly those calls.",
        epilog="Options of the measurement stand before MODEL.py; what stands behind it are the program's own.",
    )
    command.add_options(made)
    made.add_argument("--save", type=Path, metavar="FILE", help="default: MODEL.calls.json in the working directory")
    made.add_argument("--record-only", action="store_true", help="write the recording and measure nothing")
    made.add_argument("model", type=Path, metavar="MODEL.py")
    made.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...")
    return made


def run(argv: Sequence[str]) -> int:
    """Records, then measures. Returns the exit code of the measurement, or 2 if nothing was recorded."""
    from . import command

    made = parser()
    args = made.parse_args(argv)
    if not args.model.exists():
        made.error(f"no such file: {args.model}")
    path = args.save or Path(f"{args.model.stem}.calls.json")
    before = sys.argv
    sys.argv = [str(args.model), *args.arguments]
    try:
        with record() as recording:
            runpy.run_path(str(args.model), run_name="__main__")
    except SystemExit as stop:
        if stop.code not in (None, 0):
            print(f"isotile bench trace: {args.model} exited with {stop.code}", file=sys.stderr)
            return 2
    finally:
        sys.argv = before
    recording.save(path, command=" ".join(["isotile", "bench", "trace", *argv]))
    total = sum(c.count for c in recording.calls)
    print(f"{path}: {len(recording.calls)} different calls, {total} in all")
    for call in recording.calls:
        print(f"{call.count:>6} x {call}")
    if not recording.calls:
        print("isotile bench trace: the program called no isotile operator", file=sys.stderr)
        return 2
    if args.record_only:
        return 0
    args.cases, args.ops = str(path), []
    return command.start(args, made, ["trace", *argv])
