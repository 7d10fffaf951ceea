"""Recipes: JSON descriptions of calls, drawn from a spec by hypothesis or a seed, and the tensors that they build."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from .. import dispatch, registry, shapes
from ..ops import packed_linear
from ..precision import exact
from ..spec import FLOATS, Case, OpSpec, Scalar, Tensor
from .draws import Drawn, Random, Source

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

#: Sizes around the tiles that kernels use, and awkward ones; 0 is drawn beside them.
SIZES = (1, 2, 3, 5, 7, 8, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 191, 257)
LOOPS = (1, 1, 2, 3, 4)
#: Elements of the largest product of dimensions that one example may have.
BUDGET = 1 << 16
KINDS = ("normal", "large", "tiny", "mixed", "integers", "specials")
LAYOUTS = ("contiguous", "transposed", "sliced", "stepped", "expanded", "offset")

_DTYPES = {str(d).removeprefix("torch."): d for d in (*FLOATS, torch.bool, torch.uint8, torch.int32, torch.int64)}


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype_from_name(name: str) -> torch.dtype:
    return _DTYPES[name]


def recipes(spec: OpSpec, dtype: torch.dtype, kinds: tuple[str, ...] = KINDS) -> SearchStrategy[dict[str, Any]]:
    """A hypothesis strategy of recipes for `spec` whose first tensor has `dtype`."""
    from hypothesis import strategies as st

    @st.composite
    def drawn(draw: Any) -> dict[str, Any]:
        return draw_recipe(Drawn(draw), spec, dtype, kinds)

    return drawn()


def kinds_of(spec: OpSpec, kinds: tuple[str, ...] = KINDS) -> tuple[str, ...]:
    return tuple(k for k in kinds if spec.nonfinite or k != "specials")


def draw_recipe(
    source: Source,
    spec: OpSpec,
    dtype: torch.dtype,
    kinds: tuple[str, ...] = KINDS,
    wanted: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """One recipe for `spec` whose first tensor has `dtype`.

    Args:
        source: makes the choices.
        spec: the operator.
        dtype: of its first tensor.
        kinds: value kinds to choose among.
        wanted: choices made beforehand: `kind`, a scalar's value by its name, an optional tensor's presence by its.
    """
    wanted = wanted or {}

    def choose(name: str, options: Sequence[Any]) -> Any:
        return wanted[name] if name in wanted else source.choice(options)

    def boolean() -> bool:
        return source.integer(0, 1) == 1

    def rarely() -> bool:  # one empty dimension empties the whole example
        return source.integer(0, 19) == 19

    def draw_size(most: int) -> int:
        return 0 if rarely() else source.choice([s for s in SIZES if s <= max(1, most)])

    kind = choose("kind", kinds_of(spec, kinds))
    scalars = {
        name: choose(name, samples_of(scalar))
        for name, scalar in spec.scalars.items()
        if scalar.star is None and name != "dim"
    }
    present = [name for name, arg in spec.tensors.items() if not arg.optional or choose(name, (False, True))]
    if scalars.get("need_mask") and "attn_mask" not in present:
        scalars["need_mask"] = False
    if scalars.get("need_sinks") and "sinks" not in present:
        scalars["need_sinks"] = False
    if scalars.get("dropout_p") and "dropout_seed" not in present:
        present.append("dropout_seed")
    names = _core_names(spec, present)
    if names:
        loop = [0 if rarely() else source.choice(LOOPS) for _ in range(source.integer(0, 3))]
    else:  # the loop is all there is: elementwise, or along one of its dimensions
        loop = []
        for _ in range(source.integer(0, 3)):
            room = BUDGET // max(1, math.prod(loop))
            loop.append(draw_size(room))
    budget = BUDGET // max(1, math.prod(loop))
    sizes: dict[str, Any] = {}
    for name in sorted(names, key=lambda _: source.integer(0, 9)):
        sizes[name] = draw_size(min(budget, _limit(spec, name)))
        budget //= max(1, sizes[name])
    stars = {n for n in names if any(a.pattern.star == n for a in spec.tensors.values())}
    groups = {}
    for name in sorted(stars):
        size = sizes.pop(name)
        groups[name] = source.choice([[size], [size, 1], [1, size], [2, size], [size, 3]])
    if "hk" in sizes:
        sizes["hk"] = source.choice([1, 2, 3])
        sizes["hq"] = sizes["hk"] * source.choice([1, 2, 4])
    if "one" in sizes:
        sizes["one"] = 1
    absent = []
    for name, arg in spec.tensors.items():
        if name in present and arg.pattern.optional and not arg.broadcast and source.integer(0, 5) == 0:
            absent.append(arg.pattern.optional[0])
    if "n" in absent and "bias" in present:
        present.remove("bias")
    tensors = {}
    for name in present:
        arg = spec.tensors[name]
        rank = len(loop)
        lead = list(loop)
        lacks = [o for o in arg.pattern.optional if o in absent]
        if arg.pattern.loop and not spec.internal and "dim" not in spec.scalars:
            if lacks and not arg.broadcast:
                lead = []
            elif rank and source.integer(0, 3) == 0:
                lead = lead[source.integer(0, rank) :]
                lead = [1 if boolean() else s for s in lead]
        tensors[name] = {
            "loop": lead,
            "layout": source.choice(LAYOUTS),
            "dtype": dtype_name(_draw_dtype(source, spec, arg, name, dtype)),
        }
        if arg.broadcast:
            tensors[name]["ones"] = [boolean() for _ in range(6)]
    if scalars.get("need_mask") and tensors["attn_mask"]["dtype"] == "bool":
        scalars["need_mask"] = False
    if "dim" in spec.scalars:
        bound = max(1, len(loop))
        scalars["dim"] = source.integer(-bound, bound - 1)
    switches = [o for o in spec.overloads if o in spec.args]
    overload = next((s for s in switches if s in present), "default")
    free = [o for o in spec.overloads if o not in spec.args and o != "default"]
    if free and source.integer(0, 3) == 0:
        overload = free[0]
    recipe = {
        "op": spec.name,
        "overload": overload,
        "dtype": dtype_name(dtype),
        "kind": kind,
        "sizes": sizes,
        "groups": groups,
        "absent": absent,
        "tensors": tensors,
        "scalars": {n: dtype_name(v) if isinstance(v, torch.dtype) else v for n, v in scalars.items()},
        "out": source.choice(("contiguous", "contiguous", "transposed", "sliced")),
        "seed": source.integer(0, 2**31 - 1),
    }
    if spec.complete is not None:
        spec.complete(recipe)
    return recipe


def samples_of(scalar: Scalar) -> tuple[Any, ...]:
    if scalar.samples is not None:
        return scalar.samples
    if scalar.choices is not None:
        return scalar.choices
    if scalar.type == "bool":
        return (False, True)
    raise ValueError(f"a scalar of type {scalar.type} needs samples to draw from")


def _core_names(spec: OpSpec, present: list[str]) -> list[str]:
    return list(dict.fromkeys(n for p in present for n in spec.tensors[p].pattern.names))


def _limit(spec: OpSpec, name: str) -> int:
    if name in ("groups", "hk", "hq"):
        return 8
    return max(SIZES)


def _draw_dtype(source: Source, spec: OpSpec, arg: Tensor, name: str, dtype: torch.dtype) -> torch.dtype:
    if arg.same_as is not None or name == next(iter(spec.tensors)):
        return dtype
    if dtype in arg.dtypes:
        if arg.dtypes == FLOATS and name in _primary(spec):
            return dtype
        narrow = [d for d in arg.dtypes if d != torch.float64 or dtype == torch.float64]
        return dtype if source.integer(0, 2) else source.choice(narrow)
    return arg.dtypes[0]


def _primary(spec: OpSpec) -> set[str]:
    """Arguments that others take their dtype from."""
    return {a.same_as for a in spec.tensors.values() if a.same_as is not None}


@dataclasses.dataclass
class Call:
    """A recipe's tensors: the operator's arguments by name, and the buffers that they live in."""

    spec: OpSpec
    overload: str
    values: dict[str, Any]
    dims: shapes.Dims


def build(recipe: dict[str, Any], device: str = "cpu", spec: OpSpec | None = None) -> Call:
    """The tensors and scalars of a recipe. Memory between the elements of a strided layout holds NaN.

    Args:
        recipe: as drawn.
        device: where the tensors go.
        spec: what the recipe was drawn from, if it is no operator of isotile's.
    """
    spec = spec or registry.spec(recipe["op"])
    random = Random(recipe["seed"])
    values: dict[str, Any] = {}
    for name, scalar in spec.scalars.items():
        if scalar.star is not None:
            values[name] = tuple(recipe["groups"][scalar.star])
        else:
            value = recipe["scalars"].get(name, spec.signature.parameters[name].default)
            values[name] = _DTYPES[value] if scalar.type == "ScalarType?" and isinstance(value, str) else value
    full = shapes.Dims(
        {
            **recipe["sizes"],
            **{n: math.prod(g) for n, g in recipe["groups"].items()},
            **dict.fromkeys(recipe["absent"], 1),
        },
        {n: tuple(g) for n, g in recipe["groups"].items()},
        set(recipe["absent"]),
        (),
    )
    loops = [
        tuple(t["loop"])
        for n, t in recipe["tensors"].items()
        if spec.tensors[n].pattern.loop and not spec.tensors[n].broadcast
    ]
    merged = shapes.merge_loops(loops, lambda a, b: a == b)
    assert merged is not None
    full.loop = merged
    for name, arg in spec.tensors.items():
        described = recipe["tensors"].get(name)
        if described is None:
            values[name] = None
            continue
        own = dataclasses.replace(full, loop=tuple(described["loop"]))
        shape = own.shape(arg.pattern)
        if arg.broadcast:
            target = full.shape(arg.pattern)
            shape = tuple(1 if one else s for one, s in zip(described["ones"], target, strict=False))
            while shape and shape[0] == 1 and described["ones"][-1]:
                shape = shape[1:]
        shape = tuple(described.get("shape", shape))  # a recorded call has its own, and its strides
        dtype = _DTYPES[described["dtype"]]
        dense = fill(arg, shape, dtype, recipe["kind"], random, full)
        if "values" in described:
            dense = torch.tensor(described["values"], dtype=dtype).view(shape)
        if "strides" in described:
            values[name] = _strided(dense, described["strides"]).to(device)
        else:
            values[name] = _lay_out(dense, described["layout"], random).to(device)
    _consistent(spec, values)
    return Call(spec, recipe["overload"], values, full)


#: Arguments that are made of others: a backward takes results of the forward, a packed weight is the weight.
DERIVED = {"attention_backward": ("out", "lse"), "packed_linear": ("panels",)}


def _consistent(spec: OpSpec, values: dict[str, Any]) -> None:
    """Make the derived arguments of the drawn ones.

    Results of a forward are taken from the float64 truth and rounded to float32 at first, so that machines whose
    float64 differs in the last bits give the same ones.
    """
    if spec.name == "packed_linear":
        step = values["panels"].shape[2] // packed_linear.PANEL_COLUMNS
        values["panels"] = packed_linear.pack(values["weight"], step)
    if spec.name == "attention_backward":
        forward = registry.spec("attention")
        given = {n: values[n] for n in (*forward.tensors, *forward.scalars)}
        with exact(), torch.no_grad():
            found = forward.reference(**{n: v.cpu() if isinstance(v, torch.Tensor) else v for n, v in given.items()})
        for name in DERIVED[spec.name]:
            dtype = dispatch.result_dtype(forward, forward.results[name], given)
            values[name] = found[name].float().to(values[name].device, dtype)


def fill(
    arg: Tensor, shape: tuple[int, ...], dtype: torch.dtype, kind: str, random: Random, dims: shapes.Dims
) -> torch.Tensor:
    """Values of one argument: its own domain, at the recipe's scale."""
    domain = arg.values
    if domain.make is not None:
        return domain.make(random, dims, shape).to(dtype)
    if dtype == torch.bool:
        return random.uniform(shape) < 0.7
    if domain.codes is not None and not dtype.is_floating_point:
        return random.integers(*domain.codes, shape).to(dtype)
    if domain.low is not None and domain.high is not None:
        return _round(domain.low + (domain.high - domain.low) * random.uniform(shape), dtype)
    if kind == "integers":
        return random.integers(-3, 4, shape).to(dtype)
    base = random.normal(shape) * domain.scale
    half = dtype == torch.float16
    if kind == "large":
        base = base * (16.0 if half else 1e3)
    elif kind == "tiny":
        base = base * (1e-3 if half else 1e-12)
    elif kind == "mixed":
        spread = 5 if half else 13
        base = base * random.powers(-spread, spread + 1, shape)
    result = _round(base, dtype)
    if kind == "specials" and result.numel():
        flat = result.reshape(-1)
        for special in (math.nan, math.inf, -math.inf):
            if random.integer(0, 2):
                flat[random.integer(0, flat.numel())] = special
    return result


def _round(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """float64 values in `dtype`, to nearest; the narrow ones from float32, so that two roundings are two everywhere."""
    return values if dtype == torch.float64 else values.float().to(dtype)


def _lay_out(dense: torch.Tensor, layout: str, random: Random) -> torch.Tensor:
    """The same values in another memory layout; what lies between them is NaN (or its integer stand-in)."""
    if dense.ndim == 0 or layout == "contiguous":
        return dense
    if layout == "transposed":
        order = random.permutation(dense.ndim)
        return dense.permute(order).contiguous().permute(sorted(range(dense.ndim), key=order.__getitem__))
    if layout == "expanded":
        if dense.numel() == 0:
            return dense
        axis = random.integer(0, dense.ndim)
        return dense.narrow(axis, 0, 1).contiguous().expand(dense.shape)
    if layout == "offset":
        buffer = _poisoned((dense.numel() + 3,), dense.dtype)
        view = buffer[3:].view(dense.shape)
    elif layout == "sliced":
        buffer = _poisoned(tuple(s + 2 for s in dense.shape), dense.dtype)
        view = buffer[tuple(slice(1, s + 1) for s in dense.shape)]
    else:
        buffer = _poisoned(tuple(2 * s + 1 for s in dense.shape), dense.dtype)
        view = buffer[tuple(slice(1, 2 * s + 1, 2) for s in dense.shape)]
    view.copy_(dense)
    return view


def _strided(dense: torch.Tensor, strides: list[int]) -> torch.Tensor:
    """The values at these strides; where several elements share memory, the first one's."""
    if list(dense.stride()) == list(strides) or dense.numel() == 0:
        return dense
    span = 1 + sum((n - 1) * s for n, s in zip(dense.shape, strides, strict=True))
    own = tuple(slice(0, 1) if s == 0 else slice(None) for s in strides)
    view = _poisoned((span,), dense.dtype).as_strided(dense.shape, tuple(strides))
    view[own].copy_(dense[own])
    return view


def _poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    if dtype == torch.bool:
        return torch.ones(shape, dtype=dtype)
    if not dtype.is_floating_point:
        return torch.full(shape, torch.iinfo(dtype).max // 2, dtype=dtype)
    return torch.full(shape, math.nan, dtype=dtype)


def lay_out_result(
    shape: tuple[int, ...], dtype: torch.dtype, layout: str, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """A poisoned result of the given layout inside a guarded buffer: (result, buffer)."""
    guard = 64
    if layout == "sliced" and shape:
        inner = tuple(s + 2 for s in shape)
        buffer = _poisoned((math.prod(inner) + 2 * guard,), dtype).to(device)
        body = buffer[guard : guard + math.prod(inner)].view(inner)
        return body[tuple(slice(1, s + 1) for s in shape)], buffer
    buffer = _poisoned((math.prod(shape) + 2 * guard,), dtype).to(device)
    body = buffer[guard : guard + math.prod(shape)]
    if layout == "transposed" and len(shape) > 1:
        return body.view(*shape[:-2], shape[-1], shape[-2]).mT, buffer
    return body.view(shape), buffer


def recipe_of_case(spec: OpSpec, case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """The recipe of a named case, every tensor contiguous."""
    present = {n: tuple(case.args[n]) for n in spec.tensors if n in case.args}
    scalars = {n: case.args[n] for n in spec.scalars if n in case.args}
    plain = {n: v for n, v in scalars.items() if spec.scalars[n].star is None}
    stars = {s.star: tuple(scalars[n]) for n, s in spec.scalars.items() if s.star is not None}
    bound = {n: shape for n, shape in present.items() if not spec.tensors[n].broadcast}
    dims = shapes.bind(bound, {n: spec.tensors[n].pattern for n in bound}, stars)
    tensors = {}
    for name, shape in present.items():
        arg = spec.tensors[name]
        core = sum(len(dims.stars[t[1:]]) if t.startswith("*") else 1 for t in arg.pattern.core)
        core -= sum(t.endswith("?") and t[:-1] in dims.absent for t in arg.pattern.core)
        own = dtype if dtype in arg.dtypes else arg.dtypes[0]
        tensors[name] = {"loop": list(shape[: len(shape) - core]), "layout": "contiguous", "dtype": dtype_name(own)}
        if arg.broadcast:
            tensors[name] |= {"ones": [False] * 6, "loop": [], "shape": list(shape)}
    overload = next((o for o in spec.overloads if o in present), "default")
    recipe = {
        "op": spec.name,
        "overload": overload,
        "dtype": dtype_name(dtype),
        "kind": "normal",
        "sizes": {n: size for n, size in dims.sizes.items() if n not in dims.stars},
        "groups": {n: list(group) for n, group in dims.stars.items()},
        "absent": sorted(dims.absent),
        "tensors": tensors,
        "scalars": {n: dtype_name(v) if isinstance(v, torch.dtype) else v for n, v in plain.items()},
        "out": "contiguous",
        "seed": 0,
    }
    if spec.complete is not None:
        spec.complete(recipe)
    return recipe
