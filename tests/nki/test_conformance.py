"""The NKI kernels against the public API snapshot (`nki_emulator/api.json`), levels 0.6.0 and 0.7.0, and against the
Python subset of the parser front end. The emulator's own signatures are held to the same snapshot."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import pathlib
import re

import numpy as np
import pytest

from isotile import nki_emulator
from isotile.nki_emulator import NkiTensor, isa, language

_spec = importlib.util.spec_from_file_location("nki_adapter", pathlib.Path(__file__).parent / "adapter.py")
adapter = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(adapter)

API = json.loads((pathlib.Path(nki_emulator.__file__).parent / "api.json").read_text())
FUNCTIONS = {f["name"]: f for f in API["functions"]}
ROOT = pathlib.Path(__file__).parents[2] / "kernels" / "nki"
FILES = sorted(p for p in ROOT.glob("*.py") if p.name != "__init__.py")
ALIASES = {"nisa": "nki.isa", "nl": "nki.language", "nki": "nki"}
NAMES = {
    "nki.language": {d["name"] for d in API["dtypes"]} | {b["name"] for b in API["buffers"]} | {"tile_size"},
    "nki.isa": {e.rsplit(".", 1)[1] for e in API["enums"] if e.startswith("nki.isa")},
    "nki": {"jit", "simulate"},
}
for _table in ("alu", "activation"):
    NAMES["nki.language"] |= {row["op"] for row in API["op_tables"][_table]}


def parameters(function, level):
    """{name: required} of a function at an API level."""
    newer = function.get("version_0_7") or {}
    if level == "0.7.0" and newer.get("signature"):
        inside = re.search(r"\((.*)\)", newer["signature"]).group(1)
        found = {}
        for part in re.split(r",\s*(?![^<(]*[>)])", inside):
            name, _, default = part.strip().partition("=")
            if name and name != "*":
                found[name] = not default and not name.startswith("**")
        return found
    return {p["name"]: p["required"] for p in function["params"]}


def calls(tree):
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and isinstance(node.func.value, ast.Name)
        ):
            module = ALIASES.get(node.func.value.id)
            if module is not None:
                yield module, node.func.attr, node


@pytest.mark.parametrize("level", ["0.6.0", "0.7.0"])
@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_calls_are_public_api(path, level):
    for module, name, node in calls(ast.parse(path.read_text())):
        where = f"{path.name}:{node.lineno}: {module}.{name}"
        function = FUNCTIONS.get(f"{module}.{name}")
        assert function is not None, f"{where} is not in the API"
        assert function.get("since") != "0.7.0", f"{where} does not exist in 0.6.0"
        wanted = parameters(function, level)
        given = {k.arg for k in node.keywords}
        assert None not in given, f"{where} unpacks keywords"
        assert given <= set(wanted), f"{where}: {sorted(given - set(wanted))} at {level}"
        positional = list(wanted)[: len(node.args)]
        if module == "nki.isa" and not name.startswith("register"):
            assert not node.args, f"{where} passes by position"
        missing = {n for n, required in wanted.items() if required} - given - set(positional)
        assert not missing, f"{where} lacks {sorted(missing)}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_names_are_public_api(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Attribute):
            continue
        if isinstance(node.value, ast.Name) and node.value.id in ALIASES:
            module = ALIASES[node.value.id]
            known = node.attr in NAMES[module] or f"{module}.{node.attr}" in FUNCTIONS
            assert known, f"{path.name}:{node.lineno}: {module}.{node.attr}"
        enum = node.value
        if isinstance(enum, ast.Attribute) and isinstance(enum.value, ast.Name) and enum.value.id == "nisa":
            members = API["enums"].get(f"nki.isa.{enum.attr}")
            if members is not None:
                assert node.attr in members, f"{path.name}:{node.lineno}: nisa.{enum.attr}.{node.attr}"


def device_functions():
    """Functions that run at trace time: jitted ones and all they call, by name."""
    found = {}
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                found.setdefault(node.name, (path, node))
    jitted = [n for n, (_, f) in found.items() if any(ast.unparse(d).startswith("nki.jit") for d in f.decorator_list)]
    seen, queue = set(), list(jitted)
    while queue:
        name = queue.pop()
        if name in seen or name not in found:
            continue
        seen.add(name)
        for node in ast.walk(found[name][1]):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                queue += [node.func.id]
    assert jitted
    return {name: found[name] for name in seen}


_BARRED = (
    ast.Lambda, ast.GeneratorExp, ast.Try, ast.Yield, ast.YieldFrom, ast.Await, ast.Global, ast.Nonlocal, ast.ClassDef,
    ast.NamedExpr, ast.Starred, ast.Raise, ast.AsyncFunctionDef, ast.JoinedStr, ast.Import, ast.ImportFrom, ast.Delete,
    ast.DictComp, ast.SetComp, ast.ListComp, ast.Match,
)  # fmt: skip


def test_device_code_stays_in_the_parser_subset():
    for name, (path, function) in device_functions().items():
        for node in ast.walk(function):
            where = f"{path.name}:{getattr(node, 'lineno', 0)} in {name}"
            assert not isinstance(node, _BARRED), f"{where}: {type(node).__name__}"
            if isinstance(node, ast.arguments):
                assert node.vararg is None and node.kwarg is None and not node.kwonlyargs, f"{where}: * in a signature"
            if isinstance(node, ast.Compare):
                assert not any(isinstance(o, (ast.Is, ast.IsNot)) for o in node.ops), f"{where}: is"
            if isinstance(node, ast.Dict):
                assert all(isinstance(k, ast.Constant) and isinstance(k.value, str) for k in node.keys), (
                    f"{where}: keys"
                )


def test_operands_have_documented_buffers_and_dtypes(monkeypatch):
    """Run every kernel once and hold each tensor operand against the snapshot's operand table."""
    seen = set()

    def watch(name, function, entry):
        signature = inspect.signature(function)
        operands = entry["operands"] or {}

        def wrapper(*args, **kwargs):
            bound = signature.bind(*args, **kwargs).arguments
            seen.add(name)
            for operand, rule in operands.items():
                tensor = bound.get(operand)
                if not isinstance(tensor, NkiTensor):
                    continue
                buffers = rule.get("buffers")
                if isinstance(buffers, list):
                    buffer = "hbm" if not tensor.buffer.on_chip else tensor.buffer.value
                    assert buffer in buffers, f"{name}: {operand} in {buffer}, documented {buffers}"
                dtypes = rule.get("dtypes")
                if isinstance(dtypes, list):
                    names = {d.split(" ")[0] for d in dtypes}
                    assert tensor.dtype.name in names, f"{name}: {operand} is {tensor.dtype}, documented {names}"
            return function(*args, **kwargs)

        return wrapper

    for name, entry in FUNCTIONS.items():
        if name.startswith("nki.isa.") and inspect.isfunction(getattr(isa, name[8:], None)):
            monkeypatch.setattr(isa, name[8:], watch(name[8:], getattr(isa, name[8:]), entry))
    run_every_kernel("gen3", 1)
    assert {"nc_matmul", "activation", "range_select", "dma_transpose", "bn_aggr", "register_load"} <= seen


def run_every_kernel(target, cores):
    """Each kernel module on one small call, NumPy in and out."""
    import importlib

    import ml_dtypes

    def module(name):
        return importlib.import_module(f"isotile.kernels.nki.{name}")

    draw = np.random.default_rng(1)

    def x(*shape, dtype=ml_dtypes.bfloat16):
        return draw.standard_normal(shape).astype(dtype)

    flat = {
        "is_causal": 1, "scale": 0.2, "bottom_right": 1, "window_left": 40, "window_right": -1, "softcap": 5.0,
    }  # fmt: skip
    with nki_emulator.session(target):
        a, w = x(130, 600), x(600)
        module("layer_norm").run(a, w, w, a, eps=1e-5, cores=cores)
        module("rms_norm").run(a, w, None, eps=1e-5, weight_offset=1.0, cores=cores)
        every = {"grad_x": "bfloat16", "grad_weight": "bfloat16", "grad_bias": "bfloat16"}
        module("layer_norm_backward").run(a, a, a, w, eps=1e-5, outs=every, cores=cores)
        module("rms_norm_backward").run(a, None, a, w, eps=1e-5, outs={**every, "grad_bias": None}, cores=cores)
        y = module("softmax").run(a, outs={"y": "float32"}, cores=cores)["y"]
        module("softmax_backward").run(y, y, outs={"grad_x": "bfloat16"}, cores=cores)
        b = x(600, 70)
        for activation in range(7):
            outs = {"y": "bfloat16", "preactivation": "bfloat16"}
            made = module("matmul").run(a, b, x(70), x(130, 70), activation=activation, outs=outs, cores=cores)
            module("matmul_epilogue_backward").run(
                made["y"], made["preactivation"], activation=activation, outs={"grad_z": "bfloat16"}, cores=cores
            )
        ends = np.array([10, 10, 129], np.int32)
        module("grouped_matmul").run(a, x(3, 600, 70), ends, outs={"y": "bfloat16"}, cores=cores)
        both = {"grad_a": "bfloat16", "grad_b": "bfloat16"}
        module("grouped_matmul_backward").run(x(130, 70), a, x(3, 600, 70), ends, outs=both, cores=cores)
        q, k, v = x(2, 4, 150, 32), x(2, 2, 200, 32), x(2, 2, 200, 16)
        mask, slopes, sinks = x(2, 4, 150, 200, dtype=np.float32), x(4, dtype=np.float32), x(4, dtype=np.float32)
        lengths = np.array([200, 77], np.int32)
        found = module("attention").run(q, k, v, mask, sinks, slopes, lengths, **flat, cores=cores)
        outs = {"grad_attn_mask": "float32", "grad_sinks": "float32"}
        module("attention_backward").run(
            found["out"], found["lse"], q, k, v, mask, sinks, slopes, lengths, None, found["out"], found["lse"],
            **flat, outs=outs, cores=cores,
        )  # fmt: skip
        plain = {**flat, "softcap": 0.0, "window_left": -1}
        module("attention").run(q[:, :, :1], k, v, **plain, cores=cores)
        module("attention").run(q, k, v, **plain, cores=cores)


@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize("target", ["gen3", "gen4"])
def test_every_kernel_fits_on_chip(target, cores):
    run_every_kernel(target, cores)


def test_emulator_signatures_are_the_documented_ones():
    for name, entry in FUNCTIONS.items():
        module = {"nki.isa": isa, "nki.language": language}.get(name.rsplit(".", 1)[0])
        if module is None or entry["kind"] != "function" or entry.get("since") == "0.7.0":
            continue
        short = name.rsplit(".", 1)[1]
        found = getattr(module, short, None)
        assert found is not None, f"the emulator lacks {name}"
        if not inspect.isfunction(found) or short in ("divide", "fmod", "mod"):
            continue
        have = inspect.signature(found).parameters
        names = [n for n in have if not n.startswith("_")]
        documented = [p["name"] for p in entry["params"]]
        later = list(parameters(entry, "0.7.0"))
        assert names in (documented, later), f"{name}: {names}, documented {documented}"
        for parameter in entry["params"]:
            assert (have[parameter["name"]].default is inspect.Parameter.empty) == parameter["required"], (
                f"{name}({parameter['name']})"
            )


def test_enums_are_the_documented_ones():
    for name, members in API["enums"].items():
        if name.startswith("nki.isa."):
            found = getattr(isa, name.rsplit(".", 1)[1])
            assert {m.name: m.value for m in found} == members
