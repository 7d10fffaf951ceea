"""The command `isotile demo`: arguments in, tables and an exit code out."""

import argparse
import datetime
import importlib.resources
import json
import math
import os
import pathlib
import platform
import time

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import isotile

from ..backends import BACKENDS
from . import compare, decoder, encoder, quantized, tables

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_sentences() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """The bundled (source, sentence) pairs and the (expected source, query) pairs."""
    text = importlib.resources.files(__package__).joinpath("sentences.tsv").read_text(encoding="utf-8")
    pairs = [tuple(line.split("\t")) for line in text.splitlines() if line and not line.startswith("#")]
    sentences = [(source, sentence) for source, sentence in pairs if not source.startswith("?")]
    queries = [(source[1:], sentence) for source, sentence in pairs if source.startswith("?")]
    return sentences, queries


def choose_backends(given: str | None, device: torch.device) -> list[str]:
    """The backends to compare: those asked for, or those that run on this device without emulation."""
    known = {b["name"]: b for b in isotile.backends()}
    if given is None:
        return [n for n, b in known.items() if device.type in b["devices"] and BACKENDS[n].serves(device.type)]
    names = given.split(",")
    for name in names:
        if name not in known:
            raise SystemExit(f"isotile demo: --backends: no backend {name!r}; there are {', '.join(known)}")
        if not known[name]["available"]:
            raise SystemExit(f"isotile demo: --backends: {name} is not available: {known[name]['reason']}")
    return names


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="isotile demo",
        description="A real model and a training run, by isotile and by plain PyTorch, against the float64 truth.",
    )
    parser.add_argument("--backends", help="comma-separated; default: all that run on the device without emulation")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--dtypes", default="float32,bfloat16", help=f"of the encoder, among {', '.join(DTYPES)}")
    parser.add_argument("--sentences", type=int, help="how many to embed; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved timings of the encoder")
    parser.add_argument("--steps", type=int, default=40, help="training steps of the decoder")
    parser.add_argument("--tiny", action="store_true", help="the bundled seeded encoder instead of the pretrained one")
    parser.add_argument(
        "--quantized", action="store_true", help="instead: the encoder in every quantised format, its size and speed"
    )
    parser.add_argument("--json", metavar="FILE", help="also write every figure here")
    parser.add_argument(
        "--readme",
        metavar="FILE",
        help="with --quantized: also put the table between FILE's marks <!-- quantised: begin/end -->",
    )
    return parser


def _quantized(args, console: Console, pretrained, sentences, queries, device: torch.device) -> int:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(
            f"{pretrained.name}: {len(sentences)} sentences", total=args.rounds * len(quantized.FORMATS)
        )
        rows = quantized.compare(pretrained, sentences, queries, args.rounds, device, lambda: progress.advance(task))
    console.print(tables.quantized_table(rows, len(queries)))
    console.print(
        "[dim]MB: the weights of the linear layers. 1-cos: between embeddings and the float32 model's. found: queries "
        "whose nearest sentence is the float32 model's. /torch: time over PyTorch's float32 model, side by side.[/]"
    )
    if args.json:
        record = {
            "isotile": isotile.__version__, "torch": torch.__version__, "device": _device_name(device),
            "threads": torch.get_num_threads(), "model": pretrained.name, "rows": [r.record() for r in rows],
        }  # fmt: skip
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(record, file, indent=1)
    if args.readme:
        path = pathlib.Path(args.readme)
        where = (
            f"{datetime.datetime.now(datetime.UTC).date()}, {_device_name(device)}, {torch.get_num_threads()} threads, "
            f"PyTorch {torch.__version__}, isotile {isotile.__version__};\n"
            f"`isotile demo --quantized --rounds {args.rounds} --readme {path.name}`."
        )
        made = tables.quantized_markdown(rows, pretrained.name, len(sentences), len(queries), where)
        path.write_text(tables.put(made, path.read_text(encoding="utf-8")), encoding="utf-8")
    wrong = [r.format for r in rows if not r.mean_cosine > quantized.LEAST_MEAN_COSINE]
    for name in wrong:
        console.print(f"[bold red]{escape(name)}: the embeddings are not those of the model[/]")
    return 1 if wrong else 0


def main(argv: list[str] | None = None) -> int:
    """Runs the demo. Returns 0 if every contender agrees with the truth within its limit, else 1."""
    parser = _parser()
    args = parser.parse_args(argv)
    unknown = [d for d in args.dtypes.split(",") if d not in DTYPES]
    if unknown:
        parser.error(f"--dtypes: {', '.join(unknown)}: not among {', '.join(DTYPES)}")
    for name in ("rounds", "steps"):
        if getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(args, name)}")
    if args.sentences is not None and args.sentences < 1:
        parser.error(f"--sentences must be at least 1, got {args.sentences}")
    if args.readme and not args.quantized:
        parser.error("--readme needs --quantized")
    if args.readme and not tables.MARKS.search(pathlib.Path(args.readme).read_text(encoding="utf-8")):
        parser.error(f"--readme: {args.readme} has no marks <!-- quantised: begin --> and end")
    console = Console()
    start = time.perf_counter()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    backends = choose_backends(args.backends, device)
    dtypes = [DTYPES[d] for d in args.dtypes.split(",")]
    sentences, queries = read_sentences()
    sentences = sentences[: args.sentences]
    pretrained = encoder.load(args.tiny)
    text, text_name = decoder.training_text("\n".join(s for _, s in sentences))

    console.print(
        f"[bold]isotile {isotile.__version__}[/] beside PyTorch {torch.__version__} on {_device_name(device)}, "
        f"{torch.get_num_threads()} threads; backends: {', '.join(backends)}"
    )
    if pretrained.note:
        console.print(f"[yellow]{escape(pretrained.note)}[/]")

    if args.quantized:
        return _quantized(args, console, pretrained, sentences, queries, device)

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        ticks = len(dtypes) * compare.encoder_ticks(1 + len(backends), args.rounds)
        encoding = progress.add_task(f"{pretrained.name}: {len(sentences)} sentences", total=ticks)
        training = progress.add_task(f"decoder: {args.steps} training steps", total=args.steps)
        encoded = compare.compare_encoder(
            pretrained, sentences, queries, backends, dtypes, args.rounds, device, lambda: progress.advance(encoding)
        )
        progress.update(encoding, completed=ticks)
        trained = compare.compare_decoder(
            text, text_name, backends, args.steps, device, lambda: progress.advance(training)
        )
    seconds = time.perf_counter() - start

    console.rule(f"1. {pretrained.name}", align="left")
    console.print(f"{len(sentences)} sentences, {encoded.tokens} tokens, {len(queries)} search queries")
    if not pretrained.note:
        console.print(tables.search_table(encoded.found))
        if args.sentences is None:
            hits = sum(f["source"] == f["expected"] for f in encoded.found)
            console.print(f"{hits} of {len(queries)} queries find a sentence of the work that they were written for.")
    console.print(tables.encoder_table(encoded, len(queries)))
    console.rule("2. Llama-style decoder", align="left")
    console.print(f"{trained.parameters:,} parameters, {args.steps} training steps in float32 on {text_name}")
    console.print(tables.curves(trained))
    console.print(tables.decoder_table(trained))
    console.print(tables.losses_table(trained, max(1, args.steps // 5)))
    console.print(
        "[dim]ulp: largest error, in units in the last place of the dtype at the value's scale. limit: 4 times "
        "PyTorch's own error, plus rounding. 1-cos: of the worst embedding. found: queries whose nearest sentence is "
        "the truth's. /torch: time over PyTorch's, measured side by side.[/]"
    )
    for row in encoded.rows + trained.rows:
        if row.refusal:
            console.print(f"[yellow]{row.contender}, {row.dtype}, refused:[/] {escape(row.refusal)}")

    failures = _failures(encoded.rows + trained.rows, asked=args.backends is not None)
    for failure in failures:
        console.print(f"[bold red]{escape(failure)}[/]")
    if not failures:
        console.print(f"[bold green]Everything agrees.[/] {seconds:.0f} s in all.")
    if args.json:
        record = {
            "isotile": isotile.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "device": _device_name(device),
            "threads": torch.get_num_threads(),
            "backends": backends,
            "encoder": {
                "model": pretrained.name,
                "note": pretrained.note,
                "sentences": len(sentences),
                "tokens": encoded.tokens,
                "found": encoded.found,
                "rows": [r.record() for r in encoded.rows],
            },
            "decoder": {
                "text": text_name,
                "parameters": trained.parameters,
                "steps": args.steps,
                "truth": trained.truth,
                "rows": [r.record() for r in trained.rows],
            },
            "seconds": seconds,
            "failures": failures,
        }
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(_spell_infinities(record), file, indent=1, allow_nan=False)
    return 1 if failures else 0


def _failures(rows, asked: bool) -> list[str]:
    failures = []
    for row in rows:
        who = f"{row.contender}, {row.dtype}"
        if row.refusal:
            # A backend that nobody asked for may decline; the table says so.
            if asked:
                failures.append(f"{who}: cannot run this model: {row.refusal}")
            continue
        failures += [
            f"{who}: {a.what} is {a.isotile:.3g} ulp from the truth, more than {a.limit:.3g} (PyTorch: {a.torch:.3g})"
            for a in row.agreements
            if not a.holds
        ]
        if not row.neighbours_hold:
            failures.append(f"{who}: a query finds another sentence than the truth, and not one as near")
    if rows and all(row.refusal for row in rows if row.contender != compare.TORCH):
        failures.append("no backend ran")
    return failures


def _spell_infinities(value):
    """`value` with NaN and infinities as strings, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {k: _spell_infinities(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_spell_infinities(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU ({os.cpu_count()} cores)"
