"""`isotile bench report RUN.jsonl`: one self-contained HTML file with a roofline, speed bars and a table."""

from __future__ import annotations

import argparse
import importlib.resources
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import money
from .records import NotARun, read

#: Of a row's fields, those that the page shows; samples stay in the JSON lines.
FIELDS = (
    "op", "case", "dtype", "direction", "contender", "ours", "threads", "shapes", "status", "reason", "median_s",
    "q1_s", "q3_s", "gb_per_s", "tflops", "roofline_share", "host_s", "bound_share", "relative_error", "flops", "bytes",
    "speed_vs", "cold", "quiet", "against", "peak_extra_bytes", "first_call_s", "tokens", "sweep", "device", "source",
    "usd_per_million_calls", "usd_per_billion_tokens",
)  # fmt: skip


def page(about: dict[str, Any], rows: list[dict[str, Any]], end: dict[str, Any] | None, plotly: str) -> str:
    """The whole page; `plotly` is the plotting library's source."""
    data = {
        "about": about,
        "end": end,
        "peaks": (end or {}).get("peaks") or {},
        "rows": [{n: r.get(n) for n in FIELDS} for r in rows],
    }
    # "</" in a string would end the script element.
    spelled = json.dumps(data, allow_nan=False).replace("</", "<\\/")
    template = importlib.resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    return template.replace("/*DATA*/null", spelled).replace("/*PLOTLY*/", plotly)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="isotile bench report", description="One run as one HTML file.")
    made.add_argument("run", type=Path, metavar="RUN.jsonl")
    made.add_argument("--out", type=Path, metavar="FILE", help="default: beside the run, with the ending .html")
    made.add_argument(
        "--price", action="append", default=[], metavar="DEVICE=USD", help="what an hour of a machine costs"
    )
    return made


def run(argv: Sequence[str]) -> int:
    """Writes the report. Returns 0, or 2 if the file is no run or the plotting library is missing."""
    args = parser().parse_args(argv)
    try:
        prices = money.parse(args.price)
    except money.PriceError as error:
        parser().error(f"--price: {error}")
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        print(f"isotile bench report: {error}; pip install plotly", file=sys.stderr)
        return 2
    try:
        about, rows, end = read(args.run)
    except (OSError, NotARun) as error:
        print(f"isotile bench report: {error}", file=sys.stderr)
        return 2
    for row in rows:
        money.add(prices or about.get("prices", {}), about, row)
    out = args.out or args.run.with_suffix(".html")
    out.write_text(page(about, rows, end, get_plotlyjs()), encoding="utf-8")
    print(out)
    return 0
