"""Tuning and the GPU bench without a GPU: pruning, resuming, writing, lookup with a made-up device; shipped tables."""

from __future__ import annotations

import argparse
import json

import pytest
import torch

import isotile
from isotile import registry, tuning
from isotile.backends.triton import interpreted
from isotile.bench import gpu_suite
from isotile.tuning import command, search, targets
from isotile.tuning.cases import cases

triton = pytest.importorskip("triton", reason="tuning is of Triton's kernels")
pytestmark = pytest.mark.skipif(interpreted(), reason="the interpreter compiles nothing, so there is nothing to tune")


def shipped():
    """(device, op, entry) of every table in the package."""
    folder = tuning.package_folder() / "triton"
    for device in sorted(folder.iterdir()) if folder.is_dir() else ():
        for path in sorted(device.iterdir()):
            for entry in tuning.read(tuning.package_folder(), "triton", device.name, path.stem):
                yield device.name, path.stem, entry


@pytest.fixture
def hopper():
    from isotile.backends.triton_launch import OfflineDriver

    triton.runtime.driver.set_active(OfflineDriver("cuda", 90))


@pytest.fixture
def found(hopper):
    """Three small searches with made-up compiler reports: the second candidate is too large, the third spills."""
    chosen = [*search.searches(["softmax"], "cpu", "4096x4096"), *search.searches(["matmul"], "cpu", "bf16 1024")]
    for one in chosen:
        assert len(one.candidates) > 4
        for i, candidate in enumerate(one.candidates):
            shared, spill = (300_000 if i == 1 else 1000), (4096 if i == 2 else 0)
            fact = {"kernel": "k", "registers": 64, "spill": spill, "shared": shared, "tensor_memory": 0, "matrix": {}}
            candidate.facts = [fact]
            candidate.refused = search.judge([fact], "sm_90")
    return chosen


def entry(config, source="measured", **problem):
    time = {"time_us": 5.0} if source == "measured" else {}
    return {"case": "c", "problem": problem, "config": config, "source": source, **time}


def test_the_nearest_shape_of_the_same_kind_is_found():
    table = [
        entry({"B": 1}, dtype="bfloat16", causal=False, m=4096, n=4096),
        entry({"B": 2}, dtype="bfloat16", causal=False, m=1024, n=4096),
        entry({"B": 3}, dtype="float32", causal=False, m=1500, n=4096),
    ]

    def config(**problem):
        entry = tuning.nearest(table, problem)
        return entry and entry["config"]

    assert config(dtype="bfloat16", causal=False, m=3000, n=4096) == {"B": 1}
    assert config(dtype="bfloat16", causal=False, m=1500, n=4000) == {"B": 2}
    assert config(dtype="float32", causal=False, m=4096, n=4096) == {"B": 3}
    assert config(dtype="bfloat16", causal=True, m=4096, n=4096) is None, "another kind of problem"
    assert config(dtype="bfloat16", causal=False, m=64, n=4096) is None, "too far"
    assert config(dtype="bfloat16", causal=False, m=4096) is None, "another kernel's words"


def test_what_was_measured_goes_before_what_was_modelled():
    table = [entry({"B": 1}, "modelled", m=64), entry({"B": 2}, "measured", m=64), entry({"B": 3}, "modelled", m=60)]
    assert tuning.nearest(table, {"m": 64})["config"] == {"B": 2}
    assert tuning.nearest(table, {"m": 60})["config"] == {"B": 3}
    assert tuning.nearest(table, {"m": 100})["config"] == {"B": 2}
    assert tuning.nearest(table[:1], {"m": 100}) is None, "a model serves its own shape"


def test_the_users_tables_and_the_devices_own_go_first(tmp_path, monkeypatch):
    monkeypatch.setenv("ISOTILE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(tuning, "package_folder", lambda: tmp_path / "package")
    tuning.write(tmp_path / "package", "triton", "sm_90", "softmax", [entry({"B": 1}, "modelled", n=64)])
    devices = ("nvidia_h100", "sm_90")
    assert tuning.lookup("triton", devices, "softmax", {"n": 64}) == {"B": 1}
    tuning.write(tmp_path / "package", "triton", "nvidia_h100", "softmax", [entry({"B": 2}, n=64)])
    assert tuning.lookup("triton", devices, "softmax", {"n": 64}) == {"B": 2}
    tuning.write(tuning.user_folder(), "triton", "nvidia_h100", "softmax", [entry({"B": 3}, n=64)])
    assert tuning.lookup("triton", devices, "softmax", {"n": 64}) == {"B": 3}
    assert tuning.lookup("triton", devices, "matmul", {"n": 64}) is None
    tuning.entries.cache_clear()


def test_writing_merges_and_never_trades_a_measurement_for_a_model(tmp_path):
    path = tuning.write(tmp_path, "triton", "sm_90", "softmax", [entry({"B": 1}, n=64), entry({"B": 2}, n=128)])
    tuning.write(tmp_path, "triton", "sm_90", "softmax", [entry({"B": 9}, "modelled", n=64), entry({"B": 3}, n=128)])
    assert [e["config"] for e in json.loads(path.read_text())["entries"]] == [{"B": 3}, {"B": 1}]


def test_a_broken_table_says_which_and_why(tmp_path):
    path = tuning.write(tmp_path, "triton", "sm_90", "softmax", [entry({"B": 1}, n=64)])
    path.write_text(path.read_text().replace('"measured"', '"guessed"'))
    with pytest.raises(tuning.BadTable, match=r"softmax\.json: entry 0: source: wanted .* got 'guessed'"):
        tuning.read(tmp_path, "triton", "sm_90", "softmax")


def test_candidates_that_cannot_run_or_spill_are_not_timed(found):
    for one in found:
        kept = search.prune(one)
        assert one.candidates[0] in kept
        assert one.candidates[1] not in kept and "300000 bytes of shared memory" in one.candidates[1].refused
        assert one.candidates[2] not in kept
        grids = [str([(x.grid, x.meta) for x in one.launches(c)]) for c in kept]
        assert len(set(grids)) == len(grids), "the same launches twice"


class Machine:
    """A made-up GPU: a call's time depends on its configuration alone; it may be interrupted at the nth timing."""

    def __init__(self, interrupt_at=None):
        self.timed, self.interrupt_at = [], interrupt_at

    def bind(self, one, chosen):
        def work(candidate):
            return (one.label, str(candidate.config), (candidate.config or {}).get("num_warps", 1))

        return {str(i): (lambda c=c: work(c)) for i, c in enumerate(chosen)}

    def timer(self, calls):
        if self.interrupt_at is not None and len(self.timed) >= self.interrupt_at:
            raise KeyboardInterrupt
        self.timed.append(sorted(call()[:2] for call in calls.values()))
        return {name: 1e-5 / call()[2] for name, call in calls.items()}


def tune(found, machine, folder):
    args = argparse.Namespace(out=folder, minutes=10.0, workers=1)
    return command.tune(found, ("made_up_gpu", "sm_90"), machine.timer, machine.bind, args)


def test_an_interrupted_run_keeps_what_it_has_and_goes_on(found, tmp_path, capsys):
    first = Machine(interrupt_at=1)
    assert tune(found, first, tmp_path) == command.INTERRUPTED
    assert [p.stem for p in (tmp_path / "triton" / "made_up_gpu").iterdir()] == [found[0].op]
    with (tmp_path / "journal.jsonl").open("a") as journal:
        journal.write('{"cut off in the mid')
    for one in found:
        for candidate in one.candidates:
            candidate.seconds = None
    second = Machine()
    assert tune(found, second, tmp_path) == 0
    assert len(second.timed) == 1, "the first case is in the journal"
    assert not {c for case in second.timed for c in case} & {c for case in first.timed for c in case}
    for one in found:
        (written,) = tuning.read(tmp_path, "triton", "made_up_gpu", one.op)
        most = max((c.config or {}).get("num_warps", 1) for c in search.prune(one))
        assert written["source"] == "measured" and written["config"]["num_warps"] == most
        assert written["default_us"] == 10.0 and written["time_us"] == round(10 / most, 2)
        assert tuning.nearest([written], one.problem) is written
    third = Machine()
    assert tune(found, third, tmp_path) == 0 and not third.timed
    assert "times as fast as the default" in capsys.readouterr().out


def test_other_kernels_or_another_device_are_measured_again(found, tmp_path, monkeypatch):
    assert tune(found[:1], Machine(), tmp_path) == 0
    monkeypatch.setattr(search, "fingerprint", lambda: "edited")
    again = Machine()
    assert tune(found[:1], again, tmp_path) == 0 and len(again.timed) == 1


def test_a_candidate_that_fails_on_the_device_is_left_out(found, tmp_path):
    machine = Machine()
    ran = machine.timer

    def timer(calls):
        times = ran(calls)
        return {**times, min(times, key=lambda name: times[name]): "OutOfResources: shared memory"}

    machine.timer = timer
    assert tune(found[:1], machine, tmp_path) == 0
    assert any(c.refused and "OutOfResources" in c.refused for c in found[0].candidates)


def test_time_runs_out_between_cases(found, tmp_path):
    args = argparse.Namespace(out=tmp_path, minutes=0.0, workers=1)
    machine = Machine()
    assert command.tune(found, ("made_up_gpu", "sm_90"), machine.timer, machine.bind, args) == 1
    assert not machine.timed


def test_the_command_compiles_and_writes_a_model(tmp_path, capsys):
    code = command.main(
        ["softmax", "--device", "sm_80", "--case", "4096x768", "--workers", "1", "--out", str(tmp_path)]
    )
    assert code == 0, capsys.readouterr().err
    (written,) = tuning.read(tmp_path, "triton", "sm_80", "softmax")
    assert written["source"] == "modelled" and "time_us" not in written
    assert written["facts"][0]["registers"] > 0 and written["device"] == "A100 SXM 80GB"


@pytest.fixture
def recording(tmp_path):
    """A file of a program's calls: products, a norm and its gradient, grouped rows, attention with lengths."""
    x, w = torch.randn(96, 320, requires_grad=True), torch.randn(200, 320)
    q = torch.randn(2, 4, 40, 64, dtype=torch.bfloat16)
    with isotile.record(tmp_path / "calls.json"):
        isotile.layer_norm(isotile.linear(x, w), 200).sum().backward()
        isotile.matmul(x.detach()[::2], w.t())
        isotile.matmul(x.detach()[:48], w.t())
        isotile.attention(q, q, q, is_causal=True, seqlens_k=torch.tensor([7, 40], dtype=torch.int32))
        isotile.grouped_matmul(x.detach(), torch.randn(3, 320, 8), torch.tensor([0, 90, 96], dtype=torch.int32))
        isotile.softmax(torch.randn(0, 8))
        isotile.softmax(torch.randn(4, 8, dtype=torch.float64))
    return tmp_path / "calls.json"


def test_recorded_calls_are_the_cases(hopper, recording):
    found = list(search.searches([], "cpu", recording=recording))
    # the empty call and the one in float64 aside; of the two products that differ in strides one, each with TF32 too
    assert {s.op for s in found} == {"attention", "grouped_matmul", "layer_norm", "layer_norm_backward", "matmul"}
    problems = [(s.op, json.dumps(s.problem, sort_keys=True)) for s in found]
    assert len(set(problems)) == len(problems)
    assert [s.scalars.get("allow_tf32", False) for s in found if s.label.startswith("call 0: linear")] == [False, True]
    (grouped,) = [s for s in found if s.op == "grouped_matmul" and "tf32" not in s.label]
    offsets = search.fill(grouped, "cpu")[list(grouped.views).index("offsets")]
    assert offsets.tolist() == [0, 90, 96], "the recorded distribution decides the work"
    assert [s.label for s in search.searches(["matmul"], "cpu", "call 0", recording=recording)] == [
        "call 0: linear float32 x 96x320, weight 200x320",
        "call 0: linear float32 x 96x320, weight 200x320 tf32",
    ]


def test_the_command_tunes_recorded_calls(recording, tmp_path, capsys):
    words = ["--cases", str(recording), "--device", "sm_90", "--workers", "1", "--candidates", "2"]
    code = command.main(["matmul", "--case", "call 0: linear", *words, "--out", str(tmp_path / "tables")])
    assert code == 0, capsys.readouterr().err
    written = tuning.read(tmp_path / "tables", "triton", "sm_90", "matmul")
    wanted = list(search.searches(["matmul"], "cpu", "call 0: linear", recording=recording))
    assert len(written) == len(wanted) == 2
    for one in wanted:  # what a call of that shape will look up
        entry = tuning.nearest(written, one.problem)
        assert entry is not None and entry["case"] == one.label and entry["source"] == "modelled"


def test_the_command_refuses_what_is_no_recording(tmp_path, capsys):
    (tmp_path / "calls.json").write_text("{}")
    assert command.main(["--cases", str(tmp_path / "calls.json"), "--device", "sm_90"]) == 2
    assert "--cases: " in (said := capsys.readouterr().err) and "wanted a recording" in said


def test_the_command_refuses_what_it_cannot_do(capsys):
    assert command.main(["no_such_kernel"]) == 2
    assert "no kernel no_such_kernel; there are attention," in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert command.main([]) == 2
        assert "no GPU is here; to model without one, name an architecture: sm_80" in capsys.readouterr().err


def test_shipped_tables_are_of_known_devices_and_serve_their_own_case(hopper):
    known = {(op, label): (views, scalars) for op, label, views, scalars in cases()}
    seen = 0
    for device, op, entry in shipped():
        if device in targets.TARGETS:
            from isotile.backends.triton_launch import OfflineDriver

            triton.runtime.driver.set_active(OfflineDriver(targets.TARGETS[device].kind, targets.TARGETS[device].arch))
            assert entry["source"] == "modelled", f"{device}/{op}: an architecture is no device to measure"
            for fact in entry["facts"]:
                assert fact["shared"] <= targets.TARGETS[device].shared, (device, op, entry["case"])
        views, scalars = known[op, entry["case"]]
        module = registry.kernel_module("triton", op)
        assert module.problem(**views, **scalars) == entry["problem"], f"{device}/{op} {entry['case']}"
        assert module.prepare(**views, **scalars, config=entry["config"])
        seen += 1
    assert seen


class FakeClock:
    """The time of a call is what it returns first."""

    def events(self, calls):
        return {name: [float(call()[0])] * 3 for name, call in calls.items()}

    def graph(self, call):
        raise RuntimeError("not capturable")

    def host(self, call):
        return 1e-6

    def synchronize(self):
        pass


def made_row(section, case, work=1e6, **times):
    """A row whose contenders take the given seconds; a sentence instead is a rival that is not there."""
    calls = {n: (lambda t=t: torch.tensor([t, 1.0])) if not isinstance(t, str) else t for n, t in times.items()}
    return gpu_suite.Row(section, case, work, "GB/s", lambda device: calls)


def test_the_h100_suite_has_the_published_rows_and_counts():
    rows = {(r.section, r.case): r for r in gpu_suite.h100()}
    assert len(rows) == len(list(gpu_suite.h100()))
    assert rows["att_fwd", "b2 h32/32 s4096 d128 causal"].work == 4 * 2 * 32 * 4096**2 * 128 / 2
    assert rows["att_bwd", "b2 h32/32 s4096 d128 full"].work == 2.5 * 4 * 2 * 32 * 4096**2 * 128
    assert rows["att_dec", "b64 h32/8 kv4096 d128"].work == 2 * 64 * 8 * 4096 * 128 * 2
    assert rows["rms_bwd", "bf16 16384x4096"].work == 3 * 16384 * 4096 * 2
    assert rows["matmul", "bf16 m4095 n4097 k4111"].work == 2 * 4095 * 4097 * 4111
    assert rows["matmul", "tf32 4096^3"].precision == "high"


def test_the_suite_writes_rows_reasons_and_bars(tmp_path, capsys):
    near = 2e-3 * 1.000001
    chosen = [
        made_row("matmul", "bf16 m1 n4096 k4096", cublas=2e-3, isotile=near, quack="not importable: no quack"),
        made_row("matmul", "bf16 m4095 n4097 k4111", cublas=2e-3, isotile=0.5),
        made_row("att_dec", "b1", cudnn=1e-3, isotile=1e-3),
    ]
    args = argparse.Namespace(out=tmp_path, minutes=1.0, suite="h100")
    header = {"date": "2026-01-01T00:00:00", "gpu": "made up", "torch": "2", "isotile": "0"}
    assert gpu_suite.rows(chosen, FakeClock(), torch.device("cpu"), header, args) == 1, "a wrong result"
    (path,) = tmp_path.iterdir()
    run, *rows, end = map(json.loads, path.read_text().splitlines())
    assert run["kind"] == "run" and end["complete"] and end["left"] == 0
    by = {(r["case"], r["cand"]): r for r in rows}
    assert by["bf16 m1 n4096 k4096", "quack"]["status"] == "absent"
    ours = by["bf16 m1 n4096 k4096", "isotile"]
    assert ours["us"] == pytest.approx(2000) and ours["speed"] == pytest.approx(1e6 / 2e-3 / 1e9, rel=1e-3)
    assert "not capturable" in ours["graph_us_reason"] and ours["host_us"] == 1.0
    wrong = by["bf16 m4095 n4097 k4111", "isotile"]
    assert wrong["status"] == "wrong" and "us" not in wrong
    bars = {b["bar"]: b for b in end["bars"]}
    assert bars["matmul, one row"]["met"] is False and bars["decode, cuDNN"]["met"] is True
    assert bars["matmul, misaligned"]["met"] is None
    assert "NOT MET       matmul, one row" in capsys.readouterr().out


def test_the_suite_stops_at_its_limit_of_time(tmp_path):
    args = argparse.Namespace(out=None, minutes=0.0, suite="h100")
    header = {"date": "2026-01-01T00:00:00", "gpu": "made up", "torch": "2", "isotile": "0"}
    assert gpu_suite.rows([made_row("att_dec", "b1", cudnn=1.0)], FakeClock(), torch.device("cpu"), header, args) == 1
