"""No speed without agreement: what a contender's results are held against before it is timed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch

from .. import dispatch, library
from ..precision import exact
from ..spec import growth
from ..testing.check import repeat_line
from ..testing.compare import Bound, Disagreement, bounds, compare, ulp
from ..testing.laws import Recorder
from . import rivals
from .contenders import Call, as_tuple
from .workloads import Inputs, Workload, flops_of


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How a contender's results compare.

    Attributes:
        ok: whether it may be timed.
        against: `"truth"` (the float64 reference), `"torch"` (PyTorch in float32, where the truth is too dear).
        share: isotile: the largest error as a share of the derived bound.
        relative: norm of the error over norm of the truth, the largest of the results.
        reason: why not, where `ok` is false.
    """

    ok: bool
    against: str
    share: float | None = None
    relative: float | None = None
    reason: str | None = None


#: A rival beyond this share of the norm computes something else (a wrong expression here, uninitialised results). Its
#: accuracy is not what isotile judges: PyTorch's bfloat16 gradient of a layer_norm over 4096 rows is 0.08 off on CPUs.
SAME_FUNCTION = {torch.float64: 1e-5, torch.float32: 1e-2, torch.bfloat16: 0.3, torch.float16: 0.3}


#: Where activations are rounded to eight bits, others do so with one scale for the tensor, or with a zero point.
OTHER_ROUNDING = 0.05


class Judge:
    """Truth and bounds of one workload, computed once and kept for all contenders."""

    def __init__(self, workload: Workload, inputs: Inputs) -> None:
        self.workload, self.inputs, self.spec = workload, inputs, workload.spec
        self.values = {n: v.detach() if isinstance(v, torch.Tensor) else v for n, v in inputs.call.values.items()}
        self.overload = inputs.overload()
        passes = 3.5 if workload.direction == "backward" else 1.0
        # A float64 reference holds some eight intermediates as large as operands and results (a byte of `packed` may be
        # two of them); attention's also one for every 2 (d + dv) operations: a quarter of a byte for each.
        elements = sum(t.numel() * (2 if n == "packed" else 1) for n, t in inputs.tensors().items())
        held = 64 * (elements + inputs.results_bytes() / workload.dtype.itemsize)
        self.second_product = self.spec.name.startswith("attention")
        if self.second_product:
            held += inputs.flops() / 4
        self.affordable = held * passes <= available_bytes() / 2

    @property
    def against(self) -> str:
        return "truth" if self.affordable else "torch"

    # --- forward ---------------------------------------------------------------------------------------------------

    @functools.cached_property
    def expected(self) -> dict[str, Bound]:
        """Truth and bound of each result, in the order of the results."""
        if self.affordable:
            return bounds(self.spec, self.overload, self.values)
        return self._expected_from_torch()

    def _expected_from_torch(self) -> dict[str, Bound]:
        """PyTorch in float32 in place of the truth, with a bound for sums of as many terms as there is work.

        Each result is taken for a sum of k products, flops = 2 k results. Products of independent signs make a sum
        of about sqrt(k) times a product's size, so the sum of magnitudes is about sqrt(k) times the result's rms;
        both sides may err by growth(k) units of it. Kernels of narrow dtypes also round an operand of a second product
        (attention's probabilities) to that dtype, once.
        """
        if "scheme" in self.values:  # PyTorch in float32 rounds neither activations nor dequantised weights
            raise Disagreement("the float64 truth does not fit into memory here, and nothing else rounds as it does")
        wide = {n: v.float() if _is_float(v) else v for n, v in self.values.items()}
        expression = rivals.torch_expression(self.spec.name, wide)
        if isinstance(expression, str):
            raise Disagreement(f"the float64 truth does not fit into memory here, and {expression}")
        function, operands = expression
        with torch.no_grad():
            found = as_tuple(function(*operands))
        dims = dispatch.bind_call(self.spec, self.values)
        outs = dispatch.out_specs(self.spec, self.overload, self.values, dims)
        names = [(n, o.dtype) for n, o in zip(self.spec.results, outs, strict=True) if o is not None]
        expected = {}
        for (name, dtype), result in zip(names, found, strict=False):
            value = result.double()
            terms = max(1, int(self.inputs.flops() / max(2 * value.numel(), 1)))
            rms = float(value.square().mean().sqrt())
            units = 2 * 2.0**-24 * growth(terms)
            if self.second_product:
                units += torch.finfo(self.workload.dtype).eps / 2
            allowed = 2 * ulp(value, dtype) + units * math.sqrt(terms) * rms
            expected[name] = Bound(value, allowed, dtype)
        return expected

    def forward(self, results: tuple[torch.Tensor, ...], ours: bool, backend: str) -> Agreement:
        names = [n for n in self.spec.results_of(self.overload) if n in self.expected]
        if ours:
            try:
                share = max(
                    (compare(n, r, self.expected[n]) for n, r in zip(names, results, strict=False) if r.numel()),
                    default=0.0,
                )
            except Disagreement as error:
                repeat = repeat_line(self.workload.recipe, backend)
                return Agreement(False, self.against, reason=f"{error}\n  repeat: {repeat}")
        else:
            share = None
        pairs = [(r, self.expected[n].truth) for n, r in zip(names, results, strict=False)]
        return self._normwise(pairs, ours, share)

    def _normwise(
        self, pairs: Sequence[tuple[torch.Tensor | None, torch.Tensor | None]], ours: bool, share: float | None
    ) -> Agreement:
        relative = max((relative_error(got, want) for got, want in pairs), default=0.0)
        limit = SAME_FUNCTION[self.workload.dtype]
        if str(self.values.get("scheme")).endswith("_dynamic"):
            limit = max(limit, OTHER_ROUNDING)
        if not ours and not relative <= limit:
            reason = f"differs from the {self.against} by {relative:.2g} of its norm, more than {limit:g}"
            return Agreement(False, self.against, relative=relative, reason=reason)
        return Agreement(True, self.against, share, relative)

    # --- backward --------------------------------------------------------------------------------------------------

    @functools.cached_property
    def upstream(self) -> list[torch.Tensor]:
        """A gradient for each result that has one."""
        dims = dispatch.bind_call(self.spec, self.values)
        outs = dispatch.out_specs(self.spec, self.overload, self.values, dims)
        generator = torch.Generator().manual_seed(1)
        kept = self.spec.results_of(self.overload)
        return [
            torch.randn(o.shape, generator=generator).to(o.dtype)
            for (n, r), o in zip(self.spec.results.items(), outs, strict=True)
            if o is not None and n in kept and r.differentiable
        ]

    @functools.cached_property
    def gradients(self) -> dict[str, torch.Tensor | None]:
        """The gradient of each differentiable argument: the float64 reference's, or float32 PyTorch's."""
        if self.affordable:
            return self._reference_gradients(self.values)
        wide = {n: v.float() if _is_float(v) else v for n, v in self.values.items()}
        leaves = {n: wide[n].requires_grad_() for n in self.inputs.differentiable()}
        expression = rivals.torch_expression(self.spec.name, wide)
        if isinstance(expression, str):
            raise Disagreement(f"the float64 truth does not fit into memory here, and {expression}")
        function, operands = expression
        return self._pull(as_tuple(function(*operands)), leaves)

    def _reference_gradients(self, values: dict[str, Any]) -> dict[str, torch.Tensor | None]:
        given = dict(values)
        leaves = {n: given[n].detach().clone().requires_grad_() for n in self.inputs.differentiable()}
        given.update(leaves)
        with exact(), torch.enable_grad():
            results = self.spec.reference(**given)
            return self._pull(tuple(results[n] for n in self.expected_names()), leaves)

    def expected_names(self) -> list[str]:
        kept = self.spec.results_of(self.overload)
        return [n for n, r in self.spec.results.items() if n in kept and r.differentiable]

    def _pull(
        self, results: tuple[torch.Tensor, ...], leaves: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor | None]:
        # The public function may return fewer results than the operator has (attention without its lse).
        outs = results[: self.returned]
        grads = [g.to(r.dtype) for g, r in zip(self.upstream, outs, strict=False)]
        found = torch.autograd.grad(outs, list(leaves.values()), grads, allow_unused=True)
        return {n: None if g is None else g.double() for n, g in zip(leaves, found, strict=True)}

    #: how many results the public function returns; set from the first forward call
    returned = 1

    @functools.cached_property
    def movement(self) -> dict[str, float]:
        """How far the gradients move, relative to their norms, when every input moves by a rounding error.

        At least 2^-13: what is checked with this is that the kernels are put together rightly; each kernel's own
        error has its derived bound.
        """
        generator = torch.Generator().manual_seed(2)
        step = max(torch.finfo(self.workload.dtype).eps, 2.0**-13)
        if not self.affordable:
            return dict.fromkeys(self.gradients, 4 * step)
        moved = dict(self.values)
        for name in self.inputs.differentiable():
            value = moved[name]
            sign = torch.randint(0, 2, value.shape, generator=generator) * 2 - 1
            moved[name] = (value * (1 + step * sign)).to(value.dtype)
        found = self._reference_gradients(moved)
        return {n: max(step, relative_error(g, self.gradients[n])) for n, g in found.items()}

    def backward(self, gradients: tuple[torch.Tensor | None, ...], pull: Call, ours: bool) -> Agreement:
        """The gradients that a contender gave; `pull` gives them again.

        isotile's are held twice: each kernel that the backward pass runs, under its own derived bound on the inputs
        that it got; and their composition, against the float64 gradient, within four times what rounding the inputs
        does to it.
        """
        share = None
        named = dict(zip(self.gradients, gradients, strict=True))
        for name, want in self.gradients.items():
            if (named[name] is None) != (want is None):
                return Agreement(False, self.against, reason=f"gradient of {name}: one of the two sides has none")
        if ours:
            try:
                share = self._kernels(pull) if self.affordable else None
            except Disagreement as error:
                return Agreement(False, self.against, reason=str(error))
            for name, want in self.gradients.items():
                if want is None:
                    continue
                distance, limit = relative_error(named[name], want), 4 * self.movement[name]
                if not distance <= limit:
                    reason = f"gradient of {name}: differs by {distance:.2g} of its norm, more than {limit:.2g}"
                    return Agreement(False, self.against, share, distance, reason)
        pairs = [(named[n], want) for n, want in self.gradients.items()]
        return self._normwise(pairs, ours, share)

    def _kernels(self, pull: Call) -> float | None:
        recorder = Recorder()
        with recorder:
            pull()
        shares = []
        for spec, overload, values, results in recorder.calls:
            expected = bounds(spec, overload, values)
            names = [n for n in spec.results_of(overload) if n in expected]
            present = [r for r, n in zip(results, spec.results_of(overload), strict=True) if n in expected]
            for name, result in zip(names, present, strict=True):
                try:
                    shares.append(compare(name, result, expected[name]))
                except Disagreement as error:
                    raise Disagreement(f"in the backward pass {spec.name} gave {error}") from None
        return max(shares) if shares else None


def backward_flops(pull: Call, forward: float) -> float:
    """Useful operations of a backward pass: those of the isotile operators that it runs.

    Twice the forward's where it runs none (the reference is differentiated): one product for each operand.
    """
    with Recorder() as recorder:
        pull()
    return sum(flops_of(spec, values) for spec, _, values, _ in recorder.calls) or 2 * forward


def backward_bytes(workload: Workload, inputs: Inputs, upstream: list[torch.Tensor]) -> int:
    """What a fused backward pass must move: what was saved, the upstream gradients, and the gradients."""
    op = library.operator(workload.spec.name)
    values = tuple(inputs.call.values[p] for p in op.parameters)
    with torch.no_grad():
        results = op.execute(inputs.overload(), values)
    saved = op.save(inputs.overload(), values, results)
    tensors = [t for t in saved.values() if isinstance(t, torch.Tensor)]
    tensors += upstream + [inputs.call.values[n] for n in inputs.differentiable()]
    return sum(t.numel() * t.element_size() for t in tensors)


def relative_error(got: torch.Tensor | None, want: torch.Tensor | None) -> float:
    """Norm of the difference over the norm of `want`; NaN where one of them has one, 0 where there are none."""
    if got is None or want is None:
        return 0.0 if got is want else math.inf
    got, want = got.detach().cpu().double(), want.double()
    if got.shape != want.shape:
        return math.inf
    size, error = float(want.norm()), float((got - want).norm())
    return 0.0 if error == 0 else error / size if size else math.inf


def available_bytes() -> int:
    """Memory that can be taken without swapping; 8 GiB where the system does not say."""
    try:
        with open("/proc/meminfo") as file:
            for line in file:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) << 10
    except OSError:
        pass
    return 8 << 30


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
