"""`isotile demo --quantized`: the sentence encoder with its linear layers in every quantised format.

For each format: the bytes of the linear layers, the cosine between its embeddings and the float32 model's, how many
queries still find the sentence that the float32 model finds, and the time beside PyTorch's float32 model.
"""

import copy
import statistics
import time
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch

import isotile

from . import encoder, torch_ops

#: (name, options of `isotile.quantize`); None: not quantised.
FORMATS: tuple[tuple[str, dict | None], ...] = (
    ("float32", None),
    ("int8", {"scheme": "int8"}),
    ("int8_dynamic", {"scheme": "int8_dynamic"}),
    ("fp8", {"scheme": "fp8"}),
    ("int4, groups of 32", {"scheme": "int4", "group_size": 32}),
    ("int4, 32, zero points", {"scheme": "int4", "group_size": 32, "symmetric": False}),
    ("int4, 32, least squares", {"scheme": "int4", "group_size": 32, "search": "least_squares"}),
    ("int4, groups of 128", {"scheme": "int4", "group_size": 128}),
    ("int4_dynamic, 32", {"scheme": "int4_dynamic", "group_size": 32}),
    ("mxfp4", {"scheme": "mxfp4"}),
    ("nvfp4", {"scheme": "nvfp4"}),
)

#: A format whose embeddings are further from the float32 model's than this is broken, not coarse.
LEAST_MEAN_COSINE = 0.9


@dataclass
class Row:
    """One format's figures."""

    format: str
    megabytes: float  # of the linear layers' weights
    smaller: float  # times, than float32
    least_cosine: float  # between an embedding and the float32 model's
    mean_cosine: float
    same_neighbours: int
    milliseconds: float
    times_torch: float  # time over PyTorch's float32 model, measured side by side

    def record(self) -> dict:
        return asdict(self)


def _linear(x, weight, bias=None, **options):
    if isinstance(weight, isotile.QuantizedWeight):
        return isotile.quantized_linear(x, weight, bias, **options)
    return isotile.linear(x, weight, bias, **options)


#: isotile's functions, with a linear that takes either kind of weight.
OPS = SimpleNamespace(linear=_linear, attention=isotile.attention, layer_norm=isotile.layer_norm)


def _weight_bytes(model: torch.nn.Module) -> int:
    total = 0
    for module in model.modules():
        if isinstance(module, isotile.QuantizedWeight):
            total += module.nbytes
        elif type(module) is torch.nn.Linear:
            total += module.weight.numel() * module.weight.element_size()
    return total


def compare(pretrained, sentences, queries, rounds: int, device: torch.device, tick) -> list[Row]:
    """The figures of every format; `tick()` is called once for each format and round."""
    ids = pretrained.tokenize([s for _, s in sentences])
    query_ids = pretrained.tokenize([q for _, q in queries])
    batches = [(rows, batch.to(device)) for rows, batch in encoder.make_batches(ids)]
    query_batches = [(rows, batch.to(device)) for rows, batch in encoder.make_batches(query_ids)]
    models: dict[str, Any] = {}
    for name, options in FORMATS:
        model = copy.deepcopy(pretrained.model).to(device)
        models[name] = model if options is None else isotile.quantize_model(model, **options)
    plain = models[FORMATS[0][0]]
    truth = encoder.encode(plain, batches, torch_ops)
    nearest = (encoder.encode(plain, query_batches, torch_ops) @ truth.mT).argmax(1)
    times: dict[str, list[float]] = {name: [] for name in models}
    torch_times: list[float] = []
    embedded = {}
    for _ in range(rounds):
        torch_times.append(_timed(lambda: encoder.encode(plain, batches, torch_ops), device))
        for name, model in models.items():
            times[name].append(
                _timed(lambda m=model, n=name: embedded.update({n: encoder.encode(m, batches, OPS)}), device)
            )
            tick()
    rows = []
    whole = _weight_bytes(plain)
    for name, model in models.items():
        cosine = torch.nn.functional.cosine_similarity(embedded[name], truth, dim=-1)
        found = (encoder.encode(model, query_batches, OPS) @ embedded[name].mT).argmax(1)
        size = _weight_bytes(model)
        rows.append(
            Row(
                name,
                size / 1e6,
                whole / size,
                float(cosine.min()),
                float(cosine.mean()),
                int((found == nearest).sum()),
                1e3 * min(times[name]),
                statistics.median(t / u for t, u in zip(times[name], torch_times, strict=True)),
            )
        )
    return rows


def _timed(function, device: torch.device) -> float:
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start
