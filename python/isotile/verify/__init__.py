"""`isotile verify`: numerical conformance of every backend, as a report that can be checked.

See docs/verify.md. `isotile.verify.main(argv)` is the command.
"""

from .command import main

__all__ = ["main"]
