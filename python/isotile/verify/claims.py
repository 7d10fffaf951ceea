"""What is claimed of each operator, dtype and backend, and what became of each claim."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any

HOLDS, FAILS, NOT_RUN = "holds", "fails", "not run"

#: id -> (title, what is claimed)
CLAIMS: dict[str, tuple[str, str]] = {
    "agreement": (
        "agrees with the truth",
        "Every element is within its derived bound of the float64 reference on the same rounded inputs.",
    ),
    "memory": (
        "writes its results only",
        "Every element of a result is written, nothing beside it, also through strided out=; no input is changed.",
    ),
    "nonfinite": (
        "NaN and infinity",
        "With NaN and infinities among the inputs, results are NaN and infinite exactly where the reference's are.",
    ),
    "exact_integers": (
        "exact on integers",
        "Small integers, whose sums the accumulator holds exactly, give the exact product, bit for bit.",
    ),
    "layout": (
        "independent of layout",
        "Strided, transposed, expanded and offset inputs give what contiguous copies give, within both bounds.",
    ),
    "deterministic": ("repeats its bits", "Inside isotile.determinism() a second run gives the same bits."),
    "thread_invariant": (
        "independent of threads",
        "Inside isotile.determinism() another number of CPU threads gives the same bits.",
    ),
    "batch_invariant": (
        "independent of the batch",
        "Inside isotile.determinism(batch_invariant=True) an entry of a batch has the bits of that entry alone.",
    ),
    "hidden_keys": ("hidden keys do not matter", "Keys and values that no query may see may hold NaN without effect."),
    "dropout_mask": ("dropout's mask", "What attention drops is what Philox-4x32-10 says of the seed, bit for bit."),
    "gradients": (
        "gradients",
        "Every kernel that the backward pass runs is within its derived bound on the inputs that it got.",
    ),
    "gradient_formula": (
        "gradient formula",
        "In float64 the backward pass is the derivative of the reference, to nine digits.",
    ),
    "pair": (
        "backends agree with each other",
        "Both results are within the sum of both bounds of each other, with equal bits where those are promised.",
    ),
}

#: Failing examples that a claim keeps.
KEPT = 3


@dataclasses.dataclass
class Claim:
    """One claim about one operator in one dtype on one backend (or a pair of them, `"cpu|nki"`)."""

    op: str
    dtype: str
    backend: str
    claim: str
    examples: int = 0
    failed: int = 0
    worst: dict[str, Any] | None = None
    failures: list[dict[str, str]] = dataclasses.field(default_factory=list)
    refusals: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    inapplicable: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    same_bits: int | None = None

    def held(self, example: str, share: float | None = None, repeat: str = "", **more: float) -> None:
        """One example held; `share` of what was allowed was used."""
        self.examples += 1
        if share is not None and (self.worst is None or share > self.worst["share"]):
            rounded = {n: float(f"{v:.6g}") for n, v in {"share": share, **more}.items()}
            self.worst = {**rounded, "example": example, "repeat": repeat}

    def broke(self, example: str, message: str, repeat: str) -> None:
        self.examples += 1
        self.failed += 1
        if len(self.failures) < KEPT:
            self.failures.append({"example": example, "message": message, "repeat": repeat})

    def counted_same_bits(self, same: bool) -> None:
        self.same_bits = (self.same_bits or 0) + same

    @property
    def verdict(self) -> str:
        return FAILS if self.failed else HOLDS if self.examples else NOT_RUN

    @property
    def reason(self) -> str | None:
        """Why the claim was not run, or what was left out of it."""
        said = []
        if self.refusals:
            said.append(f"refused {sum(self.refusals.values())} calls: {'; '.join(self.refusals)}")
        if self.verdict == NOT_RUN and self.inapplicable:
            said.append("; ".join(self.inapplicable))
        if self.verdict == NOT_RUN and not said:
            said.append("no example came to it")
        return "; ".join(said) or None

    def record(self) -> dict[str, Any]:
        """As the report has it; what is empty is left out."""
        always = {
            "op": self.op,
            "dtype": self.dtype,
            "backend": self.backend,
            "claim": self.claim,
            "verdict": self.verdict,
            "examples": self.examples,
        }
        some = {
            "reason": self.reason,
            "failed": self.failed,
            "refused": sum(self.refusals.values()),
            "worst": self.worst,
            "failures": self.failures,
        }
        found = {**always, **{n: v for n, v in some.items() if v}}
        return found if self.same_bits is None else {**found, "same_bits": self.same_bits}


class Ledger:
    """All claims of a run, made at their first mention."""

    def __init__(self) -> None:
        self.claims: dict[tuple[str, str, str, str], Claim] = {}

    def __call__(self, op: str, dtype: str, backend: str, claim: str) -> Claim:
        key = (op, dtype, backend, claim)
        if key not in self.claims:
            self.claims[key] = Claim(*key)
        return self.claims[key]

    def records(self) -> list[dict[str, Any]]:
        order = list(CLAIMS)
        return [c.record() for _, c in sorted(self.claims.items(), key=lambda kc: (*kc[0][:3], order.index(kc[0][3])))]
