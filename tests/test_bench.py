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
from isotile import dispatch, library, registry
from isotile.backends import BACKENDS
from isotile.backends.reference import ReferenceBackend
from isotile.bench import compare, main, records, runner, timing
from isotile.bench import machine as machine_module
from isotile.bench.agreement import Judge, relative_error
from isotile.bench.rivals import EXPRESSIONS, torch_expression
from isotile.bench.workloads import Inputs, UsageError, select
from isotile.spec import Case

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
    from isotile.bench.contenders import Ours, Prepared
    from isotile.bench.workloads import Workload

    workload = Workload(spec, case, torch.float32, "forward")
    inputs = Inputs(workload, 0, False)
    ours = Ours("planted")
    with ours.context(), torch.no_grad():
        found = Prepared(ours, workload, inputs).first()
    assert Judge(workload, inputs).forward(found, True, "planted").ok
    assert "window_left" in torch_expression("attention", inputs.sets[0])


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
        "flops": 256, "bytes": 256, "against": "truth", "cold": False, "threads": 1,
    }  # fmt: skip
    for i in range(12):
        figures = {
            "status": "ok", "median_s": 1e-5 * (1 + i), "q1_s": 0.9e-5, "q3_s": 1.2e-5 * (1 + i), "gb_per_s": 0.02,
            "tflops": 2e-5 / (1 + i), "roofline_share": 0.1, "quiet": True,
        }  # fmt: skip
        ratio = {"torch": {"median": 0.5 + i / 4, "q1": 0.4 + i / 4, "q3": 0.6 + i / 4, "quiet": True}}
        writer.write({**base, **figures, "case": f"case{i}", "contender": "cpu", "ours": True, "speed_vs": ratio})
        writer.write({**base, **figures, "case": f"case{i}", "contender": "torch", "ours": False})
    bad = {"status": "wrong", "reason": "</script><b>planted</b>", "case": "bad", "contender": "cpu", "ours": True}
    writer.write({**base, **bad})
    peaks = {"bandwidth": 1e10, "float32": 1e11, "date": "2026-01-01T00:00:00+00:00"}
    writer.write({"kind": "end", "complete": True, "peaks": peaks})
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
    assert len(data["rows"]) == 25 and data["peaks"]["float32"] == 1e11
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
    assert main(["report", str(path)]) == 0
    with _browser.opened(path.with_suffix(".html"), size, dark) as page:
        table = page.locator("#rows tr")
        assert table.count() == 25
        assert page.locator("#bars .point").count() >= 12  # a bar for each ratio
        assert page.locator("#roofline .point").count() >= 12
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
