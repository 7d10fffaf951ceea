"""One workload from inputs to rows: agreement first, then time."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any

import torch

from ..errors import BackendError
from ..testing.compare import Disagreement
from . import memory, modelled, timing
from .agreement import Agreement, Judge, backward_bytes, backward_flops
from .contenders import Compiled, Contender, Prepared, Unserved
from .machine import Peaks, last_level_cache
from .workloads import Inputs, Workload, tokens_of

Row = dict[str, Any]


class Runner:
    """Measures workloads.

    Args:
        contenders: ours and rivals, in the order of the rows.
        effort: rounds and samples.
        peaks: the machine's roofline.
        warm: keep all inputs in the cache instead of rotating over copies.
    """

    def __init__(self, contenders: list[Contender], effort: timing.Effort, peaks: Peaks, warm: bool = False) -> None:
        self.contenders, self.effort, self.peaks = contenders, effort, peaks
        self.cache_bytes = 0 if warm else last_level_cache()

    def rows(self, workload: Workload) -> list[Row]:
        """A row for each contender. `status`: "ok"; "modelled" (figures of another kind), "wrong" (no figures),
        "unserved" or "error", with the reason."""
        found = [modelled.row(c, workload) for c in self.contenders if c.modelled]
        contenders = [c for c in self.contenders if not c.modelled]
        if not any(c.ours for c in contenders) and found:
            return found
        backward = workload.direction == "backward"
        inputs = Inputs(workload, self.cache_bytes, needs_grad=backward)
        judge = Judge(workload, inputs)
        checked: dict[str, tuple[Prepared, Agreement, float]] = {}
        failed: dict[str, Row] = {}
        for contender in contenders:
            if isinstance(contender, Compiled):
                contender.forget()
            row: Row = {"status": "ok", "reason": None}
            try:
                with _as_called(contender, backward):
                    checked[contender.name] = self._check(contender, workload, inputs, judge)
                agreement = checked[contender.name][1]
                if not agreement.ok:
                    row = {"status": "wrong", "reason": agreement.reason}
            except (Unserved, BackendError) as error:
                row = {"status": "unserved", "reason": str(error)}
            except Disagreement as error:
                row = {"status": "error", "reason": str(error)}
            except Exception as error:  # a rival or a kernel that raises is a row of the result, with its own words
                row = {"status": "error", "reason": f"{type(error).__name__}: {error}"}
            if row["status"] != "ok":
                failed[contender.name] = row
        timed = {n: c for n, c in checked.items() if n not in failed}
        contexts = {
            n: functools.partial(_as_called, prepared.contender, backward) for n, (prepared, _, _) in timed.items()
        }
        timers = {
            n: timing.Timer(prepared.calls, contexts[n], prepared.contender.settle_s)
            for n, (prepared, _, _) in timed.items()
        }
        summaries = timing.measure(timers, self.effort) if timers else {}
        flops, moved = self._work(workload, inputs, judge, timed)
        tokens = tokens_of(workload.spec, inputs.call.values)
        for contender in contenders:
            name = contender.name
            row = {
                "kind": "row", "op": workload.spec.name, "case": workload.case.name, "dtype": workload.key[2],
                "direction": workload.direction, "contender": name, "ours": contender.ours,
                "threads": torch.get_num_threads(), "shapes": workload.shapes(), "cold": inputs.cold,
                "copies": len(inputs.sets), "flops": flops, "bytes": moved, "status": "ok", "reason": None,
                "device": inputs.device, "tokens": tokens, "sweep": workload.sweep, "count": workload.count,
            }  # fmt: skip
            if name in checked:
                _, agreement, first_s = checked[name]
                row |= {
                    "against": agreement.against, "bound_share": agreement.share,
                    "relative_error": agreement.relative, "first_call_s": first_s,
                }  # fmt: skip
            if name in failed:
                row |= failed[name]
                found.append(row)
                continue
            summary = summaries[name]
            row |= self._figures(summary, flops, moved, workload)
            prepared = timed[name][0]
            row["host_s"] = self._host_s(prepared, workload, inputs) if contender.ours and not backward else None
            with contexts[name]():
                row["peak_extra_bytes"] = memory.peak_extra_bytes(prepared.calls[0])
            row["speed_vs"] = {
                other: timing.ratios(summaries[other], summary)
                for other in summaries
                if contender.ours and not timed[other][0].contender.ours
            }
            found.append(row)
        return found

    def _check(
        self, contender: Contender, workload: Workload, inputs: Inputs, judge: Judge
    ) -> tuple[Prepared, Agreement, float]:
        prepared = Prepared(contender, workload, inputs)
        start = time.perf_counter()
        first = prepared.first()
        first_s = time.perf_counter() - start
        judge.returned = len(first)
        agreement = judge.forward(first, contender.ours, contender.name)
        if not agreement.ok or workload.direction == "forward":
            return prepared, agreement, first_s
        del first
        start = time.perf_counter()
        gradients = prepared.prepare_backward(inputs, judge.upstream)
        first_s = time.perf_counter() - start
        return prepared, judge.backward(gradients, prepared.calls[0], contender.ours), first_s

    def _work(
        self, workload: Workload, inputs: Inputs, judge: Judge, timed: dict[str, tuple[Prepared, Agreement, float]]
    ) -> tuple[float, float]:
        """(operations, bytes) that the workload needs at least, whoever runs it."""
        forward = inputs.flops()
        if workload.direction == "forward":
            return forward, float(inputs.bytes + inputs.results_bytes())
        ours = next((p for p, _, _ in timed.values() if p.contender.ours), None)
        flops = 2 * forward
        if ours is not None:
            with ours.contender.context():
                flops = backward_flops(ours.calls[0], forward)
        return flops, float(backward_bytes(workload, inputs, judge.upstream))

    def _figures(self, summary: timing.Summary, flops: float, moved: float, workload: Workload) -> Row:
        median = summary.median
        low, high = summary.quartiles
        return {
            "median_s": median,
            "q1_s": low,
            "q3_s": high,
            "samples_s": list(summary.samples),
            "clean": list(summary.clean),
            "calls": summary.calls,
            "quiet": summary.quiet,
            "gb_per_s": moved / median / 1e9,
            "tflops": flops / median / 1e12,
            "roofline_share": self.peaks.least_seconds(flops, moved, workload.dtype) / median,
        }

    def _host_s(self, prepared: Prepared, workload: Workload, inputs: Inputs) -> float | None:
        """Seconds that a call takes besides its kernel: the same call with an empty kernel in its plan."""
        if workload.spec.internal:
            return None
        calls = 0

        def nothing(*tensors: Any) -> None:
            nonlocal calls
            calls += 1

        values = tuple(inputs.sets[0][p] for p in inputs.operator.parameters)
        with _as_called(prepared.contender, backward=False):
            plan = inputs.operator.plan(inputs.overload(), values, None)
            kernel, plan.run = plan.run, nothing
            try:
                seconds = timing.least(prepared.forwards[0], 200, 5)
            finally:
                plan.run = kernel
        return seconds if calls else None


@contextlib.contextmanager
def _as_called(contender: Contender, backward: bool) -> Iterator[None]:
    """What is in force while a contender runs: its backend, and no gradients in a forward row."""
    with contender.context(), torch.set_grad_enabled(backward):
        yield
