"""Rows of the NKI backend where there is no Neuron hardware: what the cost model says, and no measured figure."""

from __future__ import annotations

from typing import Any

import torch

from ..backends import BACKENDS
from ..backends.nki import modelling
from ..errors import BackendError
from .agreement import backward_bytes
from .contenders import Contender, Ours, Prepared, Unserved, as_tuple
from .table import seconds
from .workloads import Inputs, Workload


class Modelled(Ours):
    """isotile on the emulated chip: traced, neither computed nor timed."""

    modelled = True


def ours(name: str, constant_weights: bool = False) -> Contender:
    """A backend as a contender."""
    return Modelled(name) if name == "nki" else Ours(name, constant_weights)


def row(contender: Contender, workload: Workload) -> dict[str, Any]:
    """One row of status "modelled": `modelled` holds the figures, `median_s` and its like are absent."""
    backward = workload.direction == "backward"
    inputs = Inputs(workload, 0, needs_grad=backward)
    flops, moved = inputs.flops(), float(inputs.bytes + inputs.results_bytes())
    found: dict[str, Any] = {
        "kind": "row", "op": workload.spec.name, "case": workload.case.name, "dtype": workload.key[2],
        "direction": workload.direction, "contender": contender.name, "ours": True, "threads": 1,
        "shapes": workload.shapes(), "cold": False, "copies": 1, "flops": flops, "bytes": moved,
    }  # fmt: skip
    try:
        runs, upstream = _trace(contender, workload, inputs)
    except (Unserved, BackendError) as error:
        return found | {"status": "unserved", "reason": str(error)}
    from ..nki_emulator import cost

    if backward:
        found["flops"], found["bytes"] = 2 * flops, float(backward_bytes(workload, inputs, upstream))
    figures = cost.summary(runs)
    figures |= cost.shares(figures, found["flops"], found["bytes"])
    return found | {"status": "modelled", "reason": _sentence(figures), "modelled": figures}


def _trace(contender: Contender, workload: Workload, inputs: Inputs) -> tuple[list[Any], list[torch.Tensor]]:
    info = BACKENDS[contender.name].info()
    if info.get("runs_in") != "bundled emulator":
        raise Unserved(f"the cost model reads the bundled emulator's trace; kernels run in {info.get('runs_in')}")
    backward = workload.direction == "backward"
    upstream: list[torch.Tensor] = []
    with contender.context(), torch.set_grad_enabled(backward), modelling() as runs:
        prepared = Prepared(contender, workload, inputs)
        results = as_tuple(prepared.forwards[0]())
        if backward:
            upstream = [torch.zeros_like(r) for r in results if r.requires_grad]
            leaves = [inputs.sets[0][n] for n in prepared.wanted]
            runs.clear()
            torch.autograd.grad([r for r in results if r.requires_grad], leaves, upstream, allow_unused=True)
        return [reports for launch in runs for reports in launch], upstream


def _sentence(figures: dict[str, Any]) -> str:
    cores = "one core" if figures["cores"] == 1 else f"{figures['cores']} cores"
    return (
        f"{seconds(figures['overlapped_s'])} on {cores} of gen{figures['generation']} if the engines overlap perfectly "
        f"({figures['critical']} busiest), {seconds(figures['serial_s'])} if not at all; "
        f"{figures['tensor_share']:.0%} of the Tensor engine, {figures['hbm_share']:.0%} of HBM. Not measured"
    )
