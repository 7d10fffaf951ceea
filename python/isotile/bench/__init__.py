"""`isotile bench`: microbenchmarks of every operator, from the specs' cases alone. See docs/benchmarking.md."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if any(word in ("h100", "--suite=h100") for word in words) and any(word.startswith("--suite") for word in words):
        from . import gpu_suite  # which runs on a machine that has nothing but PyTorch and Triton

        return gpu_suite.run(words)
    try:
        import rich  # noqa: F401
    except ImportError as error:
        print(f"isotile bench: {error}; pip install 'isotile[bench]'", file=sys.stderr)
        return 2
    from . import command, compare, readme, report, traces

    others = {"compare": compare.run, "report": report.run, "readme": readme.run, "trace": traces.run}
    if words and words[0] in others:
        return others[words[0]](words[1:])
    return command.run(words)
