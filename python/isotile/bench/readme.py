"""`isotile bench readme RUN.jsonl`: a run's speed as a Markdown table, made by a command and not by hand."""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import table
from .compare import key_of
from .records import NotARun, read

MARKS = re.compile(r"(<!-- speed: begin[^\n]*-->\n).*?(<!-- speed: end -->)", re.DOTALL)
Rows = list[dict[str, Any]]


def _most(values: Sequence[Any]) -> int:
    return max((v for v in values if v is not None), default=1)


def summary(runs: Sequence[tuple[dict[str, Any], Rows]], contender: str = "cpu", rival: str = "torch") -> str:
    """Operators down, dtypes across: the geometric mean of the rival's time over ours, and its range over the cases.

    Several runs make one table; where two have the same row, the later one's counts.
    """
    threads = _most([r["threads"] for _, rows in runs for r in rows])
    last = {key_of(r): i for i, (_, rows) in enumerate(runs) for r in rows}
    chosen = [
        [r for r in rows if last[key_of(r)] == i and _counts(r, contender, threads) and rival in r["speed_vs"]]
        for i, (_, rows) in enumerate(runs)
    ]
    rated = [r for rows in chosen for r in rows]
    dtypes = list(dict.fromkeys(r["dtype"] for r in rated))
    lines = [
        f"| {rival}'s time / isotile's | " + " | ".join(dtypes) + " |",
        "| --- |" + " --- |" * len(dtypes),
    ]
    for op, direction in dict.fromkeys((r["op"], r["direction"]) for r in rated):
        cells = []
        for dtype in dtypes:
            found = [
                r["speed_vs"][rival]["median"]
                for r in rated
                if (r["op"], r["direction"], r["dtype"]) == (op, direction, dtype)
            ]
            cells.append(_ratios(found))
        lines.append(f"| `{op}` {direction} | " + " | ".join(cells) + " |")
    sources = [_source(about, threads, rows) for (about, _), rows in zip(runs, chosen, strict=True) if rows]
    legend = "Above 1 isotile is faster: the geometric mean over the cases, and the range."
    return "\n".join([*lines, "", legend, *(line for source in sources for line in ("", source))])


def _counts(row: dict[str, Any], contender: str, threads: int) -> bool:
    return row["contender"] == contender and row["status"] == "ok" and row["threads"] == threads


def _ratios(found: list[float]) -> str:
    if not found:
        return "—"
    middle = math.exp(statistics.fmean(map(math.log, found)))
    if len(found) == 1:
        return f"{middle:.2f}"
    return f"**{middle:.2f}** ({min(found):.2f} to {max(found):.2f})"


def _source(about: dict[str, Any], threads: int, rated: Rows) -> str:
    git = about.get("git")
    commit = f", commit {git['commit'][:10]}" if git else ""
    busy = sum(not r["quiet"] for r in rated)
    note = f" {busy} of {len(rated)} rows were measured while the machine was busy." if busy else ""
    device = about.get("device_name") or about["processor"]
    return (
        f"{about['date'][:10]}, {device} ({about['instruction_set']}), {threads} "
        f"thread{'s' * (threads > 1)}, PyTorch {about['torch']}, "
        f"isotile {about['isotile']}{commit}; `{about['command']}`.{note}"
    )


def operator(about: dict[str, Any], rows: Rows, op: str, contender: str = "cpu", rival: str = "torch") -> str:
    """One operator's cases, for its page: time, share of the roofline and speed, or an empty string."""
    threads = _most([r["threads"] for r in rows])
    own = [r for r in rows if r["op"] == op and _counts(r, contender, threads)]
    if not own:
        return ""
    lines = [f"| case | dtype | direction | time | share of the roofline | {rival}'s time / isotile's |"]
    lines.append("| --- | --- | --- | ---: | ---: | ---: |")
    for r in own:
        ratio = r["speed_vs"].get(rival)
        speed = f"{ratio['median']:.2f}" if ratio else "—"
        cells = r["case"], r["dtype"], r["direction"], table.seconds(r["median_s"]), f"{r['roofline_share']:.0%}", speed
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", _source(about, threads, own)])


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="isotile bench readme", description="One run's speed as a Markdown table.")
    made.add_argument("runs", type=Path, nargs="+", metavar="RUN.jsonl")
    made.add_argument(
        "--write", type=Path, metavar="FILE", help="put it between FILE's marks <!-- speed: begin/end -->"
    )
    made.add_argument("--contender", default="cpu", metavar="NAME", help="default: cpu")
    made.add_argument("--rival", default="torch", metavar="NAME", help="default: torch")
    return made


def run(argv: Sequence[str]) -> int:
    """Prints the table, or puts it between the marks of a file. Returns 0, or 2 if a file is not what it should be."""
    args = parser().parse_args(argv)
    try:
        runs = [read(path)[:2] for path in args.runs]
        text = args.write.read_text(encoding="utf-8") if args.write else None
    except (OSError, NotARun) as error:
        print(f"isotile bench readme: {error}", file=sys.stderr)
        return 2
    made_table = summary(runs, args.contender, args.rival)
    if text is None:
        print(made_table)
        return 0
    if MARKS.search(text) is None:
        print(f"isotile bench readme: {args.write} has no marks <!-- speed: begin --> and end", file=sys.stderr)
        return 2
    args.write.write_text(MARKS.sub(lambda m: f"{m[1]}{made_table}\n{m[2]}", text), encoding="utf-8")
    return 0
