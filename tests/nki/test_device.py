"""The backend where a Neuron device, or the SDK, is present: both made up, since neither can be installed here."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import isotile
from isotile import library, nki_emulator
from isotile.backends import nki as backend
from isotile.state import use_backend

HERE = pathlib.Path(__file__).parent


@pytest.fixture(scope="module")
def device():
    """What `made_up_device.py` saw, in a process of its own."""
    run = subprocess.run([sys.executable, HERE / "made_up_device.py"], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


def test_a_device_without_the_sdk_says_what_is_missing(device):
    assert len(device["without_sdk"]) == 1
    assert "'reference'" in device["without_sdk"][0]
    assert "Neuron SDK" in device["without_sdk"][0]


def test_neuron_tensors_come_to_the_backend_unasked(device):
    assert device["runs"] == "nki"
    assert device["info"]["devices"] == ["cpu", "neuron"]
    assert device["info"]["runs_in"] == "hardware (neuron tensors)"


@pytest.mark.parametrize("how", ["eager", "compiled"])
def test_kernels_and_gradients_run_on_the_device(device, how):
    """Eagerly and under torch.compile(fullgraph=True), against the CPU backend."""
    assert device[how] < 1e-4


def test_a_refusal_on_the_device_is_visible_and_answered_there(device):
    assert len(device["fallback"]) == 1
    assert "'nki' refuses: head_dim of 600" in device["fallback"][0]
    assert device["fallback_device"] == "neuron"
    assert device["fallback_error"] < 1e-5


def test_cpu_tensors_go_to_the_sdks_simulator_where_there_is_one(monkeypatch):
    nki_emulator.install()
    monkeypatch.setattr(backend, "_modules", lambda: (nki_emulator, nki_emulator, None))
    plans = library.operator("softmax").plans
    plans.clear()
    seen = []
    run = nki_emulator.kernel.run

    def watch(*args):
        seen.append((os.environ["NKI_SIMULATOR"], os.environ["NEURON_PLATFORM_TARGET_OVERRIDE"]))
        return run(*args)

    monkeypatch.setattr(nki_emulator.kernel, "run", watch)
    x = torch.randn(3, 40)
    try:
        with use_backend("nki"):
            torch.testing.assert_close(isotile.softmax(x), x.softmax(-1))
    finally:
        plans.clear()
    assert seen == [("1", "gen3")]
    assert "NKI_SIMULATOR" not in os.environ
    (found,) = [b for b in isotile.backends() if b["name"] == "nki"]
    assert found["runs_in"] == "the Neuron SDK's simulator"
