"""Repeat one example, as a failure prints it: `python -m isotile.testing [--law LAW] BACKEND RECIPE`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from ..backends import named
from .check import check_recipe
from .laws import LAWS, Inapplicable, Subject


def _recipe(text: str) -> dict[str, Any]:
    if text.startswith("{"):
        return json.loads(text)
    from ..verify.plan import named

    return named(text)


def main(argv: Sequence[str]) -> int:
    """Returns 0 if the example holds; a disagreement is raised."""
    parser = argparse.ArgumentParser(prog="python -m isotile.testing", description="Repeat one example on one backend.")
    parser.add_argument("backend", help="cpu, triton, nki, reference, or cpu[ISA]")
    parser.add_argument(
        "recipe", type=_recipe, help="the JSON that a failure printed, or an example of isotile verify by its name: "
        "seed/operator/dtype/index",
    )  # fmt: skip
    parser.add_argument("--device", default="cpu", help="PyTorch device of the tensors; default: cpu")
    parser.add_argument("--law", choices=LAWS, help="check this law instead of agreement with the truth")
    args = parser.parse_args(argv)
    try:
        named(args.backend)
    except ValueError as error:
        parser.error(str(error))
    if args.law is None:
        share = check_recipe(args.recipe, args.backend, args.device)
        print(f"agrees: the largest error is {share:.3g} of what is allowed")
        return 0
    try:
        share = LAWS[args.law].check(Subject(args.recipe, args.backend, args.device))
    except Inapplicable as why:
        print(f"{args.law} says nothing about this example: {why}")
        return 0
    print(f"{args.law} holds" + (f": {share:.3g} of what is allowed" if isinstance(share, float) else ""))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
