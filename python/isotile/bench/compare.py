"""`isotile bench compare A.jsonl B.jsonl`: two runs side by side, for a person and for CI."""

from __future__ import annotations

import argparse
import dataclasses
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from . import money, table, timing
from .records import NotARun, read

#: operator, case, dtype, direction, threads, contender
Key = tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Change:
    """One row in both runs. `ratio` is B's time over A's, within `low` and `high`; `best`, of the fastest samples."""

    key: Key
    a: float
    b: float
    ratio: float
    low: float
    high: float
    best: float
    costs: tuple[float | None, float | None] = (None, None)

    def slower(self, threshold: float) -> bool:
        # Other load only adds time: where the fastest samples are alike, the machine was busier, not the code slower.
        return self.ratio > threshold and self.low > 1 and self.best > math.sqrt(threshold)

    def faster(self, threshold: float) -> bool:
        return self.ratio < 1 / threshold and self.high < 1 and self.best < 1 / math.sqrt(threshold)


def spread(values: Sequence[float]) -> float:
    """Half the width of an interval around the median that two medians' difference is judged by.

    1.57 times the interquartile range over sqrt(n): where two such intervals do not meet, the medians differ at about
    95%. McGill, Tukey and Larsen, Variations of Box Plots, The American Statistician 32(1), 1978.
    """
    low, high = timing.quartiles(values)
    return 1.57 * (high - low) / math.sqrt(len(values))


def used(row: dict[str, Any]) -> list[float]:
    return timing.Summary(tuple(row["samples_s"]), tuple(row["clean"]), row["calls"]).used


def change(key: Key, a: Sequence[float], b: Sequence[float]) -> Change:
    """B's samples against A's."""
    middle_a, middle_b = statistics.median(a), statistics.median(b)
    around_a, around_b = spread(a), spread(b)
    low = max(middle_b - around_b, 0.0) / (middle_a + around_a)
    high = (middle_b + around_b) / (middle_a - around_a) if middle_a > around_a else math.inf
    return Change(key, middle_a, middle_b, middle_b / middle_a, low, high, min(b) / min(a))


def relative(row: dict[str, Any], rival: dict[str, Any]) -> list[float]:
    """A row's samples in units of the rival's of the same rounds."""
    clean = [a and b for a, b in zip(row["clean"], rival["clean"], strict=True)]
    quotients = [a / b for a, b in zip(row["samples_s"], rival["samples_s"], strict=True)]
    return timing.Summary(tuple(quotients), tuple(clean), 1).used


def key_of(row: dict[str, Any]) -> Key:
    return row["op"], row["case"], row["dtype"], row["direction"], row.get("threads"), row["contender"]


def changes(
    rows_a: list[dict[str, Any]], rows_b: list[dict[str, Any]], rival: str | None
) -> tuple[list[Change], list[Key], list[tuple[Key, str]]]:
    """(rows timed in both, keys of A that B lacks, rows of A's with a figure that have none in B, and why)."""
    a, b = ({key_of(r): r for r in rows} for rows in (rows_a, rows_b))
    both, missing, broken = [], [], []
    for key, before in a.items():
        if before["status"] != "ok" or key[-1] == rival:
            continue
        after = b.get(key)
        if after is None:
            missing.append(key)
            continue
        if after["status"] != "ok":
            broken.append((key, f"{after['status']}: {after['reason']}"))
            continue
        if rival is None:
            costs = (before.get("usd_per_million_calls"), after.get("usd_per_million_calls"))
            both.append(dataclasses.replace(change(key, used(before), used(after)), costs=costs))
            continue
        pair = [run.get((*key[:-1], rival)) for run in (a, b)]
        if any(r is None or r["status"] != "ok" for r in pair):
            missing.append(key)
            continue
        both.append(change(key, relative(before, pair[0]), relative(after, pair[1])))  # type: ignore[arg-type]
    return both, missing, broken


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="isotile bench compare",
        description="Puts two runs side by side. Exit code 1 where B is slower than A by the threshold and the spread.",
    )
    made.add_argument("a", type=Path, metavar="A.jsonl", help="the run to compare with")
    made.add_argument("b", type=Path, metavar="B.jsonl", help="the run to judge")
    made.add_argument("--threshold", type=float, default=1.1, metavar="RATIO", help="default: 1.1, 10%% slower")
    made.add_argument(
        "--relative-to", metavar="RIVAL", help="compare times in units of this rival's (torch) in the same rounds"
    )
    made.add_argument("--all", action="store_true", help="also show rows that did not change")
    made.add_argument("--match", metavar="A=B", help="compare A's contender with another of B's, as in cpu=triton")
    made.add_argument(
        "--price", action="append", default=[], metavar="DEVICE=USD",
        help="what an hour costs; DEVICE is cpu, cuda, or a part of the name of a processor or GPU",
    )  # fmt: skip
    return made


def run(argv: Sequence[str]) -> int:
    """Compares. Returns 0, 1 if anything became slower or stopped working, 2 if a file is no run."""
    args = parser().parse_args(argv)
    if args.threshold < 1:
        parser().error(f"--threshold: wanted at least 1, got {args.threshold:g}")
    console = table.console()
    try:
        prices = money.parse(args.price)
    except money.PriceError as error:
        parser().error(f"--price: {error}")
    try:
        (run_a, rows_a, end_a), (run_b, rows_b, end_b) = read(args.a), read(args.b)
    except (OSError, NotARun) as error:
        console.print(f"isotile bench compare: {error}", markup=False)
        return 2
    for name, about, end in (("A", run_a, end_a), ("B", run_b, end_b)):
        note = "" if end is not None and end["complete"] else "; incomplete"
        console.print(
            f"{name}: {about['date']}, isotile {about['isotile']}, torch {about['torch']}, {_device(about)}, "
            f"threads {about['threads']}{note}",
            markup=False,
        )
    for about, rows in ((run_a, rows_a), (run_b, rows_b)):
        for row in rows:
            money.add(prices or about.get("prices", {}), about, row)
    if args.match is not None:
        if args.relative_to is not None:
            parser().error("--match and --relative-to: wanted one of them, since a rival has a row of its own")
        mine, sign, theirs = args.match.partition("=")
        rows_a, rows_b = _matched(rows_a, mine, args.match), _matched(rows_b, theirs, args.match)
        if not sign or not rows_a or not rows_b:
            have = [", ".join(run["contenders"]) for run in (run_a, run_b)]
            parser().error(
                f"--match: wanted A=B, contenders of the two runs ({have[0]}; {have[1]}), got {args.match!r}"
            )
    if run_a["effort"] != run_b["effort"] or run_a["warm"] != run_b["warm"]:
        console.print("[yellow]the two runs were made with different settings[/]")
    machines = [(_device(about), about["threads"]) for about in (run_a, run_b)]
    if args.relative_to is None and machines[0] != machines[1]:
        console.print("[yellow]the two runs are of different machines or numbers of threads[/]")
    both, missing, broken = changes(rows_a, rows_b, args.relative_to)
    slower = [c for c in both if c.slower(args.threshold)]
    faster = [c for c in both if c.faster(args.threshold)]
    shown = both if args.all else slower + faster
    if shown:
        console.print(_table(shown, slower, faster, args.relative_to))
    for key in missing:
        console.print(f"[yellow]not in B:[/] {_spelled(key)}")
    for key, reason in broken:
        console.print(f"[bold red]{_spelled(key)}[/] has no figure in B: ", end="")
        console.print(reason, markup=False)
    if both:
        middle = math.exp(statistics.fmean(math.log(c.ratio) for c in both))
        console.print(
            f"{len(both)} rows: {len(slower)} slower and {len(faster)} faster by more than {args.threshold:g} and the "
            f"spread; B takes {middle:.3f} times as long as A (geometric mean)"
        )
    else:
        console.print("[bold red]no row is in both runs[/]")
    return 1 if slower or broken or not both else 0


def _device(about: dict[str, Any]) -> str:
    return about.get("device_name") or about["processor"]


def _matched(rows: list[dict[str, Any]], contender: str, name: str) -> list[dict[str, Any]]:
    """One contender's rows under the name of the pair, and without their numbers of threads."""
    return [{**r, "contender": name, "threads": None} for r in rows if r["contender"] == contender]


def _words(key: Key) -> list[str]:
    return ["" if k is None else str(k) for k in key]


def _spelled(key: Key) -> str:
    *rest, threads, contender = _words(key)
    return " ".join([*rest, *([f"{threads} threads"] if threads else []), contender])


def _table(shown: list[Change], slower: list[Change], faster: list[Change], rival: str | None) -> Table:
    made = Table(box=None, pad_edge=False)
    for title in ("operator", "case", "dtype", "direction", "threads", "contender"):
        made.add_column(title, no_wrap=True)
    for title in ("A", "B", "B / A", "95%", ""):
        made.add_column(title, justify="right", no_wrap=True)
    priced = any(None not in c.costs for c in shown)
    for title in ("A $/1M", "B $/1M", "cost B / A") if priced else ():
        made.add_column(title, justify="right", no_wrap=True)
    for c in sorted(shown, key=lambda c: -c.ratio):
        times = [table.seconds(v) if rival is None else f"{v:.3f} {rival}" for v in (c.a, c.b)]
        verdict = "[bold red]slower[/]" if c in slower else "[green]faster[/]" if c in faster else ""
        cells = _words(c.key)
        cells += [*times, f"{c.ratio:.3f}", f"{c.low:.2f}..{c.high:.2f}", verdict]
        a, b = c.costs
        if priced:
            cells += [table.dollars(a), table.dollars(b), f"{b / a:.3f}" if a and b is not None else ""]
        made.add_row(*cells)
    return made
