"""Finding a configuration: candidates from the kernel, pruned by its model and by the compiler's report, then timed.

Nothing here needs a GPU but `measure`'s timer, which is given: the tests give a made-up one.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from .. import registry
from . import targets
from .cases import NamedCase, cases, recorded

#: A candidate whose modelled cost is beyond this multiple of the least is not tried.
SLOWEST = 1.6
#: Bytes a thread may spill: the repair of hidden NaN, which is never run on finite data, spills a little.
SPILL = 64


@dataclasses.dataclass
class Candidate:
    """One configuration of a case. `config` None is the kernel's own choice."""

    config: dict[str, Any] | None
    cost: float
    facts: list[dict[str, Any]] | None = None
    refused: str | None = None
    seconds: float | None = None

    @property
    def spill(self) -> int:
        return sum(f["spill"] or 0 for f in self.facts or ())


@dataclasses.dataclass
class Search:
    """A case and its candidates, the kernel's own choice first. `values` are those of integer tensors, where known."""

    op: str
    label: str
    views: dict[str, Any]
    scalars: dict[str, Any]
    problem: dict[str, Any]
    candidates: list[Candidate]
    values: dict[str, list[int]] = dataclasses.field(default_factory=dict)

    def launches(self, candidate: Candidate) -> list[Any]:
        module = registry.kernel_module("triton", self.op)
        return module.prepare(**self.views, **self.scalars, config=candidate.config)


def searches(
    ops: Sequence[str], device: str, wanted: str = "", most: int = 10, recording: Path | None = None
) -> Iterator[Search]:
    """A search for each case of `ops` (all if empty) whose label holds `wanted`, with at most `most` candidates.

    Triton's active driver says for which architecture. With `recording`, its calls are the cases, each problem once.
    """
    found = ((c, {}) for c in cases(device)) if recording is None else recorded(recording, device)
    seen = set()
    for case, values in found:
        op, label, views, scalars = case
        if (ops and op not in ops) or wanted not in label or any(v and not v.numel() for v in views.values()):
            continue
        module = registry.kernel_module("triton", op)
        if hasattr(module, "candidates") and module.supports(**views, **scalars) is None:
            one = dataclasses.replace(search(case, most), values=values)
            key = op, json.dumps(one.problem, sort_keys=True)
            if recording is None or key not in seen:
                seen.add(key)
                yield one


def search(case: NamedCase, most: int) -> Search:
    op, label, views, scalars = case
    module = registry.kernel_module("triton", op)
    problem = module.problem(**views, **scalars)
    device = next(v.device for v in views.values() if v is not None)
    costed = module.candidates(problem, device)
    least = costed[0][0] if costed else 1.0
    kept = [Candidate(config, cost / least) for cost, config in costed if cost <= SLOWEST * least]
    return Search(op, label, views, scalars, problem, [Candidate(None, 1.0), *kept[:most]])


def fingerprint() -> str:
    """Of the kernels' sources and Triton's version: what was measured under another one is not used again."""
    import triton

    digest = hashlib.sha256(triton.__version__.encode())
    folder = Path(registry.kernel_module("triton", "matmul").__file__ or "").parent
    for path in sorted(folder.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# --- compiling -------------------------------------------------------------------------------------------------------


def _use_target(name: str) -> None:
    import triton

    from ..backends.triton_launch import OfflineDriver

    target = targets.TARGETS[name]
    triton.runtime.driver.set_active(OfflineDriver(target.kind, target.arch))


def compile_case(
    name: str, op: str, views: dict[str, Any], scalars: dict[str, Any], config: dict[str, Any] | None
) -> list[dict[str, Any]]:
    """In a worker process: compiles the launches of a case for a target; what each needs."""
    from ..backends.triton_launch import compile_launch

    here = {n: v and dataclasses.replace(v, device=torch.device("cpu")) for n, v in views.items()}
    launches = registry.kernel_module("triton", op).prepare(**here, **scalars, config=config)
    kind = targets.TARGETS[name].kind
    return [{"kernel": one.kernel.__name__, **targets.resources(compile_launch(one), kind)} for one in launches]


def compile_all(
    found: Sequence[Search], target: str, workers: int, timeout_s: float, done: Callable[[int, int], None]
) -> None:
    """Compiles every candidate for `target` in processes of their own (a compiler may crash or hang), sharing Triton's
    cache on disk; sets each candidate's `facts` or `refused`. `done(finished, all)` is told as it goes."""
    jobs = [(s, c) for s in found for c in s.candidates if c.facts is None and c.refused is None]
    finished = 0
    context = multiprocessing.get_context("spawn")
    while jobs:
        pool = concurrent.futures.ProcessPoolExecutor(workers, context, _use_target, (target,))
        pending = {pool.submit(compile_case, target, s.op, s.views, s.scalars, c.config): (s, c) for s, c in jobs}
        jobs = []
        try:
            while pending:
                ready, _ = concurrent.futures.wait(pending, timeout_s, return_when=concurrent.futures.FIRST_COMPLETED)
                if not ready:  # every worker hangs: give up on what runs, go on with the rest
                    for future, (s, c) in pending.items():
                        if future.running():
                            c.refused = f"the compiler did not come to an end within {timeout_s:.0f} s"
                        else:
                            jobs.append((s, c))
                    _kill(pool)
                    break
                for future in ready:
                    s, c = pending.pop(future)
                    try:
                        c.facts = future.result()
                        c.refused = judge(c.facts, target)
                    except concurrent.futures.process.BrokenProcessPool:
                        c.refused = "the compiler crashed, or did so for a neighbour"
                    except Exception as error:  # a compiler's error is a candidate's, not the run's; the journal has it
                        c.refused = f"{type(error).__name__}: {str(error)[-200:]}"
                    finished += 1
                    done(finished, finished + len(pending) + len(jobs))
        except BaseException:
            _kill(pool)
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _kill(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()


def judge(facts: Sequence[dict[str, Any]], target: str) -> str | None:
    """Why a compiled candidate cannot run on its target, or None."""
    return next((reason for fact in facts if (reason := targets.excess(fact, target))), None)


def prune(one: Search) -> list[Candidate]:
    """The candidates worth timing: those that compiled and spill no more than the least does plus `SPILL`."""
    able = [c for c in one.candidates if c.facts is not None and c.refused is None]
    least = min((c.spill for c in able), default=0)
    kept, seen = [], set()
    for candidate in able:
        # the kernel's own choice often is one of its candidates: the same launches need no second time
        launches = [(x.kernel.__name__, x.grid, json.dumps(x.meta, sort_keys=True)) for x in one.launches(candidate)]
        if candidate.spill <= least + SPILL and str(launches) not in seen:
            seen.add(str(launches))
            kept.append(candidate)
    return kept


def modelled(one: Search) -> Candidate | None:
    """The choice without a device: of what compiles with the least spilling, the least modelled cost.

    The kernel's own choice is not among them: it needs no table.
    """
    able = [c for c in prune(one) if c.config is not None]
    return min(able, key=lambda c: (max(c.spill - SPILL, 0), c.cost), default=None)


# --- measuring -------------------------------------------------------------------------------------------------------


class Journal:
    """What was measured, one JSON line each, valid at every moment: an interrupted run goes on where it stopped."""

    def __init__(self, path: Path, context: dict[str, Any]) -> None:
        self.path, self.context = path, context
        self.kept: dict[str, dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
        for line in lines:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:  # the line during which the last run was killed
                continue
            if record.get("context") == context:
                self.kept[record["key"]] = record
        self._file = path.open("a", encoding="utf-8")
        if lines and path.read_bytes()[-1:] != b"\n":
            self._file.write("\n")

    @staticmethod
    def key(one: Search, candidate: Candidate) -> str:
        return json.dumps([one.op, one.label, candidate.config], sort_keys=True)

    def get(self, one: Search, candidate: Candidate) -> dict[str, Any] | None:
        return self.kept.get(self.key(one, candidate))

    def add(self, one: Search, candidate: Candidate) -> None:
        key = self.key(one, candidate)
        record = {"context": self.context, "key": key, "seconds": candidate.seconds, "refused": candidate.refused}
        self.kept[key] = record
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


#: seconds(calls) -> the time of each call; None where it could not run, with the reason
Timer = Callable[[dict[str, Callable[[], Any]]], dict[str, float | str]]


def fill(one: Search, device: str) -> list[torch.Tensor | None]:
    """Tensors for a case's views, in their order: normal numbers; lengths, offsets and seeds in their range."""
    generator = torch.Generator(device).manual_seed(0)
    made: list[torch.Tensor | None] = []
    for name, view in one.views.items():
        if view is None:
            made.append(None)
            continue
        size = 1 + sum((n - 1) * s for n, s in zip(view.shape, view.strides, strict=True))
        if name in one.values:
            flat = torch.zeros(size, dtype=view.dtype, device=device)
            flat.as_strided(view.shape, view.strides).copy_(torch.tensor(one.values[name]).reshape(view.shape))
        elif name == "offsets":
            rows = one.problem["rows"]
            flat = torch.linspace(0, rows, len(range(view.shape[0])) + 1, device=device)[1:].to(view.dtype)
        elif name == "seqlens_k":
            flat = torch.full((size,), one.views["key"].shape[-2], dtype=view.dtype, device=device)
        elif view.dtype.is_floating_point:
            flat = torch.randn(size, generator=generator, device=device, dtype=view.dtype)
        else:
            flat = torch.zeros(size, dtype=view.dtype, device=device)
        made.append(flat.as_strided(view.shape, view.strides))
    return made


def calls_of(one: Search, chosen: Sequence[Candidate], tensors: list[torch.Tensor | None]) -> dict[str, Any]:
    """A call for each candidate on the case's tensors, by the candidate's place in the list."""
    from ..backends.triton_launch import Replay

    views = list(one.views.values())
    device = next(t.device for t in tensors if t is not None)
    bound = {str(i): Replay(one.launches(c), views, device) for i, c in enumerate(chosen)}
    return {name: (lambda replay=replay: replay.run(tensors)) for name, replay in bound.items()}


def measure(
    one: Search,
    journal: Journal,
    timer: Timer,
    bind: Callable[[Search, Sequence[Candidate]], dict[str, Callable[[], Any]]],
) -> Candidate | None:
    """Times a case's candidates, those in the journal aside, and returns the fastest; None if none ran."""
    chosen = prune(one)
    rest = []
    for candidate in chosen:
        record = journal.get(one, candidate)
        if record is None:
            rest.append(candidate)
        else:
            candidate.seconds, candidate.refused = record["seconds"], record["refused"]
    if rest:
        times = timer(bind(one, rest))
        for i, candidate in enumerate(rest):
            found = times[str(i)]
            if isinstance(found, str):
                candidate.refused = found
            else:
                candidate.seconds = found
            journal.add(one, candidate)
    return min((c for c in chosen if c.seconds is not None), key=lambda c: c.seconds or 0.0, default=None)


def entry(one: Search, best: Candidate, how: dict[str, Any]) -> dict[str, Any]:
    """The line of a table. A measured one keeps its time, and that of the kernel's own choice beside it."""
    record: dict[str, Any] = {
        "case": one.label,
        "problem": one.problem,
        "config": best.config or {},
        "source": "modelled" if best.seconds is None else "measured",
        **how,
    }
    if best.facts is not None:
        record["facts"] = [{k: f[k] for k in ("kernel", "registers", "spill", "shared")} for f in best.facts]
    if best.seconds is not None:
        record["time_us"] = round(best.seconds * 1e6, 2)
        own = one.candidates[0].seconds
        if own is not None:
            record["default_us"] = round(own * 1e6, 2)
    return record


def today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())
