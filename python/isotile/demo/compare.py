"""The measurements of the demo: isotile's backends and plain PyTorch on one model, each against the float64 truth."""

import contextlib
import copy
import functools
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

import isotile

from . import decoder, encoder, torch_ops
from .agreement import Agreement, max_ulps, min_cosine

TORCH = "PyTorch"

# A contender that is slow by design (an interpreter, an emulator), or on a busy machine, is timed for fewer rounds.
_SECONDS_FOR_EACH_CONTENDER = 3.0
_STEPS_BEFORE_TIMING = 3


@dataclass
class Row:
    """What one contender did. `refusal` is its reason when it cannot run the model; then nothing else is set."""

    contender: str  # a backend of isotile, or TORCH
    dtype: str
    refusal: str = ""
    agreements: list[Agreement] = field(default_factory=list)
    error_ulps: float = math.nan
    one_minus_cosine: float = math.nan
    same_neighbours: int = 0
    neighbours_hold: bool = True
    milliseconds: float = math.nan
    times_torch: float = math.nan  # its time over PyTorch's: the median of ratios taken side by side
    losses: list[float] = field(default_factory=list)

    @property
    def agrees(self) -> bool:
        return not self.refusal and self.neighbours_hold and all(a.holds for a in self.agreements)

    def record(self) -> dict:
        return asdict(self) | {"agreements": [a.record() for a in self.agreements], "agrees": self.agrees}


def _ops(contender: str):
    return torch_ops if contender == TORCH else isotile


def _context(contender: str):
    return contextlib.nullcontext() if contender == TORCH else isotile.use_backend(contender)


def _timed(contender: str, run: Callable[..., Any], device: torch.device) -> tuple[float, Any]:
    """Seconds and result of `run(ops)` by one contender."""
    with _context(contender):
        _synchronize(device)
        start = time.perf_counter()
        result = run(_ops(contender))
        _synchronize(device)
        return time.perf_counter() - start, result


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _interleave(run: Callable[..., Any], first: dict[str, float], rounds: int, device, tick) -> dict:
    """Seconds of `run` for each contender of `first`, in each round.

    Every round times all that still take part, and starts with another one. `first` holds the seconds of a first run.
    """
    names = list(first)
    times: dict[str, list[float]] = {name: [] for name in names}
    for r in range(rounds):
        for name in names[r % len(names) :] + names[: r % len(names)]:
            if r == 0 or (r + 1) * first[name] <= _SECONDS_FOR_EACH_CONTENDER:
                times[name].append(_timed(name, run, device)[0])
            tick()
    return times


def _set_times(row: Row, times: list[float], torch_times: list[float]) -> None:
    row.milliseconds = 1e3 * statistics.median(times)
    # strict is off on purpose: a slow contender took part in the first rounds only.
    row.times_torch = statistics.median(a / b for a, b in zip(times, torch_times, strict=False))


# ---- The encoder


@dataclass
class EncoderResult:
    rows: list[Row]
    found: list[dict]  # for each query: what the float64 truth finds
    tokens: int


def encoder_ticks(contenders: int, rounds: int) -> int:
    return 1 + contenders + rounds * contenders


def compare_encoder(pretrained, sentences, queries, backends, dtypes, rounds, device, tick) -> EncoderResult:
    """Embeds the sentences, searches them with the queries, in each dtype, with PyTorch and with each backend.

    Args:
        pretrained: an `encoder.Pretrained`.
        sentences: list of (source, text).
        queries: list of (expected source, text).
        backends: names for `isotile.use_backend`.
        dtypes: torch dtypes of weights and activations.
        rounds: interleaved timings.
        device: where PyTorch and isotile run; the truth is taken on the CPU.
        tick: called at most `encoder_ticks` times for each dtype.
    """
    corpus, asked = (
        encoder.make_batches(pretrained.tokenize([text for _, text in pairs])) for pairs in (sentences, queries)
    )
    corpus_here, asked_here = (
        [(positions, batch.to(device)) for positions, batch in batches] for batches in (corpus, asked)
    )
    rows: list[Row] = []
    found: list[dict] = []
    for dtype in dtypes:
        model = copy.deepcopy(pretrained.model).to(dtype)
        # The truth has the same, already rounded weights.
        truth = _embed_and_search(copy.deepcopy(model).double(), corpus, asked, torch_ops)
        tick()
        model = model.to(device)
        job = functools.partial(_embed_and_search, model, corpus_here, asked_here)
        outputs, first, row_of = {}, {}, {}
        for name in (TORCH, *backends):
            row_of[name] = Row(name, str(dtype).removeprefix("torch."))
            try:
                first[name], outputs[name] = _timed(name, job, device)
            except isotile.BackendError as refusal:
                row_of[name].refusal = str(refusal)
            tick()

        torch_figures = _figures(outputs[TORCH], truth, dtype)
        for name, output in outputs.items():
            row, figures = row_of[name], _figures(output, truth, dtype)
            row.error_ulps = figures["embeddings"]
            row.one_minus_cosine = 1 - min_cosine(output[0], truth[0])
            row.agreements = [Agreement(what, figures[what], torch_figures[what]) for what in figures]
            limit = next(a.limit for a in row.agreements if a.what == "similarities")
            row.same_neighbours, row.neighbours_hold = _neighbours(output[1], truth[1], limit, dtype)
        times = _interleave(functools.partial(encoder.encode, model, corpus_here), first, rounds, device, tick)
        for name in first:
            _set_times(row_of[name], times[name], times[TORCH])
        rows.extend(row_of.values())
        found = found or _found(truth, sentences, queries)
    return EncoderResult(rows, found, sum(int(batch.lengths.sum()) for _, batch in corpus))


def _embed_and_search(model, corpus, asked, ops):
    embedded = encoder.encode(model, corpus, ops)
    with torch.inference_mode():
        return embedded, *encoder.search(encoder.encode(model, asked, ops), embedded, ops)


def _figures(output, truth, dtype) -> dict[str, float]:
    what = ("embeddings", "similarities", "search probabilities")
    return {w: max_ulps(o, t, dtype) for w, o, t in zip(what, output, truth, strict=True)}


def _neighbours(scores, truth, limit_ulps, dtype) -> tuple[int, bool]:
    """How many queries find the truth's nearest sentence, and whether each other one finds a sentence as near.

    As near: two similarities, each within its limit of the truth, may change places.
    """
    found, best = scores.cpu().argmax(-1), truth.argmax(-1)
    gap = truth.amax(-1) - truth.gather(-1, found[:, None])[:, 0]
    slack = 2 * limit_ulps * torch.finfo(dtype).eps * truth.abs().amax(-1)
    return int((found == best).sum()), bool((gap <= slack).all())


def _found(truth, sentences, queries) -> list[dict]:
    _, scores, probabilities = truth
    found = []
    for i, (expected, text) in enumerate(queries):
        best = int(scores[i].argmax())
        source, sentence = sentences[best]
        found.append(
            {
                "query": text,
                "expected": expected,
                "source": source,
                "sentence": sentence,
                "cosine": scores[i, best].item(),
                "probability": probabilities[i, best].item(),
            }
        )
    return found


# ---- The decoder


@dataclass
class DecoderResult:
    rows: list[Row]
    truth: list[float]
    text: str  # what it was trained on
    parameters: int


def compare_decoder(text, text_name, backends, steps, device, tick, seed=0) -> DecoderResult:
    """Trains the decoder `steps` steps in float32 with PyTorch and with each backend, and in float64 for the truth.

    All start from the same weights and see the same bytes, one step of each in turn; `tick` is called at every step.
    """

    def trainer(ops, dtype=torch.float32, device=device):
        return decoder.Trainer(text, ops, seed=seed, dtype=dtype, device=device)

    truth = trainer(torch_ops, torch.float64, torch.device("cpu"))
    rows = {name: Row(name, "float32") for name in (TORCH, *backends)}
    trainers = {name: trainer(_ops(name)) for name in rows}
    times: dict[str, list[float]] = {name: [] for name in rows}
    truth_losses = []
    for step in range(steps):
        truth_losses.append(truth.step())
        names = list(trainers)
        for name in names[step % len(names) :] + names[: step % len(names)]:
            try:
                seconds, loss = _timed(name, lambda _, name=name: trainers[name].step(), device)
            except isotile.BackendError as refusal:
                rows[name] = Row(name, "float32", refusal=str(refusal))
                del trainers[name]
                continue
            rows[name].losses.append(loss)
            if step >= min(_STEPS_BEFORE_TIMING, steps - 1):
                times[name].append(seconds)
        tick()
    curve = torch.tensor(truth_losses, dtype=torch.float64)
    errors = {name: _curve_ulps(rows[name].losses, curve) for name in trainers}
    for name in trainers:
        row = rows[name]
        row.error_ulps = errors[name]
        row.agreements = [Agreement("loss curve", errors[name], errors[TORCH], roundings=math.sqrt(steps))]
        _set_times(row, times[name], times[TORCH])
    parameters = sum(p.numel() for p in truth.model.parameters())
    return DecoderResult(list(rows.values()), truth_losses, text_name, parameters)


def _curve_ulps(losses, truth) -> float:
    # One column: each step's loss is counted in units of its own size.
    return max_ulps(torch.tensor(losses, dtype=torch.float64)[:, None], truth[:, None], torch.float32)
