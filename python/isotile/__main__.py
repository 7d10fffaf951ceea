"""The command line: `isotile info | demo | bench | verify | tune`."""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import isotile

from . import registry
from .backends import BACKENDS
from .interrupt import INTERRUPTED
from .spec import OpSpec

README_MARKS = re.compile(r"(<!-- operators: begin[^\n]*-->\n).*?(<!-- operators: end -->)", re.DOTALL)


def versions() -> dict[str, Any]:
    return {
        "isotile": isotile.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "processor": _processor(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def info(args: argparse.Namespace) -> int:
    """Versions, and every backend: available, or why not."""
    if args.readme is not None:
        return rewrite_readme(Path(args.readme))
    facts: dict[str, Any] = {"versions": versions(), "backends": isotile.backends()}
    if args.json:
        print(json.dumps(facts, indent=2, default=str))
        return 0
    for name, value in facts["versions"].items():
        print(f"{name:<12} {value}")
    print()
    for backend in facts["backends"]:
        state = "available on " + ", ".join(backend["devices"]) if backend["available"] else "not available"
        print(f"{backend['name']:<12} {state}")
        for key, value in backend.items():
            if key in ("name", "available", "devices") or value is None:
                continue
            shown = ", ".join(map(str, value)) if isinstance(value, list | tuple) else value
            print(f"{'':<12}   {key.replace('_', ' ')}: {shown}")
    return 0


def operator_table() -> str:
    """The README's table: which backend has a kernel for which operator, and the dtypes it takes."""
    names = list(BACKENDS)
    lines = ["| operator | gradient | " + " | ".join(names) + " |", "| --- | --- |" + " --- |" * len(names)]
    for op, spec in registry.specs().items():
        if spec.internal:
            continue
        cells = [BACKENDS[name].dtypes(kernel_of(spec)) for name in names]
        shown = [", ".join(str(d).removeprefix("torch.") for d in cell) if cell else "—" for cell in cells]
        lines.append(f"| `{op}` | {'yes' if spec.backward else 'no'} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def kernel_of(spec: OpSpec) -> str:
    return "matmul" if spec.name == "linear" else spec.name


def rewrite_readme(path: Path) -> int:
    """Replace what stands between the table's marks."""
    text = path.read_text()
    if README_MARKS.search(text) is None:
        print(
            f"isotile info: {path} has no marks <!-- operators: begin --> and <!-- operators: end -->", file=sys.stderr
        )
        return 1
    path.write_text(README_MARKS.sub(lambda m: f"{m[1]}{operator_table()}\n{m[2]}", text))
    return 0


def demo(args: argparse.Namespace) -> int:
    from .demo import main as run

    return run(args.rest)


def bench(args: argparse.Namespace) -> int:
    from .bench import main as run

    return run(args.rest)


def verify(args: argparse.Namespace) -> int:
    from .verify import main as run

    return run(args.rest)


def tune(args: argparse.Namespace) -> int:
    from .tuning.command import main as run

    return run(args.rest)


def main(argv: Sequence[str] | None = None) -> int:
    try:
        return command(argv)
    except KeyboardInterrupt:  # before a command had anything to keep
        print("isotile: interrupted", file=sys.stderr)
        return INTERRUPTED


def command(argv: Sequence[str] | None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="isotile", description=isotile.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    about = commands.add_parser("info", help="versions, and every backend: available, or why not")
    about.add_argument("--json", action="store_true", help="as JSON")
    about.add_argument("--readme", metavar="FILE", help="rewrite the operator table between the marks in FILE")
    about.set_defaults(run=info)
    for name, run, text in (
        ("demo", demo, "a real encoder and a small training run, isotile against PyTorch"),
        ("bench", bench, "microbenchmarks of every operator against PyTorch"),
        ("verify", verify, "numerical conformance of every backend, as a report that can be checked"),
        ("tune", tune, "find the Triton kernels' configurations on a GPU, or model them for one"),
    ):
        if words[:1] == [name]:  # a parser of its own: argparse.REMAINDER refuses an option in front
            return run(argparse.Namespace(rest=words[1:]))
        added = commands.add_parser(name, help=text, add_help=False)
        added.add_argument("rest", nargs=argparse.REMAINDER)
        added.set_defaults(run=run)
    args = parser.parse_args(words)
    return args.run(args)


if __name__ == "__main__":
    sys.exit(main())
