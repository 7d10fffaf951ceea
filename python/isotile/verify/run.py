"""The verification itself: one example after another on every backend, into claims."""

from __future__ import annotations

import collections
import itertools
import math
from typing import Any

import torch

from ..errors import BackendError
from ..testing.check import promises_integers, repeat_line
from ..testing.compare import Bound, Disagreement, compare
from ..testing.laws import LAWS, Inapplicable, Subject, difference, same_bits
from ..testing.recipes import DERIVED, Call, build, dtype_name
from . import figures, plan
from .claims import Ledger
from .plan import Target, coverage
from .subjects import Backend

#: Of the laws that cost runs of their own, each example checks one in this many.
TURNS = 3


class Verifier:
    """Runs examples and keeps what they show.

    Args:
        backends: under test, in order.
        seed: of all draws.
        samples: elements of each result that are written down for comparison with other machines.
    """

    def __init__(self, backends: list[Backend], seed: int, samples: int) -> None:
        self.backends, self.seed, self.samples = backends, seed, samples
        self.ledger = Ledger()
        self.errors: dict[tuple[str, str, str], figures.Errors] = {}
        self.examples: list[dict[str, Any]] = []
        self.coverage: dict[str, dict[str, collections.Counter[str]]] = {}

    def example(self, target: Target, index: int) -> None:
        """Verifies one drawn recipe."""
        op, dtype = target.key
        self.declare(target)
        recipe = target.recipe(self.seed, index)
        name = f"{op}/{dtype}/{index}"
        call = build(recipe)
        subjects = [Subject(recipe, b.name, b.device) for b in self.backends]
        expected = subjects[0].bounds()
        record: dict[str, Any] = {
            "id": name,
            "recipe": plan.digest(recipe),
            "inputs": _inputs(call, derived=False),
            "derived": _inputs(call, derived=True),
            "exact": promises_integers(call.spec, recipe),
            "results": {n: self._sampled(name, n, b) for n, b in expected.items()},
            "outputs": {},
        }
        made: dict[str, dict[str, torch.Tensor]] = {}
        for backend, subject in zip(self.backends, subjects, strict=True):
            subject.expected = expected
            results = self._results(target, subject, name)
            if results is None:
                continue
            made[backend.name] = results
            record["outputs"][backend.name] = {
                n: {
                    "digest": figures.digest(r),
                    "sample": figures.spell(r, record["results"][n]["at"]),
                }
                for n, r in results.items()
            }
            self._laws(target, subject, name, index, record)
        for a, b in itertools.combinations(made, 2):
            self._pair(target, recipe, name, expected, (a, made[a]), (b, made[b]))
        if record["outputs"]:
            self.examples.append(record)
            for option, values in coverage(recipe).items():
                counts = self.coverage.setdefault(op, {}).setdefault(option, collections.Counter())
                counts.update(values)

    def declare(self, target: Target) -> None:
        """Every claim that will be tried of a target, so that one which never ran is in the report."""
        op, dtype = target.key
        spec = target.spec
        claims = ["agreement", "memory"]
        claims += ["nonfinite"] if spec.nonfinite else []
        claims += ["exact_integers"] if "exact_on_integers" in spec.laws else []
        for backend in self.backends:
            for claim in (*claims, *_laws_of(target, backend.name)):
                self.ledger(op, dtype, backend.name, claim)
        for a, b in itertools.combinations(self.backends, 2):
            self.ledger(op, dtype, f"{a.name}|{b.name}", "pair")

    # --- one backend -----------------------------------------------------------------------------------------------

    def _results(self, target: Target, subject: Subject, name: str) -> dict[str, torch.Tensor] | None:
        """The results of a call, judged; None where there are none."""
        op, dtype = target.key
        recipe, spec = subject.recipe, subject.spec
        repeat = repeat_line(recipe, subject.backend, subject.device)
        short = repeat_line(target.repeatable(self.seed, _index(name)), subject.backend, subject.device)
        special = recipe["kind"] == "specials"
        agreement = self.ledger(op, dtype, subject.backend, "nonfinite" if special else "agreement")
        memory = self.ledger(op, dtype, subject.backend, "memory")
        try:
            results = subject.guarded()
        except BackendError as refusal:
            agreement.refusals[_words(refusal)] += 1
            memory.refusals[_words(refusal)] += 1
            return None
        except Disagreement as error:
            memory.broke(name, str(error), repeat)
            return None
        except Exception as error:  # a kernel that raises is a finding, in its own words
            agreement.broke(name, f"raised {type(error).__name__}: {error}", repeat)
            return None
        memory.held(name)
        worst, units = 0.0, 0.0
        errors = self.errors.setdefault((op, dtype, subject.backend), figures.Errors())
        try:
            for result, bound in zip(results.values(), subject.bounds().values(), strict=True):
                if not special:
                    units = max(units, errors.add(result, bound))
            for n, bound in subject.bounds().items():
                worst = max(worst, compare(n, results[n], bound))
            agreement.held(name, worst, short, ulps=units)
        except Disagreement as error:
            agreement.broke(name, str(error), repeat)
        if promises_integers(spec, recipe):
            exact = self.ledger(op, dtype, subject.backend, "exact_integers")
            for n, bound in subject.bounds().items():
                if not torch.equal(results[n].cpu(), bound.truth.to(results[n].dtype)):
                    exact.broke(name, f"{n}: small integers must give the exact product", repeat)
                    break
            else:
                exact.held(name)
        return results

    def _laws(self, target: Target, subject: Subject, name: str, index: int, record: dict[str, Any]) -> None:
        op, dtype = target.key
        turn = index + index // len(target.demands)
        for place, law in enumerate(_laws_of(target, subject.backend)):
            if (place + turn) % TURNS:
                continue
            claim = self.ledger(op, dtype, subject.backend, law)
            repeat = repeat_line(subject.recipe, subject.backend, subject.device, law)
            short = repeat_line(target.repeatable(self.seed, index), subject.backend, subject.device, law)
            try:
                found = LAWS[law].check(subject)
            except Inapplicable as why:
                claim.inapplicable[str(why)] += 1
            except BackendError as refusal:
                claim.refusals[_words(refusal)] += 1
            except Disagreement as error:
                claim.broke(name, str(error), repeat)
            except Exception as error:  # as above: the finding is that it raises
                claim.broke(name, f"raised {type(error).__name__}: {error}", repeat)
            else:
                if isinstance(found, torch.Tensor):
                    record["outputs"][subject.backend][law] = {"digest": figures.digest(found), "sample": ""}
                    found = None
                claim.held(name, found, short)

    # --- two backends ----------------------------------------------------------------------------------------------

    def _pair(
        self,
        target: Target,
        recipe: dict[str, Any],
        name: str,
        expected: dict[str, Bound],
        one: tuple[str, dict[str, torch.Tensor]],
        other: tuple[str, dict[str, torch.Tensor]],
    ) -> None:
        (a, ours), (b, theirs) = one, other
        claim = self.ledger(*target.key, f"{a}|{b}", "pair")
        repeat = repeat_line(recipe, a)
        equal = all(same_bits(figures.canonical(ours[n]), figures.canonical(theirs[n])) for n in expected)
        try:
            share = max((difference(n, ours[n], theirs[n], bound) for n, bound in expected.items()), default=0.0)
            if promises_integers(target.spec, recipe) and not equal:
                raise Disagreement("small integers must give equal bits on both")
        except Disagreement as error:
            claim.broke(name, str(error), repeat)
        else:
            claim.held(name, share, repeat_line(f"{self.seed}/{name}", a))
        claim.counted_same_bits(equal)

    def _sampled(self, example: str, result: str, bound: Bound) -> dict[str, Any]:
        at = figures.positions(example, result, self.seed, bound.truth.numel(), self.samples)
        allowed = bound.allowed.flatten()[at].tolist()
        return {
            "dtype": dtype_name(bound.dtype),
            "shape": list(bound.truth.shape),
            "at": at,
            # Rounded up, so that a comparison of other machines is not stricter than the bound.
            "allowed": [float(f"{1.001 * v:.4g}") if v < math.inf else str(v) for v in allowed],
        }

    def records(self) -> dict[str, Any]:
        """What goes into the report."""
        return {
            "claims": self.ledger.records(),
            "errors": [
                {"op": op, "dtype": dtype, "backend": backend, **errors.record()}
                for (op, dtype, backend), errors in sorted(self.errors.items())
            ],
            "coverage": {
                op: {o: dict(sorted(c.items())) for o, c in sorted(options.items())}
                for op, options in sorted(self.coverage.items())
            },
            "examples": self.examples,
        }


def _laws_of(target: Target, backend: str) -> list[str]:
    return [n for n, law in LAWS.items() if law.applies(target.spec) and law.where(backend, target.key[1])]


def _inputs(call: Call, derived: bool) -> str | None:
    """A digest of the drawn inputs, or of those made of them, whose last bit float64 arithmetic may decide."""
    made = DERIVED.get(call.spec.name, ())
    chosen = [call.values[n] for n in call.spec.tensors if (n in made) == derived]
    return figures.digest(*chosen) if chosen else None


def _index(name: str) -> int:
    """Of an example op/dtype/index."""
    return int(name.rpartition("/")[2])


def _words(error: BackendError) -> str:
    """A refusal without the sizes of the one call, so that equal reasons count together."""
    return str(error).split(": ", 2)[-1]
