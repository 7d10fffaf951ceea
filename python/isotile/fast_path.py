"""The short way of an operator's call: plain tensors, nothing special in force, a signature seen before.

For each operator one function is compiled from a template, so that such a call costs a handful of attribute reads, one
dictionary look-up and the plan itself (or one `autograd.Function` around it where a gradient is needed).
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch._C._functorch import peek_interpreter_stack

from .state import CURRENT

if TYPE_CHECKING:
    from .library import Operator

PLAIN = frozenset({torch.Tensor, torch.nn.Parameter})


def special() -> bool:
    """Whether anything is in force that only PyTorch's dispatcher knows how to handle."""
    return (
        torch._C._is_any_autocast_enabled()
        or peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._is_torch_function_mode_enabled()
        or torch._C._get_tracing_state() is not None
        or torch.autograd.profiler._is_profiler_enabled
    )


def compiled(op: Operator) -> Callable[..., tuple[torch.Tensor, ...] | None]:
    """A function of the operator's parameters, with its defaults.

    It returns the results of the call's overload, or None where the call has to take the long way: it is special, its
    signature is new, or it is wrong.
    """
    spec = op.spec
    namespace: dict[str, Any] = {
        "_plans": op.plans,
        "_defaults": op.defaults,
        "_PLAIN": PLAIN,
        "_special": special,
        "_compiling": torch.compiler.is_compiling,
        "_grad": torch.is_grad_enabled,
        "_state": CURRENT.get,
        "_empty": torch.empty_strided,
        **{f"_apply_{overload}": op.functions[overload][0].apply for overload in spec.overloads},  # type: ignore[attr-defined]
    }
    tensors = [n for n in op.parameters if n in spec.tensors]
    optional = {n for n in tensors if spec.tensors[n].optional}
    plain, needs, key = [], [], []
    for n in tensors:
        is_plain, needs_grad = f"type({n}) in _PLAIN and not {n}.is_neg()", f"{n}.requires_grad"
        plain.append(f"({n} is None or {is_plain})" if n in optional else is_plain)
        needs.append(f"({n} is not None and {needs_grad})" if n in optional else needs_grad)
    for n in op.parameters:
        entry = f"({n}.shape, {n}.stride(), {n}.dtype, {n}.device)" if n in spec.tensors else n
        key.append(f"None if {n} is None else {entry}" if n in optional else entry)
    overload = "'default'"
    if spec.grad_overload is not None:
        argument, saving = spec.grad_overload
        overload = f"{saving!r} if _g and {argument} is not None else {overload}"
    for switch in op.switches:
        overload = f"{switch!r} if {switch} is not None else {overload}"

    def without_gradient(results: tuple[str, ...]) -> list[str]:
        lines = []
        passed = dict.fromkeys(spec.results, "None")
        for i, r in enumerate(spec.results):
            if r not in results:
                continue
            passed[r] = f"_r{i}"
            lines.append(f"_s = _e[{i}]")
            if spec.results[r].needs is None:
                lines.append(f"_r{i} = _empty(_s[0], _s[1], dtype=_s[2], device=_s[3])")
            else:
                lines.append(f"_r{i} = None if _s is None else _empty(_s[0], _s[1], dtype=_s[2], device=_s[3])")
        lines.append(f"_plan.run({', '.join([*tensors, *passed.values()])})")
        kept = []
        for r in results:
            absent = spec.results[r].needs is not None
            kept.append(f"{tensors[0]}.new_empty(0) if {passed[r]} is None else {passed[r]}" if absent else passed[r])
        lines.append(f"return ({', '.join(kept)},)")
        return lines

    def with_gradient(overload: str, kept: int) -> list[str]:
        lines = [f"_r = _apply_{overload}(_plan, {', '.join(op.parameters)})"]
        whole = len(spec.results_of(overload))
        lines.append("return (_r,)" if whole == 1 else "return _r" if whole == kept else f"return _r[:{kept}]")
        return lines

    def indented(lines: list[str], depth: int) -> list[str]:
        return ["    " * depth + line for line in lines]

    signature = [f"{n}=_defaults[{n!r}]" if n in op.defaults else n for n in op.parameters]
    source = [
        f"def {spec.name}({', '.join(signature)}):",
        f"    if _compiling() or not ({' and '.join(plain)}) or _special():",
        "        return None",
        f"    _g = _grad() and ({' or '.join(needs)})",
        "    try:",
        f"        _plan = _plans.get(({overload}, _state(), {', '.join(key)}, None))",
        "    except TypeError:  # an unhashable argument: the long way names it",
        "        return None",
        "    if _plan is None:",
        "        return None",
        "    if _g:",
    ]
    for switch in op.switches:
        source.append(f"        if {switch} is not None:")
        source += indented(with_gradient(switch, len(spec.results_of(switch))), 3)
    if spec.grad_overload is not None:
        source.append(f"        if {argument} is not None:")
        source += indented(with_gradient(saving, op.n_default), 3)
    source += indented(with_gradient("default", op.n_default), 2)
    source.append("    _e = _plan.empty")
    for switch in op.switches:
        source.append(f"    if {switch} is not None:")
        source += indented(without_gradient(tuple(spec.results_of(switch))), 2)
    source += indented(without_gradient(tuple(spec.results_of("default"))), 1)
    text = "\n".join(source) + "\n"
    filename = f"{__file__.removesuffix('fast_path.py')}ops/{spec.name}.fast_path"
    linecache.cache[filename] = (len(text), None, text.splitlines(keepends=True), filename)
    exec(compile(text, filename, "exec"), namespace)
    return namespace[spec.name]
