"""Timing on a GPU: cold L2, CUDA events, CUDA graphs, and the host's own time.

Before every sample a buffer of at least twice the L2 cache is written, so that no operand is found there; the write
also gives the host a lead, so that the events around a call measure the kernels and not the launch. All contenders of a
case take turns within a round. `events`: a call as it is; `graph`: the same call captured once and replayed, without
any host work; `host`: how long the call keeps the host busy.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

Calls = dict[str, Callable[[], Any]]


class Clock:
    """Times calls on one GPU.

    Args:
        index: the device.
        rounds: samples of each call, at least `least` and at most this many, within `budget_s` of device time a case.
    """

    def __init__(self, index: int, rounds: int = 50, least: int = 5, budget_s: float = 0.5) -> None:
        self.index, self.rounds, self.least, self.budget_s = index, rounds, least, budget_s
        properties = torch.cuda.get_device_properties(index)
        size = max(2 * int(getattr(properties, "L2_cache_size", 0)), 256 << 20)
        self.flushed = torch.empty(size, dtype=torch.uint8, device=f"cuda:{index}")

    def flush(self) -> None:
        self.flushed.zero_()

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.index)

    def events(self, calls: Calls) -> dict[str, list[float]]:
        """Seconds of each sample of each call, interleaved."""
        first = {name: self._one(call) for name, call in calls.items()}
        each = sum(first.values()) + len(calls) * 1e-4
        rounds = max(self.least, min(self.rounds, int(self.budget_s / max(each, 1e-6))))
        order, shuffle = list(calls), random.Random(0)
        pairs: dict[str, list[tuple[Any, Any]]] = {name: [] for name in calls}
        for _ in range(rounds):
            shuffle.shuffle(order)
            for name in order:
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                self.flush()
                begin.record()
                calls[name]()
                end.record()
                pairs[name].append((begin, end))
        self.synchronize()
        return {name: [a.elapsed_time(b) / 1e3 for a, b in found] for name, found in pairs.items()}

    def _one(self, call: Callable[[], Any]) -> float:
        call()
        self.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        self.synchronize()
        return begin.elapsed_time(end) / 1e3

    def graph(self, call: Callable[[], Any], rounds: int = 20) -> float:
        """Median seconds of a replayed call, its L2 cold."""
        side = torch.cuda.Stream(self.index)
        side.wait_stream(torch.cuda.current_stream(self.index))
        with torch.cuda.stream(side):
            call()
        torch.cuda.current_stream(self.index).wait_stream(side)
        begin, end = (torch.cuda.Event(enable_timing=True, external=True) for _ in range(2))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.flush()
            begin.record()
            call()
            end.record()
        found = []
        for _ in range(rounds):
            graph.replay()
            self.synchronize()
            found.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(found)

    def host(self, call: Callable[[], Any], times: int = 50, rounds: int = 5) -> float:
        """Seconds for which a call keeps the host busy, the best of `rounds`."""
        best = float("inf")
        for _ in range(rounds):
            self.synchronize()
            began = time.perf_counter()
            for _ in range(times):
                call()
            best = min(best, (time.perf_counter() - began) / times)
        self.synchronize()
        return best

    def fastest(self, calls: Calls) -> dict[str, float | str]:
        """The median of each call's samples, or why it cannot run: a configuration may ask for more than there is."""
        able: Calls = {}
        times: dict[str, float | str] = {}
        for name, call in calls.items():
            try:
                call()
                self.synchronize()
            except (
                Exception
            ) as error:  # out of shared memory or registers: the candidate's verdict, kept in the journal
                times[name] = f"{type(error).__name__}: {str(error)[-200:]}"
            else:
                able[name] = call
        if able:
            times |= {name: statistics.median(samples) for name, samples in self.events(able).items()}
        return times
