"""Timing that survives a busy machine: short samples of all contenders in turn, medians over the rounds.

A sample is as many calls as fill `sample_s`. In every round each contender gives one sample, in a new order, so that a
drift of the machine meets all of them; ratios are taken within a round. On Linux a sample during which this process
waited for a core longer than `WAITED` of the time is marked; where enough unmarked ones are left, only those count.
"""

from __future__ import annotations

import dataclasses
import gc
import itertools
import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

WAITED = 0.02
ENOUGH = 3


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much time to spend on one workload."""

    rounds: int = 11
    least_rounds: int = 5
    sample_s: float = 0.03
    budget_s: float = 8.0

    @classmethod
    def quick(cls) -> Effort:
        return cls(rounds=5, least_rounds=3, sample_s=0.003, budget_s=1.0)


@dataclasses.dataclass(frozen=True)
class Summary:
    """Medians and quartiles of what was sampled, in seconds for one call."""

    samples: tuple[float, ...]
    clean: tuple[bool, ...]
    calls: int

    @property
    def used(self) -> list[float]:
        kept = [s for s, ok in zip(self.samples, self.clean, strict=True) if ok]
        return kept if len(kept) >= ENOUGH else list(self.samples)

    @property
    def quiet(self) -> bool:
        """Whether only samples count during which the process had the cores it wanted."""
        return sum(self.clean) >= ENOUGH

    @property
    def median(self) -> float:
        return statistics.median(self.used)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.used)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def ratios(numerator: Summary, denominator: Summary) -> dict[str, Any]:
    """Median and quartiles of the ratio of two contenders, round by round; `quiet` as in `Summary`."""
    both = list(zip(numerator.samples, denominator.samples, strict=False))
    clean = list(zip(numerator.clean, denominator.clean, strict=False))
    quiet = [pair for pair, ok in zip(both, clean, strict=True) if all(ok)]
    found = [a / b for a, b in (quiet if len(quiet) >= ENOUGH else both)]
    low, high = quartiles(found)
    return {"median": statistics.median(found), "q1": low, "q3": high, "quiet": len(quiet) >= ENOUGH}


def waited_ns() -> int:
    """Nanoseconds that this process's threads stood ready without a core; 0 where the system does not say."""
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError):  # a thread that has just ended
            continue
    return total


class Timer:
    """Runs one contender's calls in turn, going on through the sets of inputs from sample to sample.

    `settle_s` is waited after each sample, for threads of the contender's own to come to rest.
    """

    def __init__(
        self,
        calls: Sequence[Callable[[], Any]],
        context: Callable[[], AbstractContextManager[Any]],
        settle_s: float = 0.0,
    ) -> None:
        self.calls, self.context, self.settle_s = calls, context, settle_s
        self.next = 0
        self.count = 1
        self.samples: list[float] = []
        self.clean: list[bool] = []

    def run(self, count: int) -> float:
        """Seconds of one call, over `count` of them."""
        order = [self.calls[(self.next + i) % len(self.calls)] for i in range(count)]
        self.next = (self.next + count) % len(self.calls)
        with self.context():
            start = time.perf_counter_ns()
            for call in order:
                call()
            end = time.perf_counter_ns()
        return (end - start) / count / 1e9

    def calibrate(self, sample_s: float) -> float:
        """Warm up, and choose how many calls make a sample. Returns the seconds of one call."""
        count = 1
        while True:
            each = self.run(count)
            if each * count >= sample_s / 2 or count >= 1 << 20:
                break
            count = min(max(2 * count, int(sample_s / 2 / max(each, 1e-9))), 1 << 20)
        self.count = max(1, round(sample_s / max(each, 1e-9)))
        return each

    def sample(self) -> None:
        before = waited_ns()
        each = self.run(self.count)
        waited = (waited_ns() - before) / 1e9
        self.samples.append(each)
        self.clean.append(waited <= WAITED * each * self.count)
        if self.settle_s:
            time.sleep(self.settle_s)

    def summary(self) -> Summary:
        return Summary(tuple(self.samples), tuple(self.clean), self.count)


def measure(timers: dict[str, Timer], effort: Effort) -> dict[str, Summary]:
    """Interleaved samples of all contenders."""
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        round_s = sum(max(t.calibrate(effort.sample_s), effort.sample_s) for t in timers.values())
        rounds = min(effort.rounds, max(effort.least_rounds, int(effort.budget_s / max(round_s, 1e-9))))
        order = list(timers)
        shuffle = random.Random(0)
        start, done = time.perf_counter(), 0
        while done < rounds or (
            # On a busy machine more rounds may find the quiet ones that the others lacked.
            done < 4 * rounds
            and time.perf_counter() - start < effort.budget_s
            and any(sum(t.clean) < ENOUGH for t in timers.values())
        ):
            shuffle.shuffle(order)
            for name in order:
                timers[name].sample()
            done += 1
    finally:
        if collecting:
            gc.enable()
    return {name: timer.summary() for name, timer in timers.items()}


def least(call: Callable[[], Any], times: int, rounds: int) -> float:
    """Seconds of one call, the best of `rounds` runs of `times`: for costs that noise can only raise."""
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter_ns()
        for _ in itertools.repeat(None, times):
            call()
        best = min(best, (time.perf_counter_ns() - start) / times / 1e9)
    return best
