"""`isotile.record()`: which operators a program calls, on which shapes, dtypes, layouts and options."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import library, registry
from .spec import Case

KIND = "isotile calls"
#: Integer arguments up to this size (offsets, lengths, block tables) are kept with their values: they decide the work.
MAX_VALUES = 4096


class NotARecording(ValueError):
    """A file that is not a recording; the message says what is wrong."""


@dataclasses.dataclass
class Recorded:
    """One operator call as it was made, and how often.

    Attributes:
        tensors: for each tensor argument that was given: `shape`, `dtype`, `strides`, and small integers' `values`.
        scalars: the other arguments.
    """

    op: str
    overload: str
    tensors: dict[str, dict[str, Any]]
    scalars: dict[str, Any]
    count: int = 1

    def recipe(self) -> dict[str, Any]:
        """The recipe of `isotile.testing` that builds this call, with values drawn from the operator's domain."""
        from .testing.recipes import dtype_from_name, recipe_of_case

        spec = registry.spec(self.op)
        unknown = (set(self.tensors) | set(self.scalars)) - set(spec.args)
        if unknown:
            raise NotARecording(f"{self.op} has no argument {', '.join(sorted(unknown))}")
        args = {n: tuple(t["shape"]) for n, t in self.tensors.items()}
        scalars = {n: tuple(v) if isinstance(v, list) else v for n, v in self.scalars.items()}
        first = next(t for n in spec.tensors if (t := self.tensors.get(n)) is not None)
        recipe = recipe_of_case(spec, Case(self.op, "", args | scalars), dtype_from_name(first["dtype"]))
        recipe["overload"] = self.overload
        for name, tensor in self.tensors.items():
            recipe["tensors"][name] |= tensor
        return recipe

    def __str__(self) -> str:
        shapes = ", ".join(f"{n} {'x'.join(map(str, t['shape']))} {t['dtype']}" for n, t in self.tensors.items())
        return f"{self.op}({shapes})"


class Recording(TorchDispatchMode):
    """The calls that were made while it was in force, equal ones counted, in the order of their first."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: dict[str, Recorded] = {}

    @property
    def calls(self) -> list[Recorded]:
        return list(self._calls.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == library.NAMESPACE:
            self._note(func, args, kwargs or {})
        return func(*args, **(kwargs or {}))

    def _note(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        op, overload = library.operator(func._opname), func._overloadname
        given = {**op.defaults, **dict(zip(op.spec.parameters(overload), args, strict=False)), **kwargs}
        tensors, scalars = {}, {}
        for name, value in given.items():
            if isinstance(value, FakeTensor):  # torch.compile is tracing: the real call is still to come
                return
            if isinstance(value, torch.Tensor):
                tensors[name] = _described(value)
            elif name in op.spec.scalars and value is not None:
                scalars[name] = _plain(value)
        call = Recorded(op.spec.name, overload, tensors, scalars)
        known = self._calls.setdefault(json.dumps(dataclasses.asdict(call), sort_keys=True), call)
        if known is not call:
            known.count += 1

    def save(self, path: str | Path, **about: Any) -> None:
        """Write the calls as JSON, for `--cases FILE` of `isotile bench`, `verify` and `tune`."""
        import isotile

        head = {"kind": KIND, "version": 1, "isotile": isotile.__version__, "torch": torch.__version__, **about}
        body = {**head, "calls": [dataclasses.asdict(c) for c in self.calls]}
        Path(path).write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


@contextlib.contextmanager
def record(path: str | Path | None = None) -> Iterator[Recording]:
    """Records every isotile operator that runs inside, forward and backward; with `path`, saves them there at the end.

    Calls cost more while they are recorded. What `torch.compile` has compiled is recorded too.

    Yields:
        a `Recording`, whose `calls` can be read at any time.
    """
    recording = Recording()
    try:
        with recording:
            yield recording
    finally:
        if path is not None:
            recording.save(path)


def load(path: str | Path) -> list[Recorded]:
    """The calls of a recording.

    Raises:
        NotARecording: the file is none, with the reason.
    """
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise NotARecording(f"{path}: {error}") from None
    if not isinstance(body, dict) or body.get("kind") != KIND:
        raise NotARecording(f'{path}: wanted a recording, JSON with "kind": "{KIND}"')
    known = registry.specs()
    for call in body["calls"]:
        if call["op"] not in known:
            raise NotARecording(f"{path}: there is no operator {call['op']!r} here")
    return [Recorded(**call) for call in body["calls"]]


def _described(tensor: torch.Tensor) -> dict[str, Any]:
    found: dict[str, Any] = {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "strides": list(tensor.stride()),
    }
    if tensor.dtype in (torch.int32, torch.int64) and tensor.numel() <= MAX_VALUES:
        found["values"] = tensor.tolist()
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    return list(value) if isinstance(value, tuple | list) else value
