"""`isotile verify compare A.json B.json ...`: reports of machines that never met, joined.

Two reports of one seed and one definition drew the same recipes, and digests show that the inputs were the same bits.
Then every output that both wrote down is held against the other: sampled elements within the sum of both bounds, and
whole results by their digests, which must be equal where equal bits are promised.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ..testing.compare import Bound, Disagreement
from ..testing.laws import difference
from . import figures, report
from .claims import FAILS, HOLDS, NOT_RUN

FAILED, USAGE = 1, 2
#: Columns where the output is no terminal.
WIDTH = 140


@dataclasses.dataclass
class Row:
    """One operator in one dtype, on one backend of one machine against one of another."""

    op: str
    dtype: str
    a: str
    b: str
    examples: int = 0
    left_out: int = 0  # inputs that one machine's float64 rounded otherwise
    elements: int = 0
    same_bits: int = 0
    promised: int = 0
    worst: float = 0.0
    failed: int = 0
    first_failure: str | None = None

    @property
    def verdict(self) -> str:
        return FAILS if self.failed else HOLDS if self.examples else NOT_RUN

    def broke(self, message: str) -> None:
        self.failed += 1
        self.first_failure = self.first_failure or message

    def record(self) -> dict[str, Any]:
        return {"verdict": self.verdict, **dataclasses.asdict(self)}


class Incomparable(ValueError):
    """Reports that did not verify the same thing; the message says why."""


def join(reports: dict[str, dict[str, Any]]) -> list[Row]:
    """Every backend of every report against every backend of the others.

    Args:
        reports: checked reports by name.

    Raises:
        Incomparable: other seeds or definitions, or inputs that are not the same bits.
    """
    (first, one), *others = reports.items()
    for name, other in others:
        if other["seed"] != one["seed"]:
            raise Incomparable(f"{first} drew from seed {one['seed']}, {name} from seed {other['seed']}: run one again")
        if other["definition"] != one["definition"]:
            raise Incomparable(
                f"{first} and {name} come from different versions of the operators' specs "
                f"({one['definition'][:12]} of isotile {one['provenance']['packages']['isotile']}, "
                f"{other['definition'][:12]} of isotile {other['provenance']['packages']['isotile']}): "
                "verify both machines with the same isotile"
            )
    rows: dict[tuple[str, str, str, str], Row] = {}
    for (a, one), (b, other) in itertools.combinations(reports.items(), 2):
        theirs = {e["id"]: e for e in other["examples"]}
        for example in one["examples"]:
            if example["id"] in theirs:
                _join_example(rows, (a, example), (b, theirs[example["id"]]))
    return [rows[key] for key in sorted(rows)]


def _join_example(
    rows: dict[tuple[str, str, str, str], Row], one: tuple[str, dict[str, Any]], other: tuple[str, dict[str, Any]]
) -> None:
    (a, ours), (b, theirs) = one, other
    for field in ("recipe", "inputs"):
        if ours[field] != theirs[field]:
            raise Incomparable(
                f"{a} and {b}: the {field} of example {ours['id']} differ ({ours[field]}, {theirs[field]}): one "
                "machine draws other bits, and nothing that follows can be compared"
            )
    op, dtype, _ = ours["id"].split("/")
    alike = ours["derived"] == theirs["derived"]
    for x, y in itertools.product(ours["outputs"], theirs["outputs"]):
        key = (op, dtype, f"{a}:{x}", f"{b}:{y}")
        row = rows.setdefault(key, Row(*key))
        if not alike:
            row.left_out += 1
            continue
        row.examples += 1
        for name in ours["outputs"][x].keys() & theirs["outputs"][y].keys():
            _join_result(row, name, ours, theirs, ours["outputs"][x][name], theirs["outputs"][y][name])


def _join_result(
    row: Row, name: str, ours: dict[str, Any], theirs: dict[str, Any], x: dict[str, str], y: dict[str, str]
) -> None:
    same = x["digest"] == y["digest"]
    where = f"{ours['id']} {name}"
    if name not in ours["results"]:  # a dropout mask: nothing but equal bits will do
        row.promised += 1
        if not same:
            row.broke(f"{where}: the bits differ, where equal bits are promised")
        return
    row.same_bits += same
    if ours["exact"]:
        row.promised += 1
        if not same:
            row.broke(f"{where}: small integers gave other bits")
    described = ours["results"][name]
    common = [i for i, at in enumerate(described["at"]) if at in theirs["results"][name]["at"]]
    if not common:
        return
    dtype = getattr(torch, described["dtype"])
    at = [described["at"][i] for i in common]
    got, other = (_picked(r, s, name, at, dtype) for r, s in ((ours, x), (theirs, y)))
    allowed = [
        [_number(r["results"][name]["allowed"][r["results"][name]["at"].index(i)]) for i in at] for r in (ours, theirs)
    ]
    # `difference` allows twice the bound: the mean of the two is half their sum.
    bound = Bound(other, torch.tensor(allowed, dtype=torch.float64).mean(0), dtype)
    row.elements += len(at)
    try:
        row.worst = max(row.worst, difference(where, got.to(dtype), other.to(dtype), bound))
    except Disagreement as error:
        row.broke(str(error))


def _picked(
    example: dict[str, Any], output: dict[str, str], name: str, at: list[int], dtype: torch.dtype
) -> torch.Tensor:
    values = figures.read(output["sample"], dtype)
    return values[[example["results"][name]["at"].index(i) for i in at]]


def _number(value: Any) -> float:
    return float(value)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="isotile verify compare",
        description="Joins reports of machines that never met: same seed, same inputs, outputs against each other.",
        epilog="Exit codes: 0 everything joined agrees, 1 something does not, 2 the reports cannot be compared.",
    )
    made.add_argument("reports", nargs="+", type=Path, metavar="REPORT.json")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    return made


def run(argv: Sequence[str]) -> int:
    """Returns 0 if all that was joined agrees, 1 if not, 2 if the reports cannot be compared."""
    made = parser()
    args = made.parse_args(argv)
    if len(args.reports) < 2:
        made.error("wanted at least two reports")
    try:
        reports = {name: report.read(path) for name, path in zip(_names(args.reports), args.reports, strict=True)}
        rows = join(reports)
    except (OSError, report.NotAReport, Incomparable) as error:
        print(f"isotile verify compare: {error}", file=sys.stderr)
        return USAGE
    _print(reports, rows)
    verdict = FAILS if any(r.failed for r in rows) else HOLDS if rows else NOT_RUN
    if args.json is not None:
        digests = {name: r["digest"] for name, r in reports.items()}
        found = {"verdict": verdict, "reports": digests, "rows": [r.record() for r in rows]}
        report.write(args.json, json.dumps(report.finite(found), indent=1) + "\n")
    if not rows:
        print("isotile verify compare: the reports have no example in common", file=sys.stderr)
        return USAGE
    return FAILED if verdict == FAILS else 0


def _names(paths: list[Path]) -> list[str]:
    """Short names that differ: the files' stems, or their paths."""
    stems = [p.stem for p in paths]
    return stems if len(set(stems)) == len(stems) else [str(p) for p in paths]


def _print(reports: dict[str, dict[str, Any]], rows: list[Row]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = WIDTH
    for name, found in reports.items():
        about = found["provenance"]
        runs = ", ".join(b["name"] + (f" ({b['emulated']})" if b["emulated"] else "") for b in found["backends"])
        console.print(f"{name}: {about['processor']}; {runs}; {found['verdict']}", markup=False)
    table = Table(box=None, pad_edge=False)
    for column in ("operator", "dtype", "between", "and"):
        table.add_column(column)
    for column in ("examples", "same bits", "elements", "of both bounds"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    for row in rows:
        mark = {HOLDS: "[green]holds[/]", FAILS: "[bold red]fails[/]"}.get(row.verdict, "[dim]left out[/]")
        figures_of = (row.examples, row.same_bits, row.elements, f"{row.worst:.3f}")
        table.add_row(row.op, row.dtype, escape(row.a), escape(row.b), *map(str, figures_of), mark)
    console.print(table)
    for row in rows:
        if row.failed:
            console.print(f"fails: {row.op} {row.dtype}, {row.a} and {row.b}: {row.first_failure}", markup=False)
    inputs = len({e["id"] for r in reports.values() for e in r["examples"]})
    console.print(
        f"{sum(not r.failed for r in rows)} of {len(rows)} rows hold; {inputs} examples, whose inputs were the same "
        "bits wherever two machines ran them"
    )
