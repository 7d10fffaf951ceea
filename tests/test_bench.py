"""`isotile bench`: nothing wrong gets a figure, runs leave valid files, `compare` tells slow from noisy."""

from __future__ import annotations

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich")

import isotile
import isotile.nn
from isotile import dispatch, library, registry
from isotile.backends import BACKENDS
from isotile.backends.reference import ReferenceBackend
from isotile.bench import compare, main, memory, money, records, runner, timing
from isotile.bench import machine as machine_module
from isotile.bench.agreement import Judge, relative_error
from isotile.bench.contenders import Ours, Prepared, Unserved
from isotile.bench.peers import RIVALS
from isotile.bench.rivals import EXPRESSIONS, torch_expression
from isotile.bench.suites import SUITES
from isotile.bench.workloads import Inputs, UsageError, Workload, select, tokens_of
from isotile.record import load
from isotile.spec import Case
from isotile.testing.recipes import build, dtype_name

sys.path.insert(0, str(Path(__file__).parent))
import _browser

QUICK = ["--quick", "--threads", "1", "--against", "torch"]


class Planted(ReferenceBackend):
    """The reference with something done to its results."""

    name = "planted"

    def __init__(self, harm=None, kernel=None):
        self.harm, self.kernel = harm, kernel

    def prepare(self, request):
        run = super().prepare(request)
        if self.harm is None or (self.kernel and request.spec.name != self.kernel):
            return run

        def harmed(*tensors):
            run(*tensors)
            self.harm(*[t for t in tensors[len(request.spec.tensors) :] if t is not None])

        return harmed


@pytest.fixture(autouse=True)
def _machine(monkeypatch, tmp_path):
    """No long probe of the machine, no cache outside of the test, a console that does not wrap."""
    monkeypatch.setenv("ISOTILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(machine_module, "bandwidth", lambda quick: 1e10)
    monkeypatch.setattr(machine_module, "products", lambda dtype, quick: 1e11)


@pytest.fixture
def plant(monkeypatch):
    """Puts a backend `planted` in place; plans of an earlier one are forgotten."""

    def put(harm=None, kernel=None):
        monkeypatch.setitem(BACKENDS, "planted", Planted(harm, kernel))
        for name in registry.specs():
            library.operator(name).plans.clear()

    return put


def run(tmp_path, *words):
    """(exit code, run record, rows, end record) of one benchmark run."""
    out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    code = main([*words, "--out", str(out)])
    (path,) = out.glob("*.jsonl")
    return code, *records.read(path)


def by_contender(rows):
    return {r["contender"]: r for r in rows}


def test_rows_hold_what_they_promise(tmp_path, plant):
    plant()
    code, about, rows, end = run(tmp_path, "layer_norm", "--backends", "planted", "--dtypes", "float32", *QUICK)
    assert code == 0
    assert end["complete"] and end["rows"] == len(rows) == 2
    ours, torch_row = by_contender(rows)["planted"], by_contender(rows)["torch"]
    assert ours["shapes"] == {"x": [16, 256], "weight": [256], "bias": [256]}
    assert ours["bytes"] == 4 * (2 * 16 * 256 + 2 * 256)
    assert ours["flops"] == 8 * 16 * 256
    assert 0 < ours["bound_share"] <= 1 and ours["against"] == "truth"
    assert ours["q1_s"] <= ours["median_s"] <= ours["q3_s"]
    assert ours["gb_per_s"] == pytest.approx(ours["bytes"] / ours["median_s"] / 1e9)
    assert ours["roofline_share"] == pytest.approx(max(ours["bytes"] / 1e10, ours["flops"] / 1e11) / ours["median_s"])
    assert 0 < ours["host_s"] < ours["median_s"] * 2
    assert set(ours["speed_vs"]) == {"torch"} and ours["speed_vs"]["torch"]["median"] > 0
    assert torch_row["median_s"] > 0 and "speed_vs" not in {k for k, v in torch_row.items() if v}
    for name in ("date", "command", "isotile", "torch", "processor", "threads", "instruction_set", "contenders"):
        assert name in about
    assert about["command"].startswith("isotile bench layer_norm --backends planted")


def test_csv_has_every_row(tmp_path, plant):
    plant()
    run(tmp_path, "softmax", "--backends", "planted", "--dtypes", "float32,bfloat16", *QUICK)
    (path,) = tmp_path.glob("out*/*.csv")
    rows = list(csv.DictReader(path.open()))
    assert [(r["dtype"], r["contender"]) for r in rows] == [
        ("float32", "planted"), ("float32", "torch"), ("bfloat16", "planted"), ("bfloat16", "torch"),
    ]  # fmt: skip
    assert all(float(r["median_s"]) > 0 for r in rows)
    assert float(rows[0]["speed_vs_torch"]) > 0


def test_planted_wrong_kernel_gets_no_figure(tmp_path, plant, capsys):
    plant(lambda y: y[3, 5].add_(1e-3))
    code, _, rows, end = run(tmp_path, "layer_norm", "--backends", "planted", "--dtypes", "float32", *QUICK)
    wrong = by_contender(rows)["planted"]
    assert code == 1 and end["complete"]
    assert wrong["status"] == "wrong" and "median_s" not in wrong and "speed_vs" not in wrong
    assert "y[3, 5]" in wrong["reason"] and "python -m isotile.testing planted" in wrong["reason"]
    assert by_contender(rows)["torch"]["status"] == "ok"
    assert "wrong" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("op", "kernel", "harm", "where"),
    [
        ("layer_norm", "layer_norm_backward", lambda x, w, b: w[7].add_(1e-2), "layer_norm_backward gave grad_weight"),
        ("softmax", "softmax_backward", lambda g: g[0, 0].add_(1e-3), "softmax_backward gave grad_x"),
        ("linear", "matmul", lambda y: y.flatten()[5].mul_(1.01), "matmul gave y"),
    ],
)
def test_planted_wrong_gradient_gets_no_figure(tmp_path, plant, op, kernel, harm, where):
    plant(harm, kernel)
    words = (op, "--cases", "tiny", "--backends", "planted", "--dtypes", "float32", "--direction", "backward", *QUICK)
    code, _, rows, _ = run(tmp_path, *words)
    wrong = by_contender(rows)["planted"]
    assert code == 1
    assert wrong["status"] == "wrong" and where in wrong["reason"] and "median_s" not in wrong


def test_wrong_composition_of_right_kernels_gets_no_figure(tmp_path, plant, monkeypatch):
    """Each kernel agrees with its own truth, but the formula around them forgets a factor."""
    plant()
    op = library.operator("linear")
    formula = op.spec.backward
    halved = lambda saved, grads, needs: {  # noqa: E731
        n: g * 0.5 if n == "bias" and g is not None else g for n, g in formula(saved, grads, needs).items()
    }
    monkeypatch.setitem(op.spec.__dict__, "backward", halved)
    words = ("linear", "--cases", "tiny", "--backends", "planted", "--dtypes", "float32", "--direction", "backward")
    code, _, rows, _ = run(tmp_path, *words, *QUICK)
    assert code == 1
    assert "gradient of bias" in by_contender(rows)["planted"]["reason"]


def test_wrong_rival_gets_no_ratio_and_is_no_failure(tmp_path, plant, monkeypatch):
    plant()
    monkeypatch.setitem(EXPRESSIONS, "softmax", lambda v: (lambda x: torch.softmax(x, 0), (v["x"],)))
    code, _, rows, _ = run(tmp_path, "softmax", "--backends", "planted", "--dtypes", "float32", *QUICK)
    assert code == 0
    assert by_contender(rows)["torch"]["status"] == "wrong"
    assert by_contender(rows)["planted"]["speed_vs"] == {}


def test_rival_that_raises_is_a_failure_in_its_own_words(tmp_path, plant, monkeypatch):
    plant()

    def broken(x):
        raise RuntimeError("no such instruction")

    monkeypatch.setitem(EXPRESSIONS, "softmax", lambda v: (broken, (v["x"],)))
    code, _, rows, _ = run(tmp_path, "softmax", "--backends", "planted", "--dtypes", "float32", *QUICK)
    assert code == 1
    assert by_contender(rows)["torch"]["reason"] == "RuntimeError: no such instruction"


def test_planted_slow_kernel_is_flagged_by_compare(tmp_path, plant, capsys):
    words = ("layer_norm", "--backends", "planted", "--dtypes", "float32", *QUICK)
    plant()
    run(tmp_path, *words)
    plant(lambda y: time.sleep(0.004))
    run(tmp_path, *words)
    a, b = sorted(tmp_path.glob("out*/*.jsonl"), key=lambda p: p.parent.name)
    capsys.readouterr()
    assert main(["compare", str(a), str(b), "--threshold", "3"]) == 1
    shown = capsys.readouterr().out
    assert "slower" in shown and "planted" in shown
    assert main(["compare", str(b), str(a), "--threshold", "3"]) == 0
    assert main(["compare", str(a), str(a)]) == 0


def test_compare_relative_to_a_rival_forgives_a_slower_machine():
    def row(contender, scale):
        samples = [scale * (1 + 0.01 * i) for i in range(9)]
        return {
            "op": "softmax", "case": "tiny", "dtype": "float32", "direction": "forward", "contender": contender,
            "status": "ok", "samples_s": samples, "clean": [True] * 9, "calls": 1,
        }  # fmt: skip

    a, b = [row("cpu", 1.0), row("torch", 2.0)], [row("cpu", 3.0), row("torch", 6.0)]
    absolute, _, _ = compare.changes(a, b, None)
    related, _, _ = compare.changes(a, b, "torch")
    assert all(c.slower(1.1) and c.ratio == pytest.approx(3) for c in absolute)
    assert [c.key[-1] for c in related] == ["cpu"] and not related[0].slower(1.1)
    assert related[0].ratio == pytest.approx(1)


def test_compare_needs_more_than_noise():
    key = ("op", "case", "float32", "forward", "cpu")
    quiet = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.01]
    noisy = [1.0, 1.8, 0.99, 2.5, 1.3, 1.9, 1.2]
    assert not compare.change(key, quiet, noisy).slower(1.1)
    assert compare.change(key, quiet, [1.3 * s for s in quiet]).slower(1.1)
    assert not compare.change(key, quiet, [1.05 * s for s in quiet]).slower(1.1)
    assert compare.change(key, quiet, [0.5 * s for s in quiet]).faster(1.1)


def test_compare_names_rows_that_lost_their_figure(tmp_path, plant, capsys):
    words = ("softmax", "--backends", "planted", "--dtypes", "float32", *QUICK)
    plant()
    run(tmp_path, *words)
    plant(lambda y: y.mul_(1.1))
    run(tmp_path, *words)
    a, b = sorted(tmp_path.glob("out*/*.jsonl"), key=lambda p: p.parent.name)
    assert main(["compare", str(a), str(b)]) == 1
    assert "has no figure in B" in capsys.readouterr().out


def test_compare_refuses_what_is_no_run(tmp_path, capsys):
    path = tmp_path / "x.jsonl"
    path.write_text('{"kind": "run"}\n{"kind": ')
    assert main(["compare", str(path), str(path)]) == 2
    assert "x.jsonl:2: not JSON" in capsys.readouterr().out
    assert main(["compare", str(tmp_path / "absent"), str(path)]) == 2


def test_interrupt_leaves_valid_files(tmp_path, plant, monkeypatch):
    plant()
    measured = runner.Runner.rows
    seen = []

    def rows(self, workload):
        seen.append(workload)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)  # the signal arrives here
        return measured(self, workload)

    monkeypatch.setattr(runner.Runner, "rows", rows)
    code, _, found, end = run(tmp_path, "softmax", "layer_norm", "--backends", "planted", *QUICK)
    assert code == 130
    assert len(found) == 4 and all(r["status"] == "ok" for r in found)
    assert end["complete"] is False and end["rows"] == 4
    (path,) = tmp_path.glob("out*/*.csv")
    assert len(list(csv.DictReader(path.open()))) == 4


def test_run_killed_outright_leaves_whole_lines(tmp_path):
    torch.set_num_threads(1)
    peaks = machine_module.Peaks(quick=True)
    peaks.bandwidth()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        peaks.flops(dtype)  # kept for the process below
    out = tmp_path / "out"
    command = [sys.executable, "-m", "isotile", "bench", *QUICK, "--out", str(out), "softmax"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("tiny"):
            break
    process.kill()
    process.wait()
    process.stdout.close()
    (path,) = out.glob("*.jsonl")
    about, rows, end = records.read(path)
    assert about["kind"] == "run" and rows and end is None


def test_every_public_operator_has_rows_and_a_pytorch_expression():
    chosen = select([], None, None, ("forward", "backward"), quick=False)
    public = {n for n, s in registry.specs().items() if not s.internal}
    assert {w.spec.name for w in chosen} == public
    for workload in select([], None, [torch.float32], ("forward",), quick=True):
        assert not isinstance(torch_expression(workload.spec.name, Inputs(workload, 0, False).sets[0]), str)


@pytest.mark.parametrize("name", sorted(registry.specs()))
def test_inputs_of_a_case_are_a_valid_call(name):
    """The recipe made from a case has the case's shapes, for internal operators too."""
    for workload in select([name], ["tiny"], [torch.float32, torch.bfloat16], ("forward",), quick=True):
        inputs = Inputs(workload, 0, False)
        for argument, shape in workload.shapes().items():
            assert list(inputs.sets[0][argument].shape) == shape
        dispatch.check_types(workload.spec, inputs.sets[0])
        assert inputs.flops() > 0 and inputs.results_bytes() > 0


def test_options_of_a_case_reach_the_public_function(plant):
    """A causal, grouped, bottom-right case with a window goes through the public door and agrees."""
    plant()
    spec = registry.spec("attention")
    shapes = {"query": (2, 4, 5, 8), "key": (2, 2, 9, 8), "value": (2, 2, 9, 8)}
    options = {"is_causal": True, "causal_alignment": "bottom_right", "window_left": 3}
    case = Case("here", "bench", {**shapes, **options}, (torch.float32,))
    workload = Workload(spec, case, torch.float32, "forward")
    inputs = Inputs(workload, 0, False)
    ours = Ours("planted")
    with ours.context(), torch.no_grad():
        found = Prepared(ours, workload, inputs).first()
    assert Judge(workload, inputs).forward(found, True, "planted").ok
    assert "window_left" in torch_expression("attention", inputs.sets[0])


def test_constant_weights_are_packed_before_the_timing():
    workloads = select(["linear", "matmul"], ["odd_tails"], [torch.float32], ("forward", "backward"), False)
    layers = 0
    for workload in workloads:
        backward = workload.direction == "backward"
        inputs, ours = Inputs(workload, 0, backward), Ours("cpu", constant_weights=True)
        with ours.context(), torch.set_grad_enabled(backward):
            prepared = Prepared(ours, workload, inputs)
            assert backward or Judge(workload, inputs).forward(prepared.first(), True, "cpu").ok
        layer = prepared.forwards[0].func
        if isinstance(layer, isotile.nn.Linear):
            layers += 1
            assert not backward and layer._packed is not None
    assert layers == 1 and len(workloads) == 4


def test_copies_exceed_the_cache_only_where_a_case_does(plant):
    (large,) = select(["softmax"], ["bert_base_scores"], [torch.bfloat16], ("forward",), False)
    (small,) = select(["softmax"], ["tiny"], [torch.bfloat16], ("forward",), False)
    cold, warm = Inputs(large, 8 << 20, False), Inputs(small, 8 << 20, False)
    assert cold.cold and cold.bytes * len(cold.sets) >= 3 * (8 << 20)
    assert len({s["x"].data_ptr() for s in cold.sets}) == len(cold.sets)
    assert not warm.cold and len(warm.sets) == 1
    assert len(Inputs(large, 0, False).sets) == 1


def test_samples_walk_through_all_copies():
    seen = []
    timer = timing.Timer([lambda i=i: seen.append(i) for i in range(3)], runner.contextlib.nullcontext)
    for _ in range(3):
        timer.run(2)
    assert seen == [0, 1, 2, 0, 1, 2]


def test_busy_samples_do_not_count_where_enough_others_are_left():
    busy = timing.Summary((1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0), (True, True, True, False, False, False, False), 1)
    assert busy.quiet and busy.median == 1.0
    rarely = timing.Summary((1.0, 9.0, 9.0), (True, False, False), 1)
    assert not rarely.quiet and rarely.median == 9.0
    assert timing.ratios(busy, timing.Summary((2.0,) * 7, (True,) * 7, 1))["median"] == 0.5


def test_host_time_is_that_of_a_call_with_an_empty_kernel(tmp_path, plant):
    plant(lambda y: time.sleep(0.003))
    _, _, rows, _ = run(tmp_path, "layer_norm", "--backends", "planted", "--dtypes", "float32", *QUICK)
    ours = by_contender(rows)["planted"]
    assert ours["median_s"] > 0.003 and ours["host_s"] < 0.001
    x, w = torch.randn(16, 256), torch.ones(256)
    want = torch.nn.functional.layer_norm(x, (256,), w, w)
    with isotile.use_backend("planted"):  # the kernel is back in its plan
        assert torch.allclose(isotile.layer_norm(x, 256, w, w), want, atol=1e-5)


def test_launch_cost_is_told(tmp_path, plant, capsys):
    plant()
    run(tmp_path, "layer_norm", "--cases", "tiny", "--backends", "planted", "--dtypes", "float32", *QUICK)
    assert "launch cost on planted: a layer_norm of 16x256 float32 takes" in capsys.readouterr().out


def test_without_memory_for_the_truth_pytorch_stands_in(tmp_path, plant, monkeypatch):
    plant()
    monkeypatch.setattr("isotile.bench.agreement.available_bytes", lambda: 0)
    words = ("linear", "attention", "--cases", "tiny", "--backends", "planted", "--direction", "both")
    words = (*words, "--dtypes", "bfloat16", *QUICK)
    code, _, rows, _ = run(tmp_path, *words)
    assert code == 0
    assert {r["against"] for r in rows} == {"torch"}
    plant(lambda y, *rest: y.flatten()[:9].mul_(1.3))
    code, _, rows, _ = run(tmp_path, *words)
    assert code == 1
    assert {r["status"] for r in rows if r["ours"]} == {"wrong"}


def test_nothing_stands_in_for_the_truth_of_quantised_products(tmp_path, monkeypatch):
    """PyTorch rounds neither activations nor weights when it multiplies the same codes: its result is not ours."""
    words = ("quantized_linear", "--cases", "tiny", "--backends", "reference", "--against", "none", *QUICK)
    monkeypatch.setattr("isotile.bench.agreement.available_bytes", lambda: 0)
    code, _, rows, _ = run(tmp_path, *words)
    assert code == 1
    assert {r["status"] for r in rows} == {"error"}
    assert all("does not fit into memory" in r["reason"] for r in rows)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nonsense"], "no operator 'nonsense'; there are attention"),
        (["softmax", "--cases", "nonsense*"], "no case matches nonsense*; there are tiny"),
        (["--backends", "nonsense"], "no backend 'nonsense'"),
        (["--backends", "nki,nonsense"], "--backends: n"),
        (["--against", "nonsense"], "no rival 'nonsense'; there are torch, compile"),
        (["--dtypes", "int8"], "int8: not among float32"),
        (["--threads", "0"], "wanted at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(words, said, capsys):
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_unknown_selection_raises():
    with pytest.raises(UsageError):
        select([], ["no such case"], None, ("forward",), False)


def test_backend_that_was_asked_for_and_refuses_is_a_failure(tmp_path, monkeypatch):
    class Refusing(ReferenceBackend):
        def refuses(self, request):
            return "is out of order"

    monkeypatch.setitem(BACKENDS, "refusing", Refusing())
    code, _, rows, _ = run(tmp_path, "softmax", "--backends", "refusing", "--dtypes", "float32", *QUICK)
    assert code == 1
    assert by_contender(rows)["refusing"]["status"] == "unserved"
    assert "is out of order" in by_contender(rows)["refusing"]["reason"]


def test_peaks_are_kept_and_measured_anew(monkeypatch):
    calls = []
    monkeypatch.setattr(machine_module, "bandwidth", lambda quick: calls.append(1) or 5e9)
    assert machine_module.Peaks(quick=True).bandwidth() == 5e9
    assert machine_module.Peaks(quick=True).bandwidth() == 5e9
    assert len(calls) == 1
    machine_module.Peaks(quick=True, fresh=True).bandwidth()
    assert len(calls) == 2
    peaks = machine_module.Peaks(quick=True)
    peaks.path.write_text("{ cut o")
    assert machine_module.Peaks(quick=True).bandwidth() == 5e9
    peaks.values.update(float32=4e11, float16=1e10, bandwidth=1e10)
    assert peaks.flops(torch.float16) == 4e11
    assert peaks.least_seconds(4e9, 1e9, torch.float16) == pytest.approx(0.1)


def test_relative_error_sees_nan_and_shapes():
    one = torch.ones(3)
    assert relative_error(one, one) == 0
    assert relative_error(one, torch.ones(4)) == float("inf")
    assert not relative_error(torch.tensor([1.0, float("nan"), 1.0]), one) <= 1


def written_run(tmp_path):
    """A run with a rival, a wrong row and a reason that would end a script element."""
    writer = records.Writer(tmp_path, {**machine_module.provenance(["softmax"]), "effort": {}, "warm": False})
    base = {
        "kind": "row", "op": "softmax", "dtype": "float32", "direction": "forward", "shapes": {"x": [4, 8]},
        "flops": 256, "bytes": 256, "against": "truth", "cold": False, "threads": 1, "device": "cpu", "tokens": 4,
    }  # fmt: skip
    for i in range(12):
        figures = {
            "status": "ok", "median_s": 1e-5 * (1 + i), "q1_s": 0.9e-5, "q3_s": 1.2e-5 * (1 + i), "gb_per_s": 0.02,
            "tflops": 2e-5 / (1 + i), "roofline_share": 0.1, "quiet": True,
        }  # fmt: skip
        ratio = {"torch": {"median": 0.5 + i / 4, "q1": 0.4 + i / 4, "q3": 0.6 + i / 4, "quiet": True}}
        figures["sweep"] = ("n", 2**i) if i < 5 else None
        writer.write({**base, **figures, "case": f"case{i}", "contender": "cpu", "ours": True, "speed_vs": ratio})
        writer.write({**base, **figures, "case": f"case{i}", "contender": "torch", "ours": False})
    bad = {"status": "wrong", "reason": "</script><b>planted</b>", "case": "bad", "contender": "cpu", "ours": True}
    writer.write({**base, **bad})
    peaks = {"bandwidth": 1e10, "float32": 1e11, "date": "2026-01-01T00:00:00+00:00"}
    writer.write({"kind": "end", "complete": True, "peaks": {"1": peaks}})
    writer.close()
    return writer.jsonl


def test_report_is_one_file_with_all_rows(tmp_path, monkeypatch, capsys):
    plotly = types.ModuleType("plotly.offline")
    plotly.get_plotlyjs = lambda: "/* plotting library */"
    monkeypatch.setitem(sys.modules, "plotly", types.ModuleType("plotly"))
    monkeypatch.setitem(sys.modules, "plotly.offline", plotly)
    path = written_run(tmp_path)
    assert main(["report", str(path)]) == 0
    text = path.with_suffix(".html").read_text()
    assert "/* plotting library */" in text and "/*PLOTLY*/" not in text
    assert text.count("</script>") == 2  # the reason of a row does not end one
    assert not re.search(r"""(src|href)\s*=|https?://|@import|url\(""", text)
    spelled = re.search(r"const DATA = (.*);\n", text)
    assert spelled is not None
    data = json.loads(spelled[1])
    assert len(data["rows"]) == 25 and data["peaks"]["1"]["float32"] == 1e11
    assert main(["report", str(tmp_path / "absent.jsonl")]) == 2


def test_report_says_what_it_misses(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    assert main(["report", str(written_run(tmp_path))]) == 2
    assert "pip install plotly" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("size", "dark"), [(_browser.DESKTOP, False), (_browser.PHONE, True)], ids=["desktop", "phone"]
)
def test_report_draws_in_a_browser(tmp_path, size, dark):
    pytest.importorskip("plotly", reason="the plotting library is not installed")
    path = written_run(tmp_path)
    assert main(["report", str(path), "--price", "cpu=3.6"]) == 0
    with _browser.opened(path.with_suffix(".html"), size, dark) as page:
        table = page.locator("#rows tr")
        assert table.count() == 25
        assert page.locator("#bars .point").count() >= 12  # a bar for each ratio
        assert page.locator("#roofline .point").count() >= 12
        assert page.locator("#curves .point").count() == 10  # five sizes of two contenders
        assert page.locator("#titles button", has_text="$ / 1M calls").count() == 1
        assert _browser.overflow(page) <= 0
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") != dark
        assert page.locator("#rows b").count() == 0  # a reason is text
        page.locator("#titles button", has_text="speed").click()
        speeds = [float(t.rstrip("x")) for t in table.locator("td:last-child").all_inner_texts() if t.endswith("x")]
        assert len(speeds) == 12 and speeds == sorted(speeds)
        page.get_by_label("search").fill("case11")
        assert table.count() == 2
        page.get_by_label("contender").select_option("torch")
        assert table.count() == 1


# --- rivals ----------------------------------------------------------------------------------------------------------

SMALL = {
    "linear": [{"x": (5, 24), "weight": (16, 24)}],
    "matmul": [{"a": (5, 24), "b": (24, 16)}],
    "layer_norm": [{"x": (7, 32), "normalized_shape": (32,), "weight": (32,), "bias": (32,)}],
    "rms_norm": [{"x": (7, 32), "normalized_shape": (32,), "weight": (32,), "weight_offset": 1.0}],
    "softmax": [{"x": (7, 33), "dim": -1}],
    "attention": [
        {"query": (2, 4, 9, 16), "key": (2, 4, 9, 16), "value": (2, 4, 9, 16), "is_causal": True},
        {"query": (2, 4, 9, 16), "key": (2, 4, 9, 16), "value": (2, 4, 9, 16), "scale": 0.2},
        {"query": (2, 4, 9, 16), "key": (2, 2, 9, 16), "value": (2, 2, 9, 16), "is_causal": True},
        {"query": (1, 4, 1, 16), "key": (1, 2, 9, 16), "value": (1, 2, 9, 16)},
    ],
    "quantized_linear": [
        {"x": (5, 64), "packed": (16, 64), "scales": (16, 1), "scheme": "int8_dynamic", "group_size": -1},
        {"x": (5, 64), "packed": (32, 64), "scales": (32, 2), "scheme": "int4_dynamic", "group_size": 32},
        {"x": (5, 64), "packed": (16, 64), "scales": (16, 1), "scheme": "int8", "group_size": -1},
        {"x": (5, 64), "packed": (32, 64), "scales": (32, 2), "scheme": "int4", "group_size": 32},
    ],
}
SERVED = {
    "torch-math": ["attention"],
    "onednn": ["linear", "matmul"],
    "onnxruntime": ["linear", "matmul", "layer_norm", "rms_norm", "softmax", "attention"],
    "zentorch": ["linear", "matmul", "rms_norm", "attention"],
}


@pytest.mark.parametrize(("rival", "op"), [(r, op) for r, ops in SERVED.items() for op in ops])
def test_rival_is_the_same_function(rival, op):
    contender = RIVALS[rival](rival)
    reason = contender.missing()
    if reason is not None:
        pytest.skip(reason)
    for args in SMALL[op]:
        workload = Workload(registry.spec(op), Case("here", "bench", args), torch.float32, "forward")
        inputs = Inputs(workload, 0, False)
        with contender.context(), torch.no_grad():
            found = contender.bind(workload.spec, inputs.sets[0])()
        truth = Judge(workload, inputs).expected
        assert relative_error(found, next(iter(truth.values())).truth) < 1e-5


@pytest.mark.parametrize("rival", sorted(RIVALS))
def test_rival_says_what_it_does_not_take(rival):
    """Options that a library lacks are refused, not dropped."""
    contender = RIVALS[rival](rival)
    shapes = {"query": (1, 2, 4, 8), "key": (1, 2, 4, 8), "value": (1, 2, 4, 8)}
    for option in ({"sinks": (2,)}, {"window_left": 0}, {"softcap": 3.0}, {"alibi_slopes": (2,)}):
        workload = Workload(
            registry.spec("attention"), Case("here", "bench", shapes | option), torch.float32, "forward"
        )
        with pytest.raises(Unserved):
            contender.bind(workload.spec, Inputs(workload, 0, False).sets[0])


@pytest.mark.parametrize(
    ("rival", "case", "dtype"),
    [
        ("torch-quantized", 0, torch.float32),
        ("onnxruntime", 0, torch.float32),
        ("onnxruntime", 1, torch.float32),
        ("torch-quantized", 2, torch.bfloat16),
        ("torch-quantized", 3, torch.bfloat16),
        ("torchao", 0, torch.bfloat16),
    ],
)
def test_rival_of_a_quantised_layer_is_the_same_function(rival, case, dtype):
    contender = RIVALS[rival](rival)
    reason = contender.missing()
    if reason is not None:
        pytest.skip(reason)
    args = SMALL["quantized_linear"][case]
    workload = Workload(registry.spec("quantized_linear"), Case("here", "bench", args), dtype, "forward")
    inputs = Inputs(workload, 0, False)
    with torch.no_grad():
        found = contender.bind(workload.spec, inputs.sets[0])()
    judge = Judge(workload, inputs)
    assert judge.forward((found,), False, rival).ok
    assert relative_error(found, judge.expected["y"].truth) < 0.02


def test_missing_rival_is_named_and_the_others_run(tmp_path, plant, monkeypatch, capsys):
    plant()
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    words = ("softmax", "--backends", "planted", "--dtypes", "float32", "--quick", "--threads", "1")
    code, about, rows, _ = run(tmp_path, *words, "--against", "flash-attn,torch")
    said = capsys.readouterr().out
    assert code == 0 and {r["contender"] for r in rows} == {"planted", "torch"}
    assert "rival flash-attn is not here" in said and "pip install flash-attn" in said
    assert "pip install flash-attn" in about["missing_rivals"]["flash-attn"]
    assert f"rival torch: torch {torch.__version__}" in said


# --- threads, money, memory ------------------------------------------------------------------------------------------


def test_each_number_of_threads_has_rows_and_a_roofline(tmp_path, plant):
    plant()
    words = ("softmax", "--backends", "planted", "--dtypes", "float32", "--quick", "--threads", "1,2")
    code, about, rows, end = run(tmp_path, *words)
    assert code == 0 and about["threads"] == [1, 2]
    assert [(r["threads"], r["contender"]) for r in rows] == [
        (1, "planted"), (1, "torch"), (2, "planted"), (2, "torch"),
    ]  # fmt: skip
    assert set(end["peaks"]) == {"1", "2"}


def test_price_gives_the_cost_of_calls_and_tokens(tmp_path, plant):
    plant()
    words = ("layer_norm", "--backends", "planted", "--dtypes", "float32", "--price", "cpu=3.6", *QUICK)
    _, _, rows, _ = run(tmp_path, *words)
    ours = by_contender(rows)["planted"]
    assert ours["tokens"] == 16
    assert ours["usd_per_million_calls"] == pytest.approx(ours["median_s"] * 1e6 * 0.001)
    assert ours["usd_per_billion_tokens"] == pytest.approx(ours["median_s"] * 1e9 * 0.001 / 16)


def test_price_is_matched_by_kind_or_name_and_wrong_ones_are_named(capsys):
    prices = money.parse(["H100=2.5", "cpu=0.4"])
    assert money.price_of(prices, {"device_name": "NVIDIA H100 80GB HBM3"}, {"device": "cuda"}) == 2.5
    assert money.price_of(prices, {"device_name": "Some Xeon"}, {"device": "cpu"}) == 0.4
    assert money.price_of(prices, {"device_name": "NVIDIA B200"}, {"device": "cuda"}) is None
    for wrong in ("cpu", "cpu=0", "cpu=much", "=1"):
        with pytest.raises(SystemExit):
            main(["softmax", "--price", wrong])
        assert "DEVICE=USD_PER_HOUR" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("op", "shapes", "tokens"),
    [
        ("linear", {"x": (2, 3, 8), "weight": (4, 8)}, 6),
        ("matmul", {"a": (2, 3, 8), "b": (8, 4)}, 6),
        ("softmax", {"x": (2, 3, 8), "dim": -1}, 6),
        ("rms_norm", {"x": (2, 3, 8), "normalized_shape": (8,)}, 6),
        ("attention", {"query": (2, 4, 3, 8), "key": (2, 2, 9, 8), "value": (2, 2, 9, 8)}, 6),
        ("grouped_matmul", {"a": (6, 8), "b": (3, 8, 4), "offsets": (3,)}, 6),
    ],
)
def test_tokens_of_a_call(op, shapes, tokens):
    workload = Workload(registry.spec(op), Case("here", "bench", shapes), torch.float32, "forward")
    assert tokens_of(workload.spec, Inputs(workload, 0, False).sets[0]) == tokens


@pytest.mark.skipif(not memory.RESET.exists(), reason="reads memory from /proc")
def test_memory_of_a_call_is_its_peak():
    def call():
        big = torch.ones(1 << 24)  # 64 MB that live only inside
        return big[:1].clone()

    call()
    assert 60e6 < memory.peak_extra_bytes(call) < 90e6
    assert memory.peak_extra_bytes(lambda: torch.ones(16)) == 0


# --- recorded programs -----------------------------------------------------------------------------------------------

PROGRAM = """
import sys, torch, isotile
torch.manual_seed(0)
x, w = torch.randn(2, 9, 64, requires_grad=True), torch.randn(96, 64, requires_grad=True)
for _ in range(3):
    isotile.linear(x, w, activation="gelu").sum().backward()
with torch.no_grad():
    heads = torch.randn(1, 9, 4, 16).transpose(1, 2)
    isotile.attention(heads, heads[:, :2], heads[:, :2], torch.zeros(9, 9), enable_gqa=True, window=(3, None))
    isotile.grouped_matmul(torch.randn(10, 8), torch.randn(3, 8, 4), torch.tensor([4, 4, 9], dtype=torch.int32))
    isotile.softmax(torch.randn(4, 8).t().expand(2, 8, 4), dtype=torch.float64)
sys.exit(len(sys.argv) - 2)
"""


def recorded(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    path = tmp_path / "program.calls.json"
    assert main(["trace", "--record-only", "--save", str(path), str(program), "an argument"]) == 0
    return path


def test_record_keeps_shapes_layouts_options_and_counts(tmp_path, capsys):
    path = recorded(tmp_path)
    calls = {(c.op, len(c.tensors["x" if "x" in c.tensors else next(iter(c.tensors))]["shape"])): c for c in load(path)}
    assert calls["linear", 3].count == 3 and calls["linear", 3].scalars["activation"] == "gelu"
    assert calls["matmul_epilogue_backward", 3].count == 3  # the backward pass's own calls
    attention = next(c for c in load(path) if c.op == "attention")
    assert attention.tensors["query"]["strides"] == [576, 16, 64, 1]
    assert attention.tensors["attn_mask"]["shape"] == [9, 9] and attention.scalars["window_left"] == 3
    grouped = next(c for c in load(path) if c.op == "grouped_matmul")
    assert grouped.tensors["offsets"]["values"] == [4, 4, 9]
    softmax = next(c for c in load(path) if c.op == "softmax")
    assert softmax.scalars["dtype"] == "float64" and softmax.tensors["x"]["strides"] == [0, 1, 8]
    assert "3 x linear(x 2x9x64 float32, weight 96x64 float32)" in capsys.readouterr().out


def test_recorded_calls_are_built_again_exactly(tmp_path):
    for call in load(recorded(tmp_path)):
        built = build(call.recipe())
        assert built.overload == call.overload
        for name, tensor in call.tensors.items():
            value = built.values[name]
            assert list(value.shape) == tensor["shape"] and list(value.stride()) == tensor["strides"]
            assert dtype_name(value.dtype) == tensor["dtype"]
            assert "values" not in tensor or value.tolist() == tensor["values"]
        assert not any(v.isnan().any() for v in built.values.values() if isinstance(v, torch.Tensor))
        json.dumps(call.recipe())  # what repeats a disagreement


def test_trace_measures_what_the_program_called(tmp_path, plant, monkeypatch, capsys):
    plant()
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    out = tmp_path / "out"
    words = ["trace", "--backends", "planted", *QUICK, "--out", str(out), str(program), "one argument"]
    assert main(words) == 0
    (path,) = out.glob("*.jsonl")
    about, rows, end = records.read(path)
    assert end["complete"] and about["command"].startswith("isotile bench trace --backends planted")
    ours = [r for r in rows if r["ours"]]
    assert {r["op"] for r in ours} >= {"linear", "matmul", "matmul_epilogue_backward", "attention", "softmax"}
    assert {r["count"] for r in ours if r["op"] == "linear"} == {3}
    assert all(r["status"] == "ok" for r in ours)
    assert "in one pass: planted" in capsys.readouterr().out
    # The recording serves again, and a kernel that is wrong on the program's own call is found.
    plant(lambda y, *rest: y.flatten()[:9].add_(1e-2), "grouped_matmul")
    code, _, rows, _ = run(tmp_path, "--cases", "program.calls.json", "--backends", "planted", *QUICK)
    assert code == 1 and [r["op"] for r in rows if r["status"] == "wrong"] == ["grouped_matmul"]


def test_recorded_calls_can_be_verified(tmp_path, plant, capsys):
    """`isotile verify --cases` finds a kernel that is wrong on one of the program's own calls."""
    from isotile.verify import command

    path = recorded(tmp_path)
    words = ["--cases", str(path), "--examples", "4", "--out", str(tmp_path / "report"), "grouped_matmul", "softmax"]
    plant()
    assert command.run([*words, "--backends", "planted"]) == 0
    plant(lambda y: y.flatten()[:9].add_(1.0), "grouped_matmul")
    assert command.run([*words, "--backends", "planted"]) == 1
    said = capsys.readouterr().out
    assert "fails: grouped_matmul float32 on planted" in said and '"values": [4, 4, 9]' in said
    with pytest.raises(SystemExit):
        command.run(["--cases", str(path), "layer_norm"])
    assert "holds no call of the chosen operators" in capsys.readouterr().err


def test_trace_says_what_went_wrong(tmp_path, capsys):
    program = tmp_path / "nothing.py"
    program.write_text("import sys\nsys.exit(3 if len(sys.argv) > 1 else 0)")
    assert main(["trace", "--record-only", "--save", str(tmp_path / "x.json"), str(program)]) == 2
    assert "called no isotile operator" in capsys.readouterr().err
    assert main(["trace", "--record-only", "--save", str(tmp_path / "x.json"), str(program), "more"]) == 2
    assert "exited with 3" in capsys.readouterr().err
    (tmp_path / "not.json").write_text("{}")
    with pytest.raises(SystemExit):
        main(["--cases", str(tmp_path / "not.json")])
    assert "wanted a recording" in capsys.readouterr().err


def test_record_sees_compiled_and_autocast_calls(tmp_path):
    compiled = torch.compile(lambda x: isotile.softmax(x) * 2, backend="eager")
    with isotile.record(tmp_path / "calls.json") as recording:
        compiled(torch.randn(3, 8))
        with torch.autocast("cpu", torch.bfloat16):
            isotile.matmul(torch.randn(3, 8), torch.randn(8, 4))
    assert [c.op for c in recording.calls] == ["softmax", "matmul"]
    assert load(tmp_path / "calls.json")[1].tensors["a"]["dtype"] == "bfloat16"


# --- suites, side by side, the README's table ------------------------------------------------------------------------


@pytest.mark.parametrize("suite", sorted(SUITES))
def test_suites_are_legal_calls_named_once(suite):
    found = list(SUITES[suite]())
    assert len({w.key for w in found}) == len(found) > 50
    for workload in found:
        recipe = workload.recipe  # binds the shapes
        assert recipe["dtype"] == str(workload.dtype).removeprefix("torch.")
    assert {w.spec.name for w in found} >= {"linear", "attention", "layer_norm", "rms_norm", "softmax"}


def test_suite_can_be_narrowed(tmp_path, plant):
    plant()
    words = ("linear", "--suite", "cpu", "--cases", "127x*", "--dtypes", "float32", "--backends", "planted")
    code, _, rows, _ = run(tmp_path, *words, "--quick", "--against", "torch,onednn", "--threads", "1")
    assert code == 0 and {r["case"] for r in rows} == {"127x129x131"}
    assert set(by_contender(rows)["planted"]["speed_vs"]) == {"torch", "onednn"}


def made_up_run(tmp_path, name, contender, scale, ratio=2.0, **about):
    header = {**machine_module.provenance(["softmax"]), "effort": {}, "warm": False, "contenders": {contender: {}}}
    writer = records.Writer(tmp_path / name, {**header, **about})
    for case, factor in (("tiny", 1.0), ("large", 8.0)):
        samples = [scale * factor * (1 + 0.01 * i) for i in range(9)]
        writer.write({
            "kind": "row", "op": "softmax", "case": case, "dtype": "float32", "direction": "forward", "ours": True,
            "contender": contender, "status": "ok", "samples_s": samples, "clean": [True] * 9, "calls": 1,
            "median_s": samples[4], "tokens": 16, "device": about.get("device", "cpu"), "threads": about["threads"],
            "roofline_share": 0.5, "quiet": True,
            "speed_vs": {"torch": {"median": ratio * factor, "q1": 1.9, "q3": 2.1, "quiet": True}},
        })  # fmt: skip
    writer.write({"kind": "end", "complete": True, "peaks": {}})
    writer.close()
    return writer.jsonl


def test_two_machines_side_by_side_in_time_and_money(tmp_path, capsys):
    a = made_up_run(tmp_path, "a", "cpu", 1e-3, threads=2, device_name="Some Xeon")
    b = made_up_run(tmp_path, "b", "triton", 1e-5, threads=8, device_name="NVIDIA H100", device="cuda")
    assert main(["compare", str(a), str(b)]) == 1  # nothing is in both
    assert "no row is in both runs" in capsys.readouterr().out
    words = ["compare", str(a), str(b), "--match", "cpu=triton", "--price", "cpu=0.1", "--price", "h100=2"]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "Some Xeon" in said and "NVIDIA H100" in said and "cpu=triton" in said
    assert "0.010" in said  # the ratio of times
    assert "0.200" in said  # and of costs: a hundredth of the time at twenty times the price
    assert main(["compare", str(b), str(a), "--match", "triton=cpu"]) == 1
    with pytest.raises(SystemExit):
        main(["compare", str(a), str(b), "--match", "cpu=nki"])


def test_readme_table_is_made_from_a_run(tmp_path, capsys):
    path = made_up_run(tmp_path, "a", "cpu", 1e-3, threads=2)
    assert main(["readme", str(path)]) == 0
    said = capsys.readouterr().out
    assert "| `softmax` forward | **5.66** (2.00 to 16.00) |" in said and "2 threads" in said
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- speed: begin (made) -->\nold\n<!-- speed: end -->\nafter\n")
    assert main(["readme", str(path), "--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- speed: begin (made) -->\n| torch's time") and "old" not in text
    page.write_text("nothing")
    assert main(["readme", str(path), "--write", str(page)]) == 2
    later = made_up_run(tmp_path, "b", "cpu", 1e-4, threads=2, ratio=3.0)  # the same rows, measured again
    capsys.readouterr()
    assert main(["readme", str(path), str(later)]) == 0
    said = capsys.readouterr().out
    assert "| `softmax` forward | **8.49** (3.00 to 24.00) |" in said and said.count("PyTorch") == 1


def test_records_are_strict_json(tmp_path):
    writer = records.Writer(tmp_path, {"date": "2026-01-01T00:00:00+00:00"})
    writer.write({"kind": "row", "op": "x", "relative_error": float("inf")})
    writer.close()
    again = records.Writer(tmp_path, {"date": "2026-01-01T00:00:00+00:00"})
    again.close()
    assert again.jsonl != writer.jsonl

    def refuse(word):
        raise AssertionError(word)

    for line in writer.jsonl.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
