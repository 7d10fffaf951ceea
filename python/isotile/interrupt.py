"""How a long command heeds Ctrl-C: it ends with what it has done so far."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from typing import Any

#: The exit code of a command that was interrupted.
INTERRUPTED = 130


class Interrupted(KeyboardInterrupt):
    """SIGINT or SIGTERM came.

    Not KeyboardInterrupt itself: where that passes through code compiled from a string, as that of a dataclass is,
    CPython ends the process by the signal later on, even if the exception was caught.
    """


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], None]]:
    """Within, SIGINT and SIGTERM raise `Interrupted`, where a shell does not have them ignored.

    Yields:
        a function to call between the steps of the work. Python drops an exception that is raised in a destructor or
        a callback of the garbage collector; this raises it again.
    """
    sent = []

    def stop(number: int, frame: Any) -> None:
        sent.append(number)
        raise Interrupted

    def check() -> None:
        if sent:
            raise Interrupted

    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    heeded = [n for n, handler in before.items() if handler is not signal.SIG_IGN]
    for number in heeded:
        signal.signal(number, stop)
    try:
        yield check
    finally:
        for number in heeded:
            signal.signal(number, before[number])
