"""From specs to PyTorch: torch ops, fake kernels, autograd, autocast, vmap, and the public functions.

A call takes one of three ways:

* plain tensors, nothing special in force: straight to the plan of its signature;
* the same, with a gradient needed: an `autograd.Function` around it;
* anything else (compile, export, fake tensors, subclasses, autocast, vmap, tracing, profiling): the registered
  `torch.ops.isotile.<op>`, through PyTorch's dispatcher.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch._C._functorch import peek_interpreter_stack
from torch.fx.experimental.symbolic_shapes import guard_or_true

from . import dispatch, fast_path, registry
from .fast_path import PLAIN, special
from .spec import OpSpec, Tensor
from .state import CURRENT, State

NAMESPACE = "isotile"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
#: Dispatch keys that run kernels. NVIDIA and AMD GPUs share CUDA; Neuron is PrivateUse1 (TorchNeuron) or XLA.
KERNEL_KEYS = ("CPU", "CUDA", "XLA", "PrivateUse1")
AUTOCAST_KEYS = {
    "AutocastCPU": "cpu",
    "AutocastCUDA": "cuda",
    "AutocastXLA": "xla",
    "AutocastPrivateUse1": "privateuseone",
}


class Operator:
    """One spec at work: its plans, its torch ops and its way through autograd."""

    def __init__(self, spec: OpSpec) -> None:
        self.spec = spec
        self.parameters = tuple(spec.signature.parameters)
        self.defaults = {
            n: p.default for n, p in spec.signature.parameters.items() if p.default is not inspect.Parameter.empty
        }
        self.tensor_positions = tuple(i for i, n in enumerate(self.parameters) if n in spec.tensors)
        self.scalar_positions = tuple(i for i, n in enumerate(self.parameters) if n not in spec.tensors)
        self.result_positions = {
            o: tuple(i for i, n in enumerate(spec.results) if n in spec.results_of(o)) for o in spec.overloads
        }
        self.result_names = {o: tuple(spec.results_of(o)) for o in spec.overloads}
        self.n_default = len(spec.results_of("default"))
        self.plans: dict[Any, dispatch.Plan] = {}
        self.switches = tuple(o for o in spec.overloads if o in spec.args)
        self.torch_ops: dict[str, Any] = {}
        self.orders = {o: tuple(self.parameters.index(n) for n in spec.parameters(o)) for o in spec.overloads}
        self.functions: dict[str, tuple[type, type]] = {}
        for overload in spec.overloads:
            self._register(overload)
        self.fast = fast_path.compiled(self)

    # --- running ---------------------------------------------------------------------------------------------------

    def plan(self, overload: str, values: tuple[Any, ...], outs: Sequence[torch.Tensor] | None) -> dispatch.Plan:
        """The cached plan of a call given by all its parameters in order."""
        state = CURRENT.get()
        key = self._key(overload, values, outs)
        found = self.plans.get(key)
        if found is None:
            if len(self.plans) >= dispatch.MAX_PLANS:
                self.plans.clear()
            found = dispatch.make_plan(
                self.spec, overload, dict(zip(self.parameters, values, strict=True)), outs, state
            )
            found.state, found.meta = state, self.meta(values)
            self.plans[key] = found
        return found

    def _key(self, overload: str, values: tuple[Any, ...], outs: Sequence[torch.Tensor] | None) -> tuple[Any, ...]:
        tensors = [values[i] for i in self.tensor_positions]
        return (
            overload,
            CURRENT.get(),
            fast_path.signature(*tensors) or fast_path.describe(*tensors),
            *[tuple(v) if isinstance(v, list) else v for v in map(values.__getitem__, self.scalar_positions)],
            None if outs is None else fast_path.signature(*outs) or fast_path.describe(*outs),
        )

    def execute(
        self, overload: str, values: tuple[Any, ...], outs: Sequence[torch.Tensor] | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Run a call on plain tensors; the overload's results, empty tensors for those not needed."""
        plan = self.plan(overload, values, None) if outs is None else self._plan_into(overload, values, outs)
        given = list(outs or ())  # the first results; the rest, such as attention's lse, are allocated
        filled = [None if spec is None else given.pop(0) if given else spec.empty() for spec in plan.outs]
        plan.run(*[values[i] for i in self.tensor_positions], *filled)
        if outs is not None:
            torch.autograd.graph.increment_version(outs)  # the kernels write past PyTorch
        nothing = values[self.tensor_positions[0]].new_empty
        return tuple(nothing(0) if (f := filled[i]) is None else f for i in self.result_positions[overload])

    def _plan_into(self, overload: str, values: tuple[Any, ...], outs: Sequence[torch.Tensor]) -> dispatch.Plan:
        """The plan of a call with `out=`. Whatever is wrong raises before anything is written."""
        try:
            plan = self.plans.get(self._key(overload, values, outs))
        except (AttributeError, TypeError):  # a wrong argument, which is named below
            plan = None
        if plan is None:
            named = dict(zip(self.parameters, values, strict=True))
            dispatch.check_types(self.spec, named)
            dims = dispatch.bind_call(self.spec, named)
            wanted = [o for o in dispatch.out_specs(self.spec, overload, named, dims) if o is not None]
            dispatch.check_outs(self.spec, outs, wanted[: len(outs)] if len(outs) <= len(wanted) else wanted)
        memory = [_span(v) for v in values if isinstance(v, torch.Tensor)]
        for out in outs:
            first, end, device = _span(out)
            if any(first < b and a < end and device == other for a, b, other in memory):
                raise ValueError(
                    f"isotile.{self.spec.name}: out: wanted memory of its own, got memory of an input or another result"
                )
            memory.append((first, end, device))
        return plan or self.plan(overload, values, outs)

    def bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """All parameters in order, defaults filled in; TypeError as Python's own for wrong names."""
        bound = self.spec.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return tuple(bound.arguments.values())

    def fill(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """`bind` for isotile's own calls, where names are right: a fraction of the time."""
        return (*args, *[kwargs[n] if n in kwargs else self.defaults[n] for n in self.parameters[len(args) :]])

    def overload_of(self, values: tuple[Any, ...]) -> str:
        for switch in self.switches:
            if values[self.parameters.index(switch)] is not None:
                return switch
        return "default"

    def route(self, overload: str, values: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """Run a call whatever is in force; the overload's results."""
        tensors = [values[i] for i in self.tensor_positions]
        if (
            self.spec.grad_overload is not None
            and overload == "default"
            and torch.is_grad_enabled()
            and any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)
        ):
            switch, saving = self.spec.grad_overload
            if values[self.parameters.index(switch)] is not None:
                return self.route(saving, values)[: self.n_default]
        if torch.compiler.is_compiling():
            return self.dispatched(overload, values)
        plain = all(t is None or (type(t) in PLAIN and not t.is_neg()) for t in tensors)
        if plain and not special():
            if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
                dispatch.check_types(self.spec, dict(zip(self.parameters, values, strict=True)))
                return self.differentiable(overload, values, 0)
            return self.execute(overload, values)
        dispatch.check_types(self.spec, dict(zip(self.parameters, values, strict=True)))
        if peek_interpreter_stack() is not None and torch.is_grad_enabled():
            if torch._C._is_any_autocast_enabled():
                values = self._autocast(values)
            return self.differentiable(overload, values, 1)
        return self.dispatched(overload, values)

    def differentiable(self, overload: str, values: tuple[Any, ...], kind: int) -> tuple[torch.Tensor, ...]:
        function: Any = self.functions[overload][kind]
        results = function.apply(*values) if kind else function.apply(self.plan(overload, values, None), *values)
        return results if isinstance(results, tuple) else (results,)

    def dispatched(self, overload: str, values: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        results = self.torch_ops[overload](*[values[i] for i in self.orders[overload]])
        return tuple(results) if isinstance(results, tuple | list) else (results,)

    # --- registration ----------------------------------------------------------------------------------------------

    def _register(self, overload: str) -> None:
        spec = self.spec
        LIBRARY.define(spec.schema(overload))
        name = spec.name if overload == "default" else f"{spec.name}.{overload}"
        qualified = f"{NAMESPACE}::{name}"
        single = len(spec.results_of(overload)) == 1
        order = spec.parameters(overload)

        def full(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
            given = {**self.defaults, **dict(zip(order, args, strict=False)), **kwargs}
            return tuple(given.get(n) for n in self.parameters)

        def kernel(*args: Any, **kwargs: Any) -> Any:
            results = self.execute(overload, full(args, kwargs))
            return results[0] if single else results

        def fake(*args: Any, **kwargs: Any) -> Any:
            results = self.fake(overload, full(args, kwargs))
            return results[0] if single else results

        for key in KERNEL_KEYS:
            LIBRARY.impl(name, kernel, key)
        torch.library.register_fake(qualified, fake, lib=LIBRARY)
        torch.library.register_autograd(
            qualified,
            functools.partial(self._backward, overload, order),
            setup_context=functools.partial(self._setup, overload, order, full, single),
            lib=LIBRARY,
        )
        torch.library.register_vmap(qualified, functools.partial(self._vmap, overload, full, single), lib=LIBRARY)
        operator = getattr(getattr(torch.ops.isotile, spec.name), overload)
        if spec.autocast is not None:
            for key in AUTOCAST_KEYS:
                LIBRARY.impl(name, functools.partial(self._autocast_kernel, operator, order, full, key), key)
        self.torch_ops[overload] = operator
        self.functions[overload] = (_eager_function(self, overload), _composable_function(self, overload))

    def fake(self, overload: str, values: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
        """Results without data, also for symbolic sizes."""
        named = dict(zip(self.parameters, values, strict=True))
        dispatch.check_types(self.spec, named)
        dims = dispatch.bind_call(self.spec, named, _same_traced)
        first = values[self.tensor_positions[0]]
        results = []
        for out, name in zip(dispatch.out_specs(self.spec, overload, named, dims), self.spec.results, strict=True):
            if name in self.spec.results_of(overload):
                results.append(
                    first.new_empty(0) if out is None else torch.empty(out.shape, dtype=out.dtype, device=out.device)
                )
        return tuple(results)

    # --- autograd --------------------------------------------------------------------------------------------------

    def save(self, overload: str, values: tuple[Any, ...], results: tuple[torch.Tensor, ...]) -> dict[str, Any]:
        """What the backward needs, by name: tensors among arguments and results; scalars are kept beside."""
        everything = {
            **dict(zip(self.parameters, values, strict=True)),
            **dict(zip(self.spec.results_of(overload), results, strict=True)),
        }
        return {n: everything[n] for n in self.saved_names(overload)}

    def saved_names(self, overload: str) -> tuple[str, ...]:
        if self.spec.backward is None:
            return tuple(self.spec.tensors)
        return self.spec.saves.get(overload, self.spec.saves["default"])

    def gradients(
        self,
        overload: str,
        saved: dict[str, Any],
        values_meta: dict[str, Any],
        grads: Sequence[torch.Tensor | None],
        needs: dict[str, bool],
        state: State,
    ) -> dict[str, Any]:
        """The gradient of each argument, from the spec's formula, or from the reference where it has none.

        It runs under the state of the forward call: PyTorch may run it on a thread of its own, after the context.
        """
        named = dict(zip(self.result_names[overload], grads, strict=True))
        token = CURRENT.set(state)
        try:
            if self.spec.backward is None:
                found = self._reference_gradients(overload, saved, values_meta, named, needs)
            else:
                space = SimpleNamespace(**{**values_meta, **saved, "overload": overload})
                found = self.spec.backward(space, named, needs)
        finally:
            CURRENT.reset(token)
        out: dict[str, Any] = {}
        for name, needed in needs.items():
            grad = found.get(name) if needed else None
            if grad is not None:
                shape, dtype = values_meta[f"{name}.shape"], values_meta[f"{name}.dtype"]
                if grad.shape != shape:
                    grad = grad.sum_to_size(shape)
                if grad.dtype != dtype:
                    grad = grad.to(dtype)
            out[name] = grad
        return out

    def _reference_gradients(
        self,
        overload: str,
        saved: dict[str, Any],
        meta: dict[str, Any],
        grads: dict[str, Any],
        needs: dict[str, bool],
    ) -> dict[str, Any]:
        """Differentiate the reference: the second derivative of every operator, in plain PyTorch."""
        wanted = [n for n, need in needs.items() if need and saved.get(n) is not None]
        results = [n for n, g in grads.items() if g is not None and g.numel() and self.spec.results[n].differentiable]
        scalars = {n: meta[n] for n in self.spec.scalars}

        def of_wanted(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            values = self.spec.reference(**{**saved, **dict(zip(wanted, tensors, strict=True))}, **scalars)
            return tuple(values[n] for n in results)

        if not wanted or not results:
            return {}
        pull = torch.func.vjp(of_wanted, *[saved[n] for n in wanted])[1]
        return dict(zip(wanted, pull(tuple(grads[n] for n in results)), strict=True))

    def meta(self, values: tuple[Any, ...]) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for name, value in zip(self.parameters, values, strict=True):
            if isinstance(value, torch.Tensor):
                out[f"{name}.shape"], out[f"{name}.dtype"] = value.shape, value.dtype
            elif name in self.spec.tensors:
                out[name] = None
            else:
                out[name] = value
        return out

    def refuse_gradient(self, values: tuple[Any, ...]) -> None:
        for i in self.tensor_positions:
            name, value = self.parameters[i], values[i]
            if value is not None and value.requires_grad and not self.spec.tensors[name].differentiable:
                raise ValueError(
                    f"isotile.{self.spec.name}: {name}: wanted a tensor without gradient (it is not differentiable), "
                    "got requires_grad=True"
                )

    def _setup(
        self, overload: str, order: Sequence[str], full: Callable, single: bool, ctx: Any, inputs: Any, output: Any
    ) -> None:
        values = full(inputs, {})
        results = (output,) if single else tuple(output)
        saved = self.save(overload, values, results)
        ctx.saved_names = tuple(saved)
        ctx.save_for_backward(*saved.values())
        ctx.meta = self.meta(values)
        ctx.state = CURRENT.get()

    def _backward(self, overload: str, order: Sequence[str], ctx: Any, *grads: Any) -> Any:
        saved = dict(zip(ctx.saved_names, ctx.saved_tensors, strict=True))
        given = order[: len(ctx.needs_input_grad)]  # PyTorch passes no trailing arguments that are at their defaults
        needs = dict.fromkeys(self.spec.tensors, False)
        needs.update({n: bool(need) for n, need in zip(given, ctx.needs_input_grad, strict=True) if n in needs})
        found = self.gradients(overload, saved, ctx.meta, grads, needs, ctx.state)
        out = tuple(found.get(n) for n in given)
        return out[0] if len(out) == 1 else out

    # --- autocast and vmap -----------------------------------------------------------------------------------------

    def _autocast_kernel(
        self, operator: Any, order: Sequence[str], full: Callable, key: str, *args: Any, **kwargs: Any
    ) -> Any:
        # Autocast counts as off once its key is excluded, so cast first.
        named = dict(zip(self.parameters, self._autocast(full(args, kwargs), AUTOCAST_KEYS[key]), strict=True))
        with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
            return operator(*[named[n] for n in order])

    def _autocast(self, values: tuple[Any, ...], device_type: str | None = None) -> tuple[Any, ...]:
        device_type = device_type or values[self.tensor_positions[0]].device.type
        if self.spec.autocast is None or not torch.is_autocast_enabled(device_type):
            return values
        target = torch.get_autocast_dtype(device_type) if self.spec.autocast == "lower" else torch.float32
        cast = list(values)
        for i in self.tensor_positions:
            arg = self.spec.args[self.parameters[i]]
            value = values[i]
            if (
                isinstance(arg, Tensor)
                and arg.autocast
                and value is not None
                and value.is_floating_point()
                and value.dtype != torch.float64
            ):
                cast[i] = value.to(target)
        return tuple(cast)

    def _vmap(
        self, overload: str, full: Callable, single: bool, info: Any, in_dims: Any, *args: Any, **kwargs: Any
    ) -> Any:
        values = full(args, kwargs)
        order = self.spec.parameters(overload)
        by_name = dict(zip(order, in_dims, strict=False))
        dims = tuple(by_name.get(n) for n in self.parameters)
        results, out_dims = self.vmap(overload, info.batch_size, dims, values)
        return (results[0], out_dims[0]) if single else (results, out_dims)

    def vmap(
        self, overload: str, batch: int, in_dims: tuple[int | None, ...], values: tuple[Any, ...]
    ) -> tuple[tuple[torch.Tensor, ...], tuple[int, ...]]:
        """A batch of calls: one call with one more loop dimension where the shapes allow, else one call for each."""
        results = self.spec.results_of(overload)
        positions = [i for i in self.tensor_positions if values[i] is not None]
        batched = [i for i in positions if in_dims[i] is not None]

        def core_rank(i: int) -> int:
            pattern = self.spec.tensors[self.parameters[i]].pattern
            if pattern.star is None:
                return len(pattern.core)
            shape = next(values[self.parameters.index(n)] for n, s in self.spec.scalars.items() if s.star)
            return len(pattern.core) - 1 + len(shape)

        def rank(i: int) -> int:
            return values[i].ndim - (in_dims[i] is not None)

        natural = (
            all(self.spec.tensors[self.parameters[i]].pattern.loop for i in batched)
            and all(rank(i) >= core_rank(i) or self.spec.tensors[self.parameters[i]].broadcast for i in positions)
            and all(r.pattern.loop for r in results.values())
            and not (self.spec.vmap_scalars is None and any(s.type == "int" for s in self.spec.scalars.values()))
        )
        if natural:
            loop = max(
                (rank(i) - core_rank(i) for i in positions if self.spec.tensors[self.parameters[i]].pattern.loop),
                default=0,
            )
            moved = list(values)
            for i in batched:
                value = values[i].movedim(in_dims[i] or 0, 0)
                missing = loop + core_rank(i) - rank(i)
                moved[i] = value.reshape(value.shape[0], *[1] * missing, *value.shape[1:]) if missing > 0 else value
            if self.spec.vmap_scalars is not None:
                space = SimpleNamespace(
                    **dict(zip(self.parameters, values, strict=True)),
                    ranks={self.parameters[i]: rank(i) for i in positions},
                )
                for name, value in self.spec.vmap_scalars(space).items():
                    moved[self.parameters.index(name)] = value
            found = self.route(overload, tuple(moved))
            whole = tuple(
                f
                if f.ndim and f.shape[0] == batch
                else f.expand(batch, *f.shape)
                if f.numel()
                else f.new_empty(batch, 0)
                for f in found
            )
            return whole, (0,) * len(whole)
        rows = [
            self.route(overload, tuple(v.select(in_dims[i], b) if i in batched else v for i, v in enumerate(values)))
            for b in range(batch)
        ]
        return tuple(torch.stack(column) for column in zip(*rows, strict=True)), (0,) * len(results)


def _span(tensor: torch.Tensor) -> tuple[int, int, torch.device]:
    """The addresses between which a tensor's elements lie, and on which device."""
    first, size = tensor.data_ptr(), tensor.nbytes
    if size == 0:
        return 0, 0, tensor.device
    if not tensor.is_contiguous():
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        size = (last + 1) * tensor.element_size()
    return first, first + size, tensor.device


def _same_traced(a: Any, b: Any) -> bool:
    """Equality of sizes while tracing: guards on known sizes, a run-time check on unbacked ones."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    if not guard_or_true(a == b):
        return False
    torch._check(a == b)
    return True


def _eager_function(operator: Operator, overload: str) -> type:
    """Autograd around a plan; not composable with functorch, and half as dear as the function that is."""
    spec, parameters = operator.spec, operator.parameters
    names = list(spec.results_of(overload))
    fixed = [i for i, n in enumerate(names) if not spec.results[n].differentiable]
    positions, kept = operator.tensor_positions, operator.result_positions[overload]
    constants = [i for i in positions if not spec.tensors[parameters[i]].differentiable]
    arguments = [(parameters[i], i + 1) for i in positions]
    nothing = (None,) * (1 + len(parameters))
    saved = operator.saved_names(overload)
    from_values = [parameters.index(n) for n in saved if n in spec.args]
    from_results = [names.index(n) for n in saved if n not in spec.args]
    saved = tuple([parameters[i] for i in from_values] + [names[i] for i in from_results])  # as they are saved

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, plan: dispatch.Plan, *values: Any) -> Any:
            for i in constants:
                if values[i] is not None and values[i].requires_grad:
                    operator.refuse_gradient(values)
            filled = [None if out is None else out.empty() for out in plan.outs]
            plan.run(*[values[i] for i in positions], *filled)
            results = tuple([values[positions[0]].new_empty(0) if (f := filled[i]) is None else f for i in kept])
            ctx.save_for_backward(*[values[i] for i in from_values], *[results[i] for i in from_results])
            ctx.plan = plan
            ctx.set_materialize_grads(False)
            if fixed:
                ctx.mark_non_differentiable(*[results[i] for i in fixed])
            return results if len(results) > 1 else results[0]

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            if grads[0] is None and all(g is None for g in grads):
                return nothing
            plan, needed = ctx.plan, ctx.needs_input_grad
            values = dict(zip(saved, ctx.saved_tensors, strict=True))
            needs = {n: needed[i] for n, i in arguments}
            found = operator.gradients(overload, values, plan.meta, grads, needs, plan.state)
            return (None, *map(found.get, parameters))

    Eager.__name__ = Eager.__qualname__ = f"{spec.name}_{overload}"
    return Eager


def _composable_function(operator: Operator, overload: str) -> type:
    """Autograd for `torch.func`: the setup_context style with a vmap rule."""
    parameters, spec = operator.parameters, operator.spec
    fixed = [n for n, r in spec.results_of(overload).items() if not r.differentiable]
    names = list(spec.results_of(overload))

    class Composable(torch.autograd.Function):
        @staticmethod
        def forward(*values: Any) -> Any:
            results = operator.route(overload, values)
            return results if len(results) > 1 else results[0]

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            results = output if isinstance(output, tuple) else (output,)
            saved = operator.save(overload, inputs, results)
            ctx.saved_names = tuple(saved)
            ctx.save_for_backward(*saved.values())
            ctx.meta = operator.meta(inputs)
            ctx.state = CURRENT.get()
            if fixed:
                ctx.mark_non_differentiable(*[results[names.index(n)] for n in fixed])

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            saved = dict(zip(ctx.saved_names, ctx.saved_tensors, strict=True))
            needs = {
                n: bool(need) for n, need in zip(parameters, ctx.needs_input_grad, strict=True) if n in spec.tensors
            }
            found = operator.gradients(overload, saved, ctx.meta, grads, needs, ctx.state)
            return tuple(found.get(n) for n in parameters)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *values: Any) -> Any:
            results, out_dims = operator.vmap(overload, info.batch_size, tuple(in_dims), values)
            return (results, out_dims) if len(results) > 1 else (results[0], out_dims[0])

    Composable.__name__ = Composable.__qualname__ = f"{spec.name}_{overload}_composable"
    return Composable


OPERATORS: dict[str, Operator] = {}


def operator(name: str) -> Operator:
    """The operator of that name, registered with PyTorch at its first use."""
    found = OPERATORS.get(name)
    if found is None:
        found = OPERATORS[name] = Operator(registry.spec(name))
    return found


def call(name: str, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
    """Call an operator by name, whatever is in force: how gradient formulae reach the backward operators."""
    op = OPERATORS[name]
    results = op.fast(*args, **kwargs)
    if results is None:
        values = op.fill(args, kwargs)
        results = op.route(op.overload_of(values), values)
    return results


def register_all() -> None:
    """Register every operator with PyTorch; autograd must be in place before the first call."""
    for name in registry.specs():
        operator(name)
