"""The demo's results for a person at a terminal of 80 columns."""

import re

from rich import box
from rich.table import Table
from rich.text import Text

from .compare import TORCH

MARKS = re.compile(r"(<!-- quantised: begin[^\n]*-->\n).*?(<!-- quantised: end -->)", re.DOTALL)
_BARS = "▁▂▃▄▅▆▇█"


def sparkline(values) -> str:
    low, high = min(values), max(values)
    span = high - low or 1.0
    return "".join(_BARS[min(len(_BARS) - 1, int((v - low) / span * len(_BARS)))] for v in values)


def _table(title: str, left: tuple[str, ...], right: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, min_width=len(title))
    for name in left:
        table.add_column(name, no_wrap=True, overflow="ellipsis")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _verdict(row) -> str:
    if row.contender == TORCH:
        return ""
    return "[green]agrees[/]" if row.agrees else "[bold red]DIFFERS[/]"


def _time(row) -> tuple[str, str]:
    ratio = "" if row.contender == TORCH else f"{row.times_torch:.2f}"
    return f"{row.milliseconds:.1f}", ratio


def _limit(row) -> str:
    return "" if row.contender == TORCH else f"{row.agreements[0].limit:.1f}"


def search_table(found) -> Table:
    table = _table("What the search finds", ("query", "nearest sentence"), ("cosine",))
    table.columns[0].ratio, table.columns[1].ratio = 1, 1
    table.expand = True
    for f in found:
        table.add_row(Text(f["query"]), Text(f["sentence"]), f"{f['cosine']:.2f}")
    return table


def encoder_table(result, queries: int) -> Table:
    table = _table(
        "Distance of the embeddings from the float64 truth, and time",
        ("dtype", "run by"),
        ("ulp", "limit", "1-cos", "found", "ms", "/torch", ""),
    )
    dtype = None
    for row in result.rows:
        if row.refusal:
            continue
        if dtype not in (None, row.dtype):
            table.add_section()
        dtype = row.dtype
        table.add_row(
            row.dtype,
            row.contender,
            f"{row.error_ulps:.1f}",
            _limit(row),
            f"{max(row.one_minus_cosine, 0.0):.0e}",
            f"{row.same_neighbours}/{queries}",
            *_time(row),
            _verdict(row),
        )
    return table


def quantized_markdown(rows, model: str, sentences: int, queries: int, where: str) -> str:
    """The table of `quantized_table` for a README; `where` says where and how it was measured."""
    lines = [
        "| format | MB | smaller | mean cosine | least cosine | queries found | PyTorch's time / isotile's |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {r.format} | {r.megabytes:.1f} | {r.smaller:.1f} | {r.mean_cosine:.5f} | {r.least_cosine:.4f} | "
        f"{r.same_neighbours} of {queries} | {1 / r.times_torch:.2f} |"
        for r in rows
    ]
    legend = (
        f"{model}, {sentences} sentences. MB: the weights of the linear layers. Cosines are between embeddings and\n"
        "those of the float32 model in PyTorch, whose time is the one compared with. Found: queries whose nearest\n"
        "sentence is that model's."
    )
    return "\n".join([*lines, "", legend, "", where])


def put(made: str, page: str) -> str:
    """`page` with the table between its marks."""
    return MARKS.sub(lambda m: f"{m[1]}{made}\n{m[2]}", page)


def quantized_table(rows, queries: int) -> Table:
    table = _table(
        "The encoder in quantised formats",
        ("format",),
        ("MB", "smaller", "1-cos, mean", "worst", "found", "ms", "/torch"),
    )
    for row in rows:
        table.add_row(
            row.format,
            f"{row.megabytes:.1f}",
            f"{row.smaller:.1f}x",
            f"{1 - row.mean_cosine:.1e}",
            f"{1 - row.least_cosine:.1e}",
            f"{row.same_neighbours}/{queries}",
            f"{row.milliseconds:.0f}",
            f"{row.times_torch:.2f}",
        )
    return table


def decoder_table(result) -> Table:
    table = _table(
        "Distance of the loss curve from the float64 truth, and time of a step",
        ("run by",),
        ("last loss", "|difference|", "ulp", "limit", "ms", "/torch", ""),
    )
    for row in result.rows:
        if row.refusal:
            continue
        difference = max(abs(a - b) for a, b in zip(row.losses, result.truth, strict=True))
        table.add_row(
            row.contender,
            f"{row.losses[-1]:.6f}",
            f"{difference:.1e}",
            f"{row.error_ulps:.1f}",
            _limit(row),
            *_time(row),
            _verdict(row),
        )
    return table


def curves(result) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name, losses in (("float64 truth", result.truth), *((r.contender, r.losses) for r in result.rows if r.losses)):
        # At most 48 bars, so that a line fits.
        bars = losses[:: -(-len(losses) // 48)]
        table.add_row(name, sparkline(bars), f"{losses[0]:.3f} to {losses[-1]:.3f}")
    return table


def losses_table(result, every: int) -> Table:
    """The curves side by side at every `every`-th step: PyTorch's loss, and each backend's difference from it."""
    rows = [r for r in result.rows if not r.refusal]
    torch_row = next(r for r in rows if r.contender == TORCH)
    others = [r for r in rows if r is not torch_row]
    table = _table(
        "Loss at some steps, and each backend's difference from PyTorch",
        (),
        ("step", TORCH, *(r.contender for r in others)),
    )
    steps = sorted({*range(0, len(torch_row.losses), every), len(torch_row.losses) - 1})
    for s in steps:
        table.add_row(
            str(s), f"{torch_row.losses[s]:.6f}", *(f"{r.losses[s] - torch_row.losses[s]:+.1e}" for r in others)
        )
    return table
