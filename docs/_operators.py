"""A page for each operator, from its spec, its kernels' refusals and the newest kept benchmark run."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import isotile
from isotile import dispatch, registry
from isotile.__main__ import kernel_of
from isotile.backends import BACKENDS
from isotile.bench import readme, records
from isotile.spec import FLOATS, OpSpec
from isotile.state import CURRENT
from isotile.testing.draws import Seeded
from isotile.testing.recipes import build, draw_recipe, dtype_name

SECTIONS = ("Args", "Returns", "Raises")
#: drawn calls of each dtype that every backend is asked whether it would take
DRAWS = 12


def write(folder: Path, results: Path) -> None:
    """Write `<op>.md` for every public operator and `index.md`; unchanged files keep their time."""
    folder.mkdir(exist_ok=True)
    runs = sorted(results.glob("*.jsonl"), reverse=True)  # their names begin with the date
    names = [n for n, s in registry.specs().items() if not s.internal]
    pages = {f"{n}.md": page(registry.spec(n), runs) for n in names} | {"index.md": index(names)}
    for name, text in pages.items():
        path = folder / name
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
    for path in folder.glob("*.md"):
        if path.name not in pages:
            path.unlink()


def index(names: list[str]) -> str:
    lines = ["# Operators", "", "Made from the specs. Every function also works under autograd, `torch.compile`, "]
    lines += ["`torch.export`, autocast and `torch.vmap`, and takes `out=`.", "", "| function | what it computes |"]
    lines.append("| --- | --- |")
    for name in names:
        first = (inspect.getdoc(getattr(isotile, name)) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"| [`isotile.{name}`]({name}.md) | {_escaped(first)} |")
    return "\n".join([*lines, "", "```{toctree}", ":hidden:", "", *names, "```", ""])


def page(spec: OpSpec, runs: list[Path]) -> str:
    door = getattr(isotile, spec.name)
    text, sections = _docstring(inspect.getdoc(door) or "")
    lines = [f"# isotile.{spec.name}", "", "```py", *_signature(spec.name, door), "```", "", text, ""]
    for title, body in sections.items():
        lines += [f"## {TITLES[title]}", "", *_definitions(body), ""]
    lines += ["## Shapes and dtypes", "", *_tensors(spec), ""]
    lines += ["## Backends", "", *_backends(spec), ""]
    lines += ["## Promises", "", *_promises(spec), ""]
    lines += ["## Measured speed", "", *_speed(spec.name, runs), ""]
    return "\n".join(lines)


TITLES = {"Args": "Arguments", "Returns": "Returns", "Raises": "Raises"}


def _escaped(text: str) -> str:
    """Text of a docstring as Markdown: outside of code, what Markdown would take for markup is spelled out."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(p if p.startswith("`") else re.sub(r"([*_<>\[\]|$])", r"\\\1", p) for p in parts)


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """(what stands before the sections, the sections by title) of a Google-style docstring."""
    pieces = re.split(rf"^({'|'.join(SECTIONS)}):$", text, flags=re.M)
    sections = {title: inspect.cleandoc(body) for title, body in zip(pieces[1::2], pieces[2::2], strict=True)}
    return "\n\n".join(_escaped(p) for p in pieces[0].strip().split("\n\n")), sections


def _definitions(body: str) -> list[str]:
    lines = []
    for item in re.split(r"\n(?=[\w, ]+:)", body):
        name, _, said = item.partition(":")
        words = " ".join(said.split())
        lines += [f"`{name.strip()}`", f": {_escaped(words)}", ""]
    return lines


def _signature(name: str, door: Callable[..., Any]) -> list[str]:
    parameters = list(inspect.signature(door).parameters.values())
    words = [str(p) for p in parameters]
    words.insert(next(i for i, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), "*")
    lines, line = [], f"isotile.{name}("
    for i, word in enumerate(words):
        piece = word + (")" if i == len(words) - 1 else ", ")
        if len(line) + len(piece) > 88:
            lines.append(line.rstrip())
            line = "    "
        line += piece
    return [*lines, line]


def _tensors(spec: OpSpec) -> list[str]:
    lines = ["| argument | shape | dtypes | gradient |", "| --- | --- | --- | --- |"]
    for name, arg in spec.tensors.items():
        if name == "dropout_seed":  # the public function draws its own
            continue
        dtypes = f"`{arg.same_as}`'s" if arg.same_as else ", ".join(dtype_name(d) for d in arg.dtypes)
        shape = f"`{arg.dims}`" + (", broadcast" if arg.broadcast else "")
        optional = " (optional)" if arg.optional else ""
        lines.append(f"| `{name}`{optional} | {shape} | {dtypes} | {'yes' if arg.differentiable else 'no'} |")
    return [*lines, "", "`...` are leading dimensions, `*n` one or more treated as one, `m?` one that may be lacking."]


def _backends(spec: OpSpec) -> list[str]:
    lines = ["| backend | dtypes | calls that it refuses, in its own words |", "| --- | --- | --- |"]
    refused = refusals(spec)
    for name, backend in BACKENDS.items():
        dtypes = ", ".join(dtype_name(d) for d in backend.dtypes(kernel_of(spec))) or "—"
        said = "<br>".join(_escaped(r) for r in refused[name]) or "none of the drawn ones"
        lines.append(f"| `{name}` | {dtypes} | {said} |")
    asked = DRAWS * len(FLOATS)
    return [*lines, "", f"Asked about {asked} calls drawn from the spec. `isotile.explain` tells for any call."]


def refusals(spec: OpSpec) -> dict[str, list[str]]:
    """For each backend the different sentences with which it refuses drawn calls, numbers aside."""
    found: dict[str, dict[str, str]] = {name: {} for name in BACKENDS}
    for name, backend in BACKENDS.items():
        with isotile.use_backend(name):
            backend.unavailable("cpu")  # puts an emulator in place, where that is what there is
    for dtype in FLOATS:
        for seed in range(DRAWS):
            call = build(draw_recipe(Seeded(seed), spec, dtype, ("normal",)))
            request, _ = dispatch.make_request(spec, call.overload, call.values, None, CURRENT.get())
            for name, backend in BACKENDS.items():
                reason = backend.refuses(request)
                if reason is not None:
                    found[name].setdefault(re.sub(r"[\d\[\], ]+", "N", reason), reason)
    return {name: list(reasons.values()) for name, reasons in found.items()}


def _promises(spec: OpSpec) -> list[str]:
    said = {law: law.replace("_", " ") for law in spec.laws}
    gradient = "a formula of its own" if spec.backward else "the reference, differentiated"
    return [
        "Within a bound derived from the arithmetic around the float64 reference, on every backend: see "
        "[numerics](../numerics.md).",
        "",
        f"* Gradient: {gradient}. Autocast: {AUTOCAST[spec.autocast]}.",
        *(f"* Tested law: {words}." for words in said.values()),
    ]


AUTOCAST = {"lower": "casts to its dtype", "float32": "casts to float32", None: "leaves dtypes alone"}


def _speed(op: str, runs: list[Path]) -> list[str]:
    """The newest kept run's rows of the operator."""
    for run in runs:
        about, rows, _ = records.read(run)
        table = readme.operator(about, rows, op)
        if table:
            return [table, "", f"`isotile bench {op}` measures it on your machine; [how](../benchmarking.md)."]
    return [f"No run is kept. `isotile bench {op}` measures it on your machine; [how](../benchmarking.md)."]
