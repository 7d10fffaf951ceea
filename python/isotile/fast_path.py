"""The short way of an operator's call: plain tensors, nothing special in force, a signature seen before.

For each operator one function is compiled from a template, so that such a call costs one look at its tensors
(csrc/signature.cc), one dictionary look-up and the plan itself (or one `autograd.Function` around it where a gradient
is needed).
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch
from torch._C._functorch import peek_interpreter_stack

from .state import CURRENT

if TYPE_CHECKING:
    from .library import Operator

PLAIN = (torch.Tensor, torch.nn.Parameter)

#: True results mean that something is in force that only PyTorch's dispatcher knows how to handle.
MODES: tuple[Callable[[], Any], ...] = (
    torch._C._is_any_autocast_enabled,
    peek_interpreter_stack,
    torch._C._len_torch_dispatch_stack,
    torch._C._is_torch_function_mode_enabled,
    torch._C._get_tracing_state,
)


def special() -> bool:
    """Whether any of the modes is in force, or the profiler."""
    return any(mode() for mode in MODES) or torch.autograd.profiler._is_profiler_enabled


def describe(*tensors: torch.Tensor | None) -> Hashable:
    """What a plan depends on of its tensors."""
    return tuple([None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in tensors])


def read_signature(*tensors: torch.Tensor | None) -> Hashable | None:
    """`describe`, or None where a tensor is not plain or a mode is in force."""
    plain = all(t is None or (type(t) in PLAIN and not t.is_neg()) for t in tensors)
    return describe(*tensors) if plain and not any(mode() for mode in MODES) else None


def signature_function() -> Callable[..., Hashable | None]:
    """`read_signature`, by the extension module where there is one: then mostly as bytes, in a fraction of the time."""
    try:
        from isotile import _C
    except ImportError:
        return read_signature
    module: Any = _C
    table = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    module.set_signature(table, PLAIN, torch.Tensor.is_neg, MODES, describe)
    return module.signature  # type: ignore[no-any-return]


signature = signature_function()


def compiled(op: Operator) -> Callable[..., tuple[torch.Tensor, ...] | None]:
    """A function of the operator's parameters, with its defaults.

    It returns the results of the call's overload, or None where the call has to take the long way: it is special, its
    signature is new, or it is wrong.
    """
    spec = op.spec
    namespace: dict[str, Any] = {
        "_plans": op.plans,
        "_defaults": op.defaults,
        "_signature": signature,
        "_profiler": torch.autograd.profiler,
        "_compiling": torch.compiler.is_compiling,
        "_grad": torch.is_grad_enabled,
        "_state": CURRENT.get,
        **{f"_apply_{overload}": op.functions[overload][0].apply for overload in spec.overloads},  # type: ignore[attr-defined]
    }
    tensors = [n for n in op.parameters if n in spec.tensors]
    optional = {n for n in tensors if spec.tensors[n].optional}
    needs = []
    for n in tensors:
        needs_grad = f"{n}.requires_grad"
        needs.append(f"({n} is not None and {needs_grad})" if n in optional else needs_grad)
    scalars = [n for n in op.parameters if n not in spec.tensors]
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
            unless = "" if spec.results[r].needs is None else f"None if _e[{i}] is None else "
            lines.append(f"_r{i} = {unless}_e[{i}]()")
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

    head = [f"{n}=_defaults[{n!r}]" if n in op.defaults else n for n in op.parameters]
    source = [
        f"def {spec.name}({', '.join(head)}):",
        "    if _compiling() or _profiler._is_profiler_enabled:",
        "        return None",
        f"    _s = _signature({', '.join(tensors)})",
        "    if _s is None:",
        "        return None",
        "    try:",
        f"        _g = _grad() and ({' or '.join(needs)})",
        f"        _plan = _plans.get(({', '.join([overload, '_state()', '_s', *scalars])}, None))",
        "    except (AttributeError, TypeError):  # None, or an unhashable argument: the long way names it",
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
