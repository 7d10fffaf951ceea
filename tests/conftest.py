"""Hypothesis profiles, one thread for each worker, and the backends under test."""

from __future__ import annotations

import os
import signal

import hypothesis
import pytest
import torch

# A shell's background job ignores Ctrl-C, and so would the programs that the tests of interrupts start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

hypothesis.settings.register_profile(
    "ci",
    derandomize=True,
    max_examples=30,
    deadline=None,
    database=None,
    # A failure prints the line that repeats it; shrinking one can take longer than all the tests.
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    report_multiple_bugs=False,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.register_profile(
    "deep",
    max_examples=int(os.environ.get("ISOTILE_EXAMPLES", "10000")),
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
    print_blob=True,
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(autouse=True)
def _one_thread():
    """Workers share the cores; tests of threading set their own number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
