"""What is verified: operators, dtypes, and the recipes that a seed draws, the same on every machine."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import zlib
from pathlib import Path
from typing import Any

import torch

from .. import ops, registry, spec, testing
from ..record import NotARecording, load
from ..spec import FLOATS, OpSpec
from ..testing.draws import Seeded
from ..testing.recipes import KINDS, draw_recipe, dtype_name, kinds_of, samples_of

DTYPES = {dtype_name(d): d for d in FLOATS}


@dataclasses.dataclass(frozen=True)
class Target:
    """One operator in one dtype."""

    spec: OpSpec
    dtype: torch.dtype

    @property
    def key(self) -> tuple[str, str]:
        return self.spec.name, dtype_name(self.dtype)

    def recipe(self, seed: int, index: int) -> dict[str, Any]:
        """Example `index`. The examples go through the values of every option; the rest the seed decides."""
        wanted = self.demands[index % len(self.demands)]
        source = Seeded(seed, *(zlib.crc32(word.encode()) for word in self.key), index)
        return draw_recipe(source, self.spec, self.dtype, wanted=wanted)

    def repeatable(self, seed: int, index: int) -> str | dict[str, Any]:
        """What `python -m isotile.testing` repeats example `index` from: its name."""
        return f"{seed}/{'/'.join(self.key)}/{index}"

    @property
    def demands(self) -> list[dict[str, Any]]:
        """Each value of each option, one at a time."""
        options: dict[str, list[Any]] = {"kind": list(kinds_of(self.spec))}
        for name, scalar in self.spec.scalars.items():
            if scalar.star is None and name != "dim":
                options[name] = list(samples_of(scalar))
        for name, arg in self.spec.tensors.items():
            if arg.optional:
                options[name] = [True, False]
        # Option after option, so that few examples are spread over many options.
        columns = [[{name: value} for value in values] for name, values in options.items()]
        found = [d for row in itertools.zip_longest(*columns) for d in row if d is not None]
        if "exact_on_integers" in self.spec.laws:  # what is promised of them is promised without an activation
            found.insert(1, {"kind": "integers", **({"activation": None} if "activation" in options else {})})
        return found


@dataclasses.dataclass(frozen=True)
class RecordedTarget(Target):
    """The recorded calls of one operator in one dtype: their shapes, strides and options, with drawn values."""

    recipes: tuple[dict[str, Any], ...] = ()

    def recipe(self, seed: int, index: int) -> dict[str, Any]:
        """Call after call, then the same with other kinds of values."""
        again, which = divmod(index, len(self.recipes))
        kinds = kinds_of(self.spec)
        drawn = zlib.crc32(f"{seed}/{index}".encode()) >> 1
        return self.recipes[which] | {"seed": drawn, "kind": kinds[again % len(kinds)]}

    def repeatable(self, seed: int, index: int) -> dict[str, Any]:
        return self.recipe(seed, index)

    @property
    def demands(self) -> list[dict[str, Any]]:
        return list(self.recipes)


def recorded(path: Path, names: list[str], dtypes: list[str]) -> list[Target]:
    """The targets of a recording of `isotile.record`.

    Raises:
        NotARecording: the file is none, or holds no call of these operators and dtypes.
    """
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for call in load(path):
        recipe = call.recipe()
        if (not names or call.op in names) and recipe["dtype"] in dtypes:
            found.setdefault((call.op, recipe["dtype"]), []).append(recipe)
    if not found:
        raise NotARecording(f"{path}: it holds no call of the chosen operators and dtypes")
    return [RecordedTarget(registry.spec(op), DTYPES[d], tuple(recipes)) for (op, d), recipes in found.items()]


def targets(names: list[str], dtypes: list[str]) -> list[Target]:
    """Operators x dtypes; all operators, backward ones too, if no name is given.

    Raises:
        KeyError: an operator that there is not.
    """
    chosen = [registry.spec(n) for n in dict.fromkeys(names)] or list(registry.specs().values())
    return [Target(s, DTYPES[d]) for s in chosen for d in DTYPES if d in dtypes]


def named(name: str) -> dict[str, Any]:
    """The recipe of an example by its name: seed/operator/dtype/index.

    Raises:
        ValueError: it is no such name.
    """
    try:
        seed, op, dtype, index = name.split("/")
        return Target(registry.spec(op), DTYPES[dtype]).recipe(int(seed), int(index))
    except (ValueError, KeyError) as error:
        raise ValueError(f"{name!r} is no seed/operator/dtype/index: {error}") from None


def digest(value: Any) -> str:
    """SHA-256 over canonical JSON, 64 bits of it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]


def coverage(recipe: dict[str, Any]) -> dict[str, list[str]]:
    """Which option values a recipe exercises, by option."""
    seen = {n: [_spell(v)] for n, v in recipe["scalars"].items()}
    seen["value kind"] = [recipe["kind"]]
    seen["overload"] = [recipe["overload"]]
    seen["layout of inputs"] = sorted({t["layout"] for t in recipe["tensors"].values()})
    seen["layout of results"] = [recipe["out"]]
    spec = registry.spec(recipe["op"])
    for name, arg in spec.tensors.items():
        if arg.optional:
            seen[name] = ["given" if name in recipe["tensors"] else "absent"]
    return seen


def _spell(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def definition() -> str:
    """A digest of everything that decides what is drawn, what it should give and how far off it may be.

    Reports are comparable if they agree in it: the operators' specs and references, and the code that draws,
    computes bounds and compares.
    """
    package = Path(spec.__file__).parent
    files = [
        *Path(ops.__file__).parent.glob("*.py"),
        *Path(testing.__file__).parent.glob("*.py"),
        *(package / name for name in ("spec.py", "shapes.py", "precision.py", "verify/plan.py")),
    ]
    found = hashlib.sha256(json.dumps([*DTYPES, *KINDS]).encode())
    for path in sorted(files, key=lambda p: p.relative_to(package).as_posix()):
        found.update(path.relative_to(package).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()
