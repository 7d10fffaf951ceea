"""`isotile tune`: finds configurations and writes the tuning tables.

On a GPU the candidates that the model and the compiler leave are timed; without one, `--device sm_90` writes modelled
entries. Needs nothing but PyTorch and Triton.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import registry, tuning
from ..interrupt import INTERRUPTED, interruptible
from ..record import NotARecording
from . import search, targets


class Progress:
    """One line that says how far, how long and what; on a terminal it is rewritten in place."""

    def __init__(self, stream: Any = None) -> None:
        self.stream = stream or sys.stderr
        self.terminal = self.stream.isatty()
        self.began = time.monotonic()
        self.shown = 0.0

    def __call__(self, done: int, total: int, what: str) -> None:
        now = time.monotonic()
        if done < total and now - self.shown < (0.2 if self.terminal else 10.0):
            return
        self.shown = now
        filled = round(24 * done / max(total, 1))
        line = f"[{'#' * filled}{'.' * (24 - filled)}] {done}/{total} {now - self.began:4.0f} s {what}"
        if self.terminal:
            print("\r" + line[: shutil.get_terminal_size().columns - 1].ljust(79), end="", file=self.stream, flush=True)
            if done >= total:
                print(file=self.stream)
        else:
            print(line, file=self.stream, flush=True)


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="isotile tune", description=(__doc__ or "").split("\n\n")[1])
    words.add_argument(
        "ops", nargs="*", metavar="OP", help="kernels, such as matmul or attention_backward; all if none"
    )
    words.add_argument(
        "--device",
        default="cuda",
        help=f"cuda or cuda:N to measure; one of {', '.join(targets.TARGETS)} to model without a device",
    )
    words.add_argument("--case", default="", help="only cases with this text in their label")
    words.add_argument(
        "--cases", type=Path, metavar="FILE", help="the calls that isotile.record or isotile bench trace recorded, "
        "instead of the named cases",
    )  # fmt: skip
    words.add_argument("--minutes", type=float, default=10.0, help="stop measuring after this long, keep what is done")
    words.add_argument("--candidates", type=int, default=10, help="at most so many configurations of a case")
    words.add_argument("--workers", type=int, default=min(os.cpu_count() or 1, 16), help="processes that compile")
    words.add_argument(
        "--out", type=Path, help="folder of tables and journal; default: the user's cache, in use at once"
    )
    words.add_argument("--install", type=Path, metavar="DIR", help="only copy the tables of DIR into the package")
    words.add_argument("--list", action="store_true", help="only list the cases and how many candidates each has")
    return words


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    if args.install is not None:
        return install(args.install)
    unknown = set(args.ops) - registry.kernel_names("triton")
    if unknown:
        known = ", ".join(sorted(registry.kernel_names("triton")))
        print(f"isotile tune: no kernel {', '.join(sorted(unknown))}; there are {known}", file=sys.stderr)
        return 2
    try:
        return on_target(args)
    except NotARecording as error:
        print(f"isotile tune: --cases: {error}", file=sys.stderr)
        return 2


def on_target(args: argparse.Namespace) -> int:
    """Measures on the GPU that is named, or models for the architecture."""
    if args.device in targets.TARGETS:
        return model(args)
    if torch.device(args.device).type != "cuda" or not torch.cuda.is_available():
        reason = "no GPU is here" if torch.device(args.device).type == "cuda" else "that is no GPU"
        print(
            f"isotile tune: --device {args.device}: {reason}; to model without one, "
            f"name an architecture: {', '.join(targets.TARGETS)}",
            file=sys.stderr,
        )
        return 2
    return on_device(args)


def install(folder: Path) -> int:
    """Merges the tables of a run into the package's source."""
    target = Path(str(tuning.package_folder()))
    copied = 0
    for path in sorted(folder.glob("**/triton/*/*.json")):
        device, op = path.parent.name, path.stem
        found = tuning.read(path.parents[2], "triton", device, op)
        print(tuning.write(target, "triton", device, op, found))
        copied += 1
    if not copied:
        print(f"isotile tune: --install {folder}: no tables triton/<device>/<op>.json there", file=sys.stderr)
        return 1
    return 0


def model(args: argparse.Namespace) -> int:
    """Modelled entries for an architecture that is not here."""
    import triton

    from ..backends.triton_launch import OfflineDriver

    target = targets.TARGETS[args.device]
    triton.runtime.driver.set_active(OfflineDriver(target.kind, target.arch))
    found = list(search.searches(args.ops, "cpu", args.case, args.candidates, args.cases))
    if args.list:
        return listing(found)
    progress = Progress()
    interrupted = False
    try:
        with interruptible():
            for depth in range(args.candidates + 1):
                # in the order of the model, until one compiles without spilling
                rest = [s for s in found if (best := search.modelled(s)) is None or best.spill > search.SPILL]
                rest = [dataclasses.replace(s, candidates=s.candidates[depth + 1 : depth + 2]) for s in rest]
                compile_all([s for s in rest if s.candidates], args, args.device, progress)
    except KeyboardInterrupt:
        interrupted = True
    how = {"device": target.device, "date": search.today(), "triton": triton.__version__}
    chosen: dict[str, list[dict[str, Any]]] = {}
    for one in found:
        best = search.modelled(one)
        if best is not None:
            chosen.setdefault(one.op, []).append(search.entry(one, best, how))
    write(chosen, args.out or tuning.user_folder(), (args.device,))
    return INTERRUPTED if interrupted else 0


def compile_all(found: list[search.Search], args: argparse.Namespace, target: str, progress: Progress) -> None:
    search.compile_all(
        found, target, max(1, args.workers), 120.0, lambda done, total: progress(done, total, "compiled")
    )


def on_device(args: argparse.Namespace) -> int:
    """Measured entries for this machine's GPU."""
    from ..backends import triton as backend
    from ..bench.gpu_timing import Clock

    device = torch.device(args.device)
    index = device.index if device.index is not None else torch.cuda.current_device()
    torch.cuda.set_device(index)
    names = backend.device_names(index)
    clock = Clock(index)

    def bind(one: search.Search, chosen: Sequence[search.Candidate]) -> dict[str, Callable[[], Any]]:
        return search.calls_of(one, chosen, search.fill(one, f"cuda:{index}"))

    found = list(search.searches(args.ops, f"cuda:{index}", args.case, args.candidates, args.cases))
    if args.list:
        return listing(found)
    return tune(found, names, lambda calls: clock.fastest(calls), bind, args)


def tune(
    found: list[search.Search],
    names: Sequence[str],
    timer: search.Timer,
    bind: Callable[[search.Search, Sequence[search.Candidate]], dict[str, Callable[[], Any]]],
    args: argparse.Namespace,
) -> int:
    """Compiles, times, and writes the tables of the device called `names[0]`, of architecture `names[-1]`."""
    import triton

    folder = args.out or tuning.user_folder()
    context = {"device": names[0], "kernels": search.fingerprint(), "torch": torch.__version__}
    journal = search.Journal(folder / "journal.jsonl", context)
    how = {"device": names[0], "date": search.today(), "triton": triton.__version__, "torch": torch.__version__}
    progress, began = Progress(), time.monotonic()
    chosen: dict[str, list[dict[str, Any]]] = {}
    code = 0
    try:
        with interruptible() as check_signals:
            compile_all(found, args, names[-1], progress)
            for i, one in enumerate(found):
                if time.monotonic() - began > 60 * args.minutes:
                    print(
                        f"\nisotile tune: {args.minutes:g} minutes are over, {len(found) - i} cases are left",
                        file=sys.stderr,
                    )
                    code = 1
                    break
                progress(i, len(found), f"{one.op} {one.label}")
                best = search.measure(one, journal, timer, bind)
                if best is not None:
                    chosen.setdefault(one.op, []).append(search.entry(one, best, how))
                check_signals()
            else:
                progress(len(found), len(found), "measured")
    except KeyboardInterrupt:
        print("\nisotile tune: interrupted; the same command goes on from here", file=sys.stderr)
        code = INTERRUPTED
    finally:
        journal.close()
    write(chosen, folder, names[:1])
    return code


def write(chosen: dict[str, list[dict[str, Any]]], folder: Path, names: Sequence[str]) -> None:
    for op, records in sorted(chosen.items()):
        for name in names:
            print(tuning.write(folder, "triton", name, op, records))
        for record in records:
            faster = record["default_us"] / record["time_us"] if record.get("default_us") else None
            said = f"{record['time_us']:9.2f} us, {faster:.2f} times as fast as the default" if faster else "modelled"
            print(f"  {record['case']:<48} {said:<44} {record['config']}")


def listing(found: Sequence[search.Search]) -> int:
    for one in found:
        print(f"{one.op:<26} {one.label:<48} {len(one.candidates)} candidates")
    return 0
