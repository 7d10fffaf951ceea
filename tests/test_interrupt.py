"""Ctrl-C ends a long command at once, with an exit code of its own."""

import signal
import subprocess
import sys

import pytest

from isotile.interrupt import INTERRUPTED, Interrupted, interruptible

IN_COMPILED_STRING = """
import sys, time
from isotile.interrupt import INTERRUPTED, interruptible
try:
    with interruptible():
        print("ready", flush=True)
        exec("while True: time.sleep(0.01)")
except KeyboardInterrupt:
    sys.exit(INTERRUPTED)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_the_exit_code_is_kept_wherever_the_signal_comes(tmp_path, sent):
    (tmp_path / "program.py").write_text(IN_COMPILED_STRING)
    process = subprocess.Popen([sys.executable, "-m", "program"], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(sent)
    assert process.wait(60) == INTERRUPTED


def test_handlers_are_put_back():
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted), interruptible():
        signal.raise_signal(signal.SIGTERM)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_dropped_exception_is_raised_again():
    with pytest.raises(Interrupted), interruptible() as check_signals:
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGINT)
        check_signals()


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with interruptible() as check_signals:
            signal.raise_signal(signal.SIGINT)
            check_signals()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_command_that_has_nothing_yet_says_so(monkeypatch, capsys):
    from isotile import __main__

    def interrupted(argv):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "command", interrupted)
    assert __main__.main(["info"]) == INTERRUPTED
    assert "interrupted" in capsys.readouterr().err
