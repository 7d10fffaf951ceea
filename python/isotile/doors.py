"""The public functions, made from the specs.

A door is compiled from a template for each operator: it takes the operator's short way (`fast_path`) where that is
open, else the long one.
"""

from __future__ import annotations

import functools
import inspect
import linecache
from collections.abc import Callable
from typing import Any

import torch

from . import dispatch, fast_path, library, registry
from .library import Operator


def _refuse_out(name: str) -> None:
    raise ValueError(
        f"isotile.{name}: out: wanted no gradient to be needed (call it under torch.no_grad()), "
        "got an input with requires_grad=True"
    )


def _slow(op: Operator, overload: str, values: tuple[Any, ...], out: Any, pick: tuple[str, ...] | None = None) -> Any:
    """Every call that is not plain: with `out=`, under a mode, or wrong. `pick` names the results to return."""
    names = tuple(op.spec.results_of(overload))
    pick = pick or names
    if out is None:
        results = op.route(overload, values)
        chosen = [results[names.index(n)] for n in pick]
        return tuple(chosen) if len(chosen) > 1 else chosen[0]
    outs = tuple(out) if isinstance(out, tuple | list) else (out,)
    tensors = [values[i] for i in op.tensor_positions]
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in (*tensors, *outs)):
        _refuse_out(op.spec.name)
    if len(outs) != len(pick):
        plural = "" if len(pick) == 1 else "s"
        raise ValueError(
            f"isotile.{op.spec.name}: out: wanted {len(pick)} tensor{plural} ({', '.join(pick)}), got {len(outs)}"
        )
    lazy = any(isinstance(t, torch.Tensor) and t.is_neg() for t in tensors)
    if torch.compiler.is_compiling() or fast_path.special() or lazy:
        results = op.route(overload, values)
        chosen = [results[names.index(n)] for n in pick]
        dispatch.check_outs(op.spec, outs, chosen)
        for target, result in zip(outs, chosen, strict=True):
            target.copy_(result)
    else:
        op.execute(overload, values, outs)
    return outs if isinstance(out, tuple | list) else outs[0]


def make(name: str) -> Callable[..., Any]:
    """The public function of one operator."""
    spec = registry.spec(name)
    return _generated(spec.name) if spec.door is None else _wrapped(spec.name)


def _generated(name: str) -> Callable[..., Any]:
    op = library.operator(name)
    spec = op.spec
    namespace: dict[str, Any] = {"_fast": op.fast, "_slow": functools.partial(_slow, op)}
    signature, keyword_only = [], False
    for parameter in spec.signature.parameters.values():
        if parameter.kind is inspect.Parameter.KEYWORD_ONLY and not keyword_only:
            signature.append("*")
            keyword_only = True
        default = parameter.default
        if default is inspect.Parameter.empty:
            signature.append(parameter.name)
        else:
            namespace[f"_default_{parameter.name}"] = default
            signature.append(f"{parameter.name}=_default_{parameter.name}")
    signature.extend(["out=None"] if keyword_only else ["*", "out=None"])
    values = ", ".join(op.parameters)
    overload = '"default"'
    for switch in op.switches:
        overload = f'"{switch}" if {switch} is not None else {overload}'
    source = [f"def {name}({', '.join(signature)}):"]
    shape = next((n for n, s in spec.scalars.items() if s.star is not None), None)
    if shape is not None:
        source += [f"    if {shape}.__class__ is int:", f"        {shape} = ({shape},)"]
        source += [f"    elif {shape}.__class__ is list:", f"        {shape} = tuple({shape})"]
    source += [
        "    if out is None:",
        f"        _results = _fast({values})",
        "        if _results is not None:",
        "            return _results[0] if len(_results) == 1 else _results",
        f"    return _slow({overload}, ({values},), out)",
    ]
    text = "\n".join(source) + "\n"
    filename = f"{__file__.removesuffix('doors.py')}ops/{name}.door"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    exec(compile(text, filename, "exec"), namespace)
    door = namespace[name]
    door.__doc__ = spec.reference.__doc__
    door.__module__ = "isotile"
    door.__qualname__ = name
    return door


def _wrapped(name: str) -> Callable[..., Any]:
    """A door whose public options differ from the operator's: `spec.door` translates them."""
    op = library.operator(name)
    translate = op.spec.door
    assert translate is not None
    translate.__qualname__ = name  # Python's own TypeErrors name the public function
    fast, names = op.fast, tuple(op.spec.results_of("default"))

    @functools.wraps(translate)
    def door(*args: Any, out: Any = None, **kwargs: Any) -> Any:
        values, pick = translate(*args, **kwargs)
        if out is None and (results := fast(*values)) is not None and len(results) == len(names):
            return results[0] if pick == names[:1] else tuple(results[names.index(n)] for n in pick)
        return _slow(op, op.overload_of(values), values, out, pick)

    signature = inspect.signature(translate)
    extra = inspect.Parameter("out", inspect.Parameter.KEYWORD_ONLY, default=None)
    door.__signature__ = signature.replace(parameters=[*signature.parameters.values(), extra])  # type: ignore[attr-defined]
    door.__module__ = "isotile"
    door.__qualname__ = door.__name__ = name
    return door


def explain(name: str, *args: Any, **kwargs: Any) -> dispatch.Explanation:
    """Which backend would run a call, and every other backend's reason.

    Args:
        name: an operator, such as `"attention"`.
        args, kwargs: the call's arguments, as for the public function.
    """
    specs = registry.specs()
    if name not in specs:
        known = ", ".join(n for n, s in specs.items() if not s.internal)
        raise ValueError(f"isotile.explain: name: wanted one of {known}, got {name!r}")
    op = library.operator(name)
    kwargs.pop("out", None)
    if op.spec.door is not None:
        values, _ = op.spec.door(*args, **kwargs)
    else:
        values = op.bind(args, kwargs)
        values = tuple(
            (v,) if n == "normalized_shape" and isinstance(v, int) else v
            for n, v in zip(op.parameters, values, strict=True)
        )
    return dispatch.explain_call(op.spec, op.overload_of(values), dict(zip(op.parameters, values, strict=True)))
