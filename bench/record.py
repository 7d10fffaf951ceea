"""Makes the runs kept in bench/results: every operator, forward and backward, on one thread and on all cores.

    python bench/record.py [more arguments of `isotile bench`]

Use a machine that does nothing else; the table marks what was measured while it did.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from isotile.bench import main

RESULTS = Path(__file__).parent / "results"


def record(words: list[str]) -> int:
    """The worst exit code of the runs."""
    codes = [
        main(["--direction", "both", "--threads", str(threads), "--out", str(RESULTS), *words])
        for threads in sorted({1, os.cpu_count() or 1})
    ]
    return max(codes)


if __name__ == "__main__":
    sys.exit(record(sys.argv[1:]))
