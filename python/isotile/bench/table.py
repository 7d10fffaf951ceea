"""The table that a person reads while a run goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.markup import escape

#: where the output is not a terminal
WIDTH = 150
COLOURS = {"wrong": "bold red", "error": "bold red", "unserved": "yellow", "modelled": "cyan"}


def seconds(value: float | None) -> str:
    if value is None:
        return ""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("us", 1e-6)):
        if value >= size:
            return f"{value / size:.3g} {unit}" if value / size < 999.5 else f"{value / size:.0f} {unit}"
    return f"{value / 1e-9:.3g} ns"


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def megabytes(value: float | None) -> str:
    return "" if value is None else "<1 MB" if value < 1e6 else f"{number(value / 1e6)} MB"


def dollars(value: float | None) -> str:
    return "" if value is None else f"${value:.2f}" if value >= 1 else f"${value:.2g}"


def _spread(row: dict[str, Any]) -> str:
    return f"{seconds(row['q1_s'])}..{seconds(row['q3_s'])}".replace(" ", "")


@dataclasses.dataclass(frozen=True)
class Column:
    """A column of figures; those with the lowest rank go first where the terminal is narrow."""

    title: str
    width: int
    rank: int
    text: Callable[[dict[str, Any]], str]


COLUMNS = (
    Column("time", 9, 9, lambda r: seconds(r["median_s"])),
    Column("quartiles", 17, 3, _spread),
    Column("GB/s", 7, 5, lambda r: number(r["gb_per_s"])),
    Column("TFLOP/s", 8, 4, lambda r: number(r["tflops"])),
    Column("roof", 5, 7, lambda r: f"{r['roofline_share']:.0%}"),
    Column("host", 8, 2, lambda r: seconds(r["host_s"])),
    Column("memory", 8, 1, lambda r: megabytes(r.get("peak_extra_bytes"))),
    Column("error", 6, 6, lambda r: number(r["bound_share"]) if r["ours"] else ""),
)
#: with `--price`
COST = Column("$/1M", 7, 8, lambda r: dollars(r.get("usd_per_million_calls")))
#: a rival's distance from the truth, as a share of its norm, that a reader of its speed should know
WORTH_SAYING = {"float64": 1e-6, "float32": 1e-3, "bfloat16": 0.03, "float16": 0.03}
CASE, DTYPE, CONTENDER, SPEED = 28, 9, 11, 14


class Table:
    """Lines of one width for a console."""

    def __init__(self, width: int, rivals: int = 1, priced: bool = False) -> None:
        free = width - CASE - DTYPE - CONTENDER - 3 - SPEED * min(rivals, 2) - 2
        known = (*COLUMNS, COST) if priced else COLUMNS
        shown = sorted(known, key=lambda c: -c.rank)
        while shown and sum(c.width + 1 for c in shown) > free:
            shown.pop()
        self.columns = [c for c in known if c in shown or c.title == "time"]

    def header(self) -> str:
        titles = "".join(f" {c.title:>{c.width}}" + (" " if c.title == "time" else "") for c in self.columns)
        return f"[dim]{'case':<{CASE}} {'dtype':<{DTYPE}} {'contender':<{CONTENDER}}{titles}  speed[/]"

    def line(self, row: dict[str, Any], first: bool) -> str:
        """One row, with console markup; `first` of its workload."""
        case = f"{row['case']:<{CASE}} {row['dtype']:<{DTYPE}}" if first else " " * (CASE + DTYPE + 1)
        name = f"{row['contender']:<{CONTENDER}}"
        name = f"[bold]{name}[/]" if row["ours"] else name
        if row["status"] != "ok":
            colour = COLOURS["unserved" if row["status"] == "wrong" and not row["ours"] else row["status"]]
            return f"{case} {name}  [{colour}]{row['status']}[/]: {escape(row['reason'].splitlines()[0])}"
        figures = ""
        for column in self.columns:
            figures += f" {column.text(row):>{column.width}}"
            if column.title == "time":
                figures += " " if row["quiet"] else "~"
        speed = "  ".join(_ratio(r, rival) for rival, r in row["speed_vs"].items())
        if not row["ours"] and row["relative_error"] > WORTH_SAYING[row["dtype"]]:
            speed = f"[dim]off by {row['relative_error']:.1%} of the norm[/]"
        return f"{case} {name}{figures}  {speed}"


def _ratio(ratio: dict[str, Any], rival: str) -> str:
    colour = "green" if ratio["median"] >= 1 else "red"
    return f"[{colour}]{ratio['median']:.2f}x[/]{'' if ratio['quiet'] else '~'} {rival}"


def console() -> Console:
    made = Console(highlight=False, soft_wrap=True)
    return made if made.is_terminal else Console(highlight=False, soft_wrap=True, width=WIDTH)


LEGEND = (
    "time: median of the rounds; ~: rounds in which the machine was busy. roof: share of the speed that the measured "
    "peaks allow. host: what a call costs besides its kernel. memory: what it takes at most, results included. error: "
    "the largest, as a share of the derived bound. speed: rival's time over ours, round by round; above 1 isotile is "
    "faster."
)
