"""Repeat one failing example: `python -m isotile.testing BACKEND RECIPE`, as printed by a failing test."""

from __future__ import annotations

import json
import sys

from .check import check_recipe


def main(argv: list[str]) -> int:
    if len(argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    backend, recipe = argv
    share = check_recipe(json.loads(recipe), backend)
    print(f"agrees: the largest error is {share:.3g} of what is allowed")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
