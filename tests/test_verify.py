"""`isotile verify`: it finds planted bugs, its reports are valid whatever happens, and machines can be compared."""

from __future__ import annotations

import contextlib
import copy
import itertools
import json
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from pathlib import Path

import jsonschema
import pytest
import torch

from isotile import registry
from isotile.backends import BACKENDS
from isotile.backends.cpu import CpuBackend
from isotile.testing.__main__ import main as repeat
from isotile.testing.recipes import kinds_of, samples_of
from isotile.verify import main, plan, report
from isotile.verify.run import Verifier

sys.path.insert(0, str(Path(__file__).parent))
import _browser

ROOT = Path(__file__).resolve().parent.parent


def verify(folder, *words, name="run"):
    """Exit code and report of a run."""
    code = main([*words, "--out", str(folder), "--name", name])
    return code, report.read(folder / f"{name}.json")


def of(found, claim, verdict=None):
    return [c for c in found["claims"] if c["claim"] == claim and verdict in (None, c["verdict"])]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two reports as of two machines: one that has AVX, and one that has not."""
    folder = tmp_path_factory.mktemp("verify")
    words = ["softmax", "matmul", "attention", "--dtypes", "float32,bfloat16", "--examples", "6"]
    torch.set_num_threads(1)
    one = verify(folder, *words, "--backends", "cpu,reference", name="one")
    two = verify(folder, *words, "--backends", "cpu[scalar]", name="two")
    assert one[0] == two[0] == 0
    return folder, one[1], two[1]


# --- one report ------------------------------------------------------------------------------------------------------


def test_a_report_keeps_its_schema_and_says_what_ran(runs):
    folder, found, _ = runs
    jsonschema.Draft202012Validator.check_schema(report.schema())
    jsonschema.validate(found, report.schema())
    assert found["verdict"] == "holds"
    assert found["complete"]
    assert len(found["examples"]) == 3 * 2 * 6
    assert {b["name"] for b in found["backends"]} == {"cpu", "reference"}
    assert found["absent"] == {"triton": "not asked for", "nki": "not asked for"}
    assert len(of(found, "agreement", "holds")) == 3 * 2 * 2
    assert len(of(found, "pair", "holds")) == 3 * 2
    refused = [c for c in of(found, "batch_invariant") if c["backend"] == "reference"]
    assert {c["verdict"] for c in refused} == {"not run"}
    assert any("promise no batch invariance" in c["reason"] for c in refused)
    assert all(c["reason"] for c in found["claims"] if c["verdict"] == "not run")
    kernels = [n for n in found["provenance"]["files"] if n.startswith("isotile/kernels/")]
    assert "isotile/_C" in found["provenance"]["files"]
    built_with = found["provenance"]["compilers"]["torch"]
    assert "C++ Version" in built_with
    assert "=/" not in built_with, "a path of the machine that built PyTorch"
    assert len(kernels) > 10
    for error in found["errors"]:
        shares = error["share_of_bound"]
        assert shares["zero"] + sum(shares["counts"]) + error["unpromised"] <= error["elements"]
        assert 0 <= shares["median"] <= shares["p99"] <= shares["max"] <= 1
    suites = ET.parse(folder / "one.xml").getroot()
    assert suites.get("tests") == str(len(found["claims"]))
    assert suites.get("failures") == "0"
    assert len(suites.findall(".//skipped")) == found["counts"]["not run"]


def test_the_same_run_has_the_same_digest(tmp_path):
    words = ["softmax", "--dtypes", "float32", "--examples", "3", "--backends", "cpu"]
    first, again = (verify(tmp_path, *words, name=n)[1]["digest"] for n in ("a", "b"))
    assert first["results"] == again["results"]
    assert first["report"] != again["report"]  # they started at other times
    assert first["results"] != verify(tmp_path, *words, "--seed", "1", name="c")[1]["digest"]["results"]


def test_the_worst_case_repeats_itself(runs, capsys):
    _, found, _ = runs
    for claim in [*of(found, "agreement", "holds")[:2], *of(found, "gradients", "holds")[:1]]:
        words = claim["worst"]["repeat"].replace("'", "").split()
        assert words[:3] == ["python", "-m", "isotile.testing"]
        assert repeat(words[3:]) == 0
        assert f"{claim['worst']['share']:.3g} of what is allowed" in capsys.readouterr().out


@pytest.mark.parametrize("op", registry.specs())
def test_every_value_of_every_option_is_drawn(op):
    target = plan.Target(registry.spec(op), torch.float32)
    seen = {}
    for index in range(len(target.demands)):
        for option, values in plan.coverage(target.recipe(0, index)).items():
            seen.setdefault(option, set()).update(values)
    assert seen["value kind"] == set(kinds_of(target.spec))
    for name, scalar in target.spec.scalars.items():
        if scalar.star is None and name not in ("dim", "need_mask", "need_sinks"):
            assert len(seen[name]) == len(set(samples_of(scalar))), name
    for name, arg in target.spec.tensors.items():
        assert not arg.optional or seen[name] == {"given", "absent"}


def test_files_that_are_no_whole_report_are_refused(runs, tmp_path, capsys):
    _, found, _ = runs
    changes = {
        "better": lambda r: next(c for c in r["claims"] if "worst" in c)["worst"].update(share=1e-3),
        "other_machine": lambda r: r["provenance"].update(processor="another"),
        "no_failures": lambda r: r["counts"].update(fails=7),
        "fewer": lambda r: r["examples"].pop(),
        "missing": lambda r: r.pop("claims"),
        "unsealed": lambda r: r.pop("digest"),
        "format": lambda r: r.update(format="something"),
    }
    whole = tmp_path / "whole.json"
    whole.write_text(json.dumps(found))
    assert main(["check", str(whole)]) == 0
    for name, change in changes.items():
        tampered = copy.deepcopy(found)
        change(tampered)
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(tampered))
        assert main(["check", str(path)]) == 1
        assert path.name in capsys.readouterr().err
        assert main(["compare", str(whole), str(path)]) == 2
    (tmp_path / "cut.json").write_text(json.dumps(found)[:1000])
    assert main(["check", str(tmp_path / "cut.json")]) == 1


# --- planted bugs ----------------------------------------------------------------------------------------------------


class Planted(CpuBackend):
    """The cpu backend with a bug after every kernel."""

    def __init__(self, bug):
        super().__init__()
        self.name, self.bug = "planted", bug

    def prepare(self, request):
        run = super().prepare(request)
        inputs = len(request.spec.tensors)

        def wrong(*tensors):
            run(*tensors)
            self.bug([t for t in tensors[:inputs] if t is not None], [t for t in tensors[inputs:] if t is not None])

        return wrong


def one_element(inputs, outs):
    if outs[0].numel():
        outs[0].reshape(-1)[-1:].mul_(1.01) if outs[0].is_contiguous() else outs[0].mul_(1.01)


def swallows_nan(inputs, outs):
    outs[0].nan_to_num_(0.0)


def changes_an_input(inputs, outs):
    if inputs[0].numel() and inputs[0].is_floating_point():
        inputs[0].as_strided((1,), (1,), inputs[0].storage_offset()).add_(1.0)


def writes_beside(inputs, outs):
    if outs[0].storage_offset():
        outs[0].as_strided((1,), (1,), outs[0].storage_offset() - 1).fill_(0.0)


CALLS = itertools.count()


def noise(inputs, outs):
    if next(CALLS) % 2 and outs[0].dtype == torch.float32:
        outs[0].mul_(1 + 2.0**-23)


def depends_on_the_batch(inputs, outs):
    if outs[0].dtype == torch.float32 and outs[0].numel() and outs[0].shape[0] == 1:
        outs[0].mul_(1 + 2.0**-23)


def raises(inputs, outs):
    raise RuntimeError("no such instruction")


@pytest.mark.parametrize(
    ("op", "bug", "claims"),
    [
        ("softmax", one_element, {"agreement"}),
        ("softmax", swallows_nan, {"nonfinite"}),
        ("softmax", changes_an_input, {"memory"}),
        ("softmax", writes_beside, {"memory"}),
        ("layer_norm", noise, {"deterministic"}),
        ("layer_norm", depends_on_the_batch, {"batch_invariant"}),
        ("softmax", raises, {"agreement"}),
        ("softmax_backward", one_element, {"agreement"}),
    ],
)
def test_a_planted_bug_fails_its_claim(op, bug, claims, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(BACKENDS, "planted", Planted(bug))
    examples = 40 if bug is depends_on_the_batch else 12
    words = [op, "--dtypes", "float32", "--examples", str(examples), "--backends", "planted,reference"]
    code, found = verify(tmp_path, *words)
    registry_plans_of(op).clear()
    assert code == 1
    assert found["verdict"] == "fails"
    failing = {c["claim"] for c in found["claims"] if c["verdict"] == "fails" and c["backend"] == "planted"}
    assert claims <= failing
    assert not of(found, "agreement", "fails") or {c["backend"] for c in of(found, "agreement", "fails")} == {"planted"}
    failure = next(c for c in found["claims"] if c["claim"] in claims and c["verdict"] == "fails")["failures"][0]
    assert "python -m isotile.testing" in failure["repeat"]
    assert f"fails: {op}" in capsys.readouterr().out
    assert ET.parse(tmp_path / "run.xml").getroot().get("failures") == str(found["counts"]["fails"])
    jsonschema.validate(found, report.schema())
    assert main(["check", str(tmp_path / "run.json")]) == 1


def registry_plans_of(op):
    from isotile import library

    return library.operator(op).plans


def test_an_inexact_integer_product_fails_though_it_is_within_the_bound(tmp_path, monkeypatch):
    def rounds_low(inputs, outs):
        if outs[0].dtype == torch.float32:
            outs[0].copy_(torch.nextafter(outs[0], torch.full_like(outs[0], torch.inf)))

    monkeypatch.setitem(BACKENDS, "planted", Planted(rounds_low))
    words = ["linear", "--dtypes", "float32", "--examples", "24", "--backends", "planted,cpu"]
    code, found = verify(tmp_path, *words)
    registry_plans_of("linear").clear()
    assert code == 1
    assert [c["backend"] for c in of(found, "exact_integers", "fails")] == ["planted"]
    assert not of(found, "agreement", "fails")
    assert of(found, "pair", "fails")


def test_a_wrong_gradient_kernel_fails_the_gradients_of_the_forward_operator(tmp_path, monkeypatch):
    class WrongBackward(Planted):
        def prepare(self, request):
            right = CpuBackend.prepare(self, request)
            return super().prepare(request) if request.spec.internal else right

    monkeypatch.setitem(BACKENDS, "planted", WrongBackward(one_element))
    code, found = verify(tmp_path, "softmax", "--dtypes", "float32", "--examples", "9", "--backends", "planted")
    registry_plans_of("softmax_backward").clear()
    assert code == 1
    assert [c["claim"] for c in found["claims"] if c["verdict"] == "fails"] == ["gradients"]
    assert "softmax_backward gave grad_x" in of(found, "gradients")[0]["failures"][0]["message"]


# --- interruption ----------------------------------------------------------------------------------------------------


def test_an_interrupted_run_leaves_valid_files(tmp_path, monkeypatch, capsys):
    ran = []
    example = Verifier.example

    def until_ctrl_c(self, target, index):
        if len(ran) == 4:
            raise KeyboardInterrupt
        ran.append(target)
        example(self, target, index)

    monkeypatch.setattr(Verifier, "example", until_ctrl_c)
    code, found = verify(tmp_path, "softmax", "rms_norm", "--backends", "cpu")
    assert code == 130
    assert "incomplete: interrupted" in capsys.readouterr().out
    jsonschema.validate(found, report.schema())
    assert (found["verdict"], found["complete"], found["stopped"]) == ("incomplete", False, "interrupted")
    assert len(found["examples"]) == 4
    assert {c["verdict"] for c in of(found, "agreement")} == {"holds", "not run"}
    assert ET.parse(tmp_path / "run.xml").getroot().get("errors") == "1"
    assert main(["check", str(tmp_path / "run.json")]) == 1


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_real_run_with_a_report(tmp_path, sent):
    words = [
        sys.executable,
        "-m",
        "isotile",
        "verify",
        "softmax",
        "--minutes",
        "5",
        "--out",
        str(tmp_path),
        "--name",
        "r",
    ]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # the backends are said when the run begins
    process.send_signal(sent)
    assert process.wait(60) == 130
    found = report.read(tmp_path / "r.json")
    assert not found["complete"]
    assert (tmp_path / "r.html").read_text().endswith("</html>\n")


def test_a_signal_counts_where_python_drops_its_exception(tmp_path, monkeypatch):
    example = Verifier.example

    def swallowing(self, target, index):
        example(self, target, index)
        with contextlib.suppress(KeyboardInterrupt):  # as if it came within a destructor
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.1)

    monkeypatch.setattr(Verifier, "example", swallowing)
    words = ["softmax", "--backends", "cpu", "--examples", "3", "--out", str(tmp_path), "--name", "r"]
    assert main(words) == 130
    assert not report.read(tmp_path / "r.json")["complete"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_that_is_killed_leaves_what_it_wrote_last(tmp_path, monkeypatch):
    from isotile.verify import command

    class Killed(BaseException):
        pass

    monkeypatch.setattr(command, "CHECKPOINT_S", 0)
    monkeypatch.setattr(report, "write_all", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        main(
            [
                "softmax",
                "--dtypes",
                "float32",
                "--examples",
                "2",
                "--backends",
                "cpu",
                "--out",
                str(tmp_path),
                "--name",
                "r",
            ]
        )
    found = report.read(tmp_path / "r.json")
    assert (found["complete"], found["stopped"], len(found["examples"])) == (False, "still running", 2)


# --- usage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--backends", "nki"], "--emulated"),
        (["--backends", "cpu[pdp11]"], "this CPU runs"),
        (["--backends", "abacus"], "no backend 'abacus'"),
        (["--dtypes", "float8"], "not among"),
        (["convolution"], "no operator 'convolution'"),
        (["--examples", "0"], "greater than 0"),
        (["--emulated"], "name the backends"),
        (["compare", "only_one.json"], "at least two"),
    ],
)
def test_wrong_usage_is_said_before_anything_runs(words, said, capsys, tmp_path):
    with pytest.raises(SystemExit) as stop:
        main([*words, *(["--out", str(tmp_path / "new")] if words[0] != "compare" else [])])
    assert stop.value.code == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_an_emulator_runs_only_when_asked_for_and_is_named(tmp_path):
    code, found = verify(
        tmp_path, "softmax", "--backends", "nki,cpu", "--emulated", "--examples", "3", "--dtypes", "bfloat16,float64"
    )
    assert code == 0
    nki = next(b for b in found["backends"] if b["name"] == "nki")
    assert nki["emulated"] == "bundled emulator"
    refused = [c for c in of(found, "agreement") if (c["backend"], c["dtype"]) == ("nki", "float64")]
    assert refused[0]["verdict"] == "not run"
    assert "float64" in refused[0]["reason"]
    assert found["settings"]["emulated"]


# --- machines that never met -----------------------------------------------------------------------------------------


def test_two_machines_are_joined(runs, tmp_path, capsys):
    folder, one, _ = runs
    assert (
        main(["compare", str(folder / "one.json"), str(folder / "two.json"), "--json", str(tmp_path / "c.json")]) == 0
    )
    found = json.loads((tmp_path / "c.json").read_text())
    assert found["verdict"] == "holds"
    assert len(found["rows"]) == 3 * 2 * 2
    assert all(r["examples"] == 6 and r["elements"] > 0 and r["worst"] <= 1 for r in found["rows"])
    assert any(0 < r["same_bits"] < r["examples"] for r in found["rows"])  # other sums, other bits: seen as such
    assert any(r["promised"] for r in found["rows"] if r["op"] == "matmul")
    assert any(r["promised"] for r in found["rows"] if r["op"] == "attention")  # the dropout mask
    assert found["reports"]["one"] == one["digest"]
    assert "12 of 12 rows hold" in capsys.readouterr().out


def forged(folder, found, name, change):
    """A report with other results, sealed anew: what a machine with a bug would have sent."""
    other = copy.deepcopy(found)
    change(other)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(report.seal(other)))
    return str(path)


def flip(text, bit):
    return f"{int(text[:8], 16) ^ (1 << bit):08x}" + text[8:]


def test_a_machine_that_computes_something_else_is_found(runs, tmp_path, capsys):
    folder, _, two = runs
    index = next(
        i for i, e in enumerate(two["examples"]) if e["id"].startswith("softmax/float32") and e["results"]["y"]["at"]
    )

    def other_value(r):
        y = r["examples"][index]["outputs"]["cpu[scalar]"]["y"]
        y.update(sample=flip(y["sample"], 20), digest="0" * 32)

    path = forged(tmp_path, two, "wrong", other_value)
    assert main(["compare", str(folder / "one.json"), path]) == 1
    assert "fails: softmax float32" in capsys.readouterr().out

    def other_integers(r):
        exact = next(e for e in r["examples"] if e["exact"])
        exact["outputs"]["cpu[scalar]"]["y"]["digest"] = "0" * 32

    assert main(["compare", str(folder / "one.json"), forged(tmp_path, two, "integers", other_integers)]) == 1
    assert "small integers gave other bits" in capsys.readouterr().out

    def other_mask(r):
        masked = next(e for e in r["examples"] if "dropout_mask" in e["outputs"]["cpu[scalar]"])
        masked["outputs"]["cpu[scalar]"]["dropout_mask"]["digest"] = "0" * 32

    assert main(["compare", str(folder / "one.json"), forged(tmp_path, two, "mask", other_mask)]) == 1
    assert "equal bits are promised" in capsys.readouterr().out


def test_reports_of_different_things_are_not_compared(runs, tmp_path, capsys):
    folder, _, two = runs
    changes = {
        "from seed 5": lambda r: r.update(seed=5),
        "different versions of the operators' specs": lambda r: r.update(definition="0" * 64),
        "the inputs of example": lambda r: r["examples"][0].update(inputs="0" * 32),
        "the recipe of example": lambda r: r["examples"][3].update(recipe="0" * 16),
        "no example in common": lambda r: r.update(examples=[]),
    }
    for i, (said, change) in enumerate(changes.items()):
        assert main(["compare", str(folder / "one.json"), forged(tmp_path, two, f"r{i}", change)]) == 2
        assert said in capsys.readouterr().err


# --- the page --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "dark"), [(_browser.DESKTOP, False), (_browser.PHONE, True)], ids=["desktop", "phone"]
)
def test_the_page_draws_in_a_browser(runs, size, dark):
    folder, found, _ = runs
    assert main(["report", str(folder / "one.json")]) == 0
    with _browser.opened(folder / "one.html", size, dark) as page:
        assert "Every claim holds" in page.locator("#verdict").inner_text()
        assert _browser.overflow(page) <= 0
        background = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (background == "rgb(255, 255, 255)") != dark
        assert page.locator("#shares .quantiles").count() == 3 * 2
        assert page.locator("#histogram .bar").count() > 20
        rows = page.locator("#rows tr")
        assert rows.count() == len(found["claims"])
        page.get_by_label("operator").last.select_option("matmul")
        page.get_by_label("verdict").select_option("not run")
        assert rows.count() == sum(c["op"] == "matmul" and c["verdict"] == "not run" for c in found["claims"])
        assert found["digest"]["results"] in page.locator("#provenance").inner_text()
        page.locator("#matrix button").first.click()
        assert rows.count() == sum(
            (c["op"], c["backend"], c["dtype"]) == ("attention", "cpu", "float32") for c in found["claims"]
        )


def test_a_page_shows_failures_as_text(runs, tmp_path):
    _, found, _ = runs
    bad = copy.deepcopy(found)
    claim = of(bad, "agreement")[0]
    claim.update(
        verdict="fails", failed=1, failures=[{"example": "x", "message": "<b>bold</b></script>", "repeat": "run"}]
    )
    bad["verdict"] = "fails"
    (tmp_path / "bad.html").write_text(report.page(report.seal(bad)))
    with _browser.opened(tmp_path / "bad.html") as page:
        assert "<b>bold</b></script>" in page.locator("#failures").inner_text()
        assert page.locator("#failures b").count() == 0
