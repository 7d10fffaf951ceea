"""`isotile demo`: a real model and a training run, by isotile and by plain PyTorch, against the float64 truth.

The encoder (encoder.py) and the decoder (decoder.py) are written once and run on both operator namespaces; compare.py
measures them, agreement.py says when two programs agree, tables.py shows it, command.py is the command.
"""

import importlib.util
import sys


def main(argv: list[str] | None = None) -> int:
    """Runs the demo with command line arguments. Returns 0 if every contender agrees with the truth, else 1."""
    if importlib.util.find_spec("rich") is None:
        print("isotile demo: needs the package rich (pip install 'isotile[demo]')", file=sys.stderr)
        return 1
    from . import command

    return command.main(argv)
