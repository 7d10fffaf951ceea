"""Shape patterns (`"... m? k"`), binding them to tensors, and the canonical views that kernels get.

Patterns follow NumPy's generalised ufuncs: core dimensions by name, `m?` for one that a 1-D operand may lack, `*n` for
one or more dimensions bound as one, `...` for leading loop dimensions that broadcast between all tensors having them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

Size = Any  # int, or torch.SymInt while tracing


class ShapeError(ValueError):
    """A tensor whose shape does not fit; carries the argument's name for the caller's message."""

    def __init__(self, argument: str, text: str) -> None:
        super().__init__(text)
        self.argument = argument


@dataclasses.dataclass(frozen=True)
class Pattern:
    """One parsed shape pattern."""

    text: str
    loop: bool  # starts with `...`
    core: tuple[str, ...]  # names, `*n` and `m?` with their marks
    star: str | None  # the name behind `*`, if any
    optional: tuple[str, ...]  # the names before `?`

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(token.strip("*?") for token in self.core)


@functools.cache
def parse(text: str) -> Pattern:
    """Parse a pattern such as `"... m? k"` or `"... *n"`."""
    tokens = text.split()
    loop = bool(tokens) and tokens[0] == "..."
    core = tuple(tokens[1:] if loop else tokens)
    stars = [t[1:] for t in core if t.startswith("*")]
    optional = [t[:-1] for t in core if t.endswith("?")]
    if len(stars) > 1 or "..." in core:
        raise ValueError(f"shape pattern {text!r}: at most one `*`, and `...` only in front")
    return Pattern(text, loop, core, stars[0] if stars else None, tuple(optional))


@dataclasses.dataclass
class Dims:
    """Sizes bound by the patterns of a call: `dims.n`, `dims["n"]`, `dims.loop`; `dims.rows` is the loop's product."""

    sizes: dict[str, Size]
    stars: dict[str, tuple[Size, ...]]
    absent: set[str]  # optional core dimensions that an operand lacked
    loop: tuple[Size, ...]

    def __getattr__(self, name: str) -> Size:
        try:
            return self.__dict__["sizes"][name]
        except KeyError:
            raise AttributeError(name) from None

    def __getitem__(self, name: str) -> Size:
        return self.sizes[name]

    @property
    def rows(self) -> Size:
        return math.prod(self.loop)

    def shape(self, pattern: Pattern) -> tuple[Size, ...]:
        """The shape that `pattern` stands for under these sizes."""
        out = list(self.loop) if pattern.loop else []
        for token in pattern.core:
            name = token.strip("*?")
            if token.startswith("*"):
                out.extend(self.stars[name])
            elif not (token.endswith("?") and name in self.absent):
                out.append(self.sizes[name])
        return tuple(out)


def _same(a: Size, b: Size) -> bool:
    return bool(a == b)


def merge_loops(shapes: Sequence[tuple[Size, ...]], same: Callable[[Size, Size], bool]) -> tuple[Size, ...] | None:
    """The broadcast of loop shapes, or None where they do not fit. `same` decides equality, also for symbolic sizes."""
    rank = max((len(s) for s in shapes), default=0)
    out: list[Size] = []
    for position in range(-rank, 0):
        size: Size = 1
        for shape in shapes:
            if len(shape) < -position:
                continue
            other = shape[position]
            if isinstance(other, int) and other == 1:
                continue
            if isinstance(size, int) and size == 1:
                size = other
            elif not same(size, other):
                return None
        out.append(size)
    return tuple(out)


def bind(
    shapes: dict[str, tuple[Size, ...]],
    patterns: dict[str, Pattern],
    stars: dict[str, tuple[Size, ...]],
    same: Callable[[Size, Size], bool] = _same,
) -> Dims:
    """Bind the patterns of all present tensors to their shapes.

    Args:
        shapes: the shape of each present tensor, by argument name, in declaration order.
        patterns: its pattern.
        stars: lengths of `*` groups that an argument such as `normalized_shape` fixes.
        same: equality of two sizes; while tracing it may record a check instead of deciding.

    Raises:
        ShapeError: naming the first argument that does not fit, what was wanted and what came.
    """
    sizes: dict[str, Size] = {}
    owner: dict[str, str] = {}
    groups = dict(stars)
    star_owner = dict.fromkeys(stars, "normalized_shape")
    absent: set[str] = set()
    loops: dict[str, tuple[Size, ...]] = {}
    for argument, shape in shapes.items():
        pattern = patterns[argument]
        core = list(pattern.core)
        if pattern.optional and len(shape) == len(core) - 1:
            core.remove(pattern.optional[0] + "?")
            absent.add(pattern.optional[0])
        width = len(core)
        if pattern.star is not None:
            if pattern.star not in groups:
                groups[pattern.star] = shape if not pattern.loop else shape[len(shape) - 1 :]
                star_owner[pattern.star] = argument
            width += len(groups[pattern.star]) - 1
        if len(shape) < width or (not pattern.loop and len(shape) != width):
            at_least, plural = "at least " if pattern.loop else "", "" if width == 1 else "s"
            raise ShapeError(
                argument,
                f"wanted shape [{_spell(pattern, groups)}] ({at_least}{width} dimension{plural}), got {_show(shape)}",
            )
        if pattern.loop:
            loops[argument] = tuple(shape[: len(shape) - width])
        position = len(shape) - width
        for token in core:
            name = token.strip("*?")
            if token.startswith("*"):
                group = groups[name]
                given = tuple(shape[position : position + len(group)])
                for want, got in zip(group, given, strict=True):
                    if not same(want, got):
                        raise ShapeError(
                            argument,
                            f"wanted dimensions {_show(group)} (from {star_owner[name]}), got {_show(given)} "
                            f"in shape {_show(shape)}",
                        )
                position += len(group)
                continue
            got = shape[position]
            if name not in sizes:
                sizes[name], owner[name] = got, argument
            elif not same(sizes[name], got):
                raise ShapeError(
                    argument,
                    f"wanted shape [{_spell(pattern, groups)}] with {name} = {sizes[name]} (from {owner[name]}), "
                    f"got {_show(shape)}",
                )
            position += 1
    for name, group in groups.items():
        sizes[name] = math.prod(group)
    sizes.update(dict.fromkeys(absent, 1))
    loop: tuple[Size, ...] = ()
    for argument, shape in loops.items():
        merged = merge_loops([loop, shape], same)
        if merged is None:
            raise ShapeError(
                argument, f"wanted leading dimensions that broadcast with {_show(loop)}, got {_show(shape)}"
            )
        loop = merged
    return Dims(sizes, groups, absent, loop)


def _show(shape: Sequence[Size]) -> str:
    return "[" + ", ".join(str(s) for s in shape) + "]"


def _spell(pattern: Pattern, groups: dict[str, tuple[Size, ...]]) -> str:
    words = ["..."] if pattern.loop else []
    for token in pattern.core:
        if token.startswith("*") and token[1:] in groups:
            words.extend(str(s) for s in groups[token[1:]])
        else:
            words.append(token)
    return ", ".join(words)


@dataclasses.dataclass(frozen=True, slots=True)
class View:
    """What a plan knows of a tensor: everything but its data.

    `source` is the name of the argument or result whose data it addresses, from that tensor's own first element.
    """

    source: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return math.prod(self.shape)

    def is_contiguous(self) -> bool:
        expected = 1
        for size, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if size != 1 and stride != expected:
                return False
            expected *= size
        return True

    def with_dims(self, shape: Sequence[int], strides: Sequence[int]) -> View:
        return View(self.source, tuple(shape), tuple(strides), self.dtype, self.device)

    def transpose(self, a: int, b: int) -> View:
        shape, strides = list(self.shape), list(self.strides)
        shape[a], shape[b] = shape[b], shape[a]
        strides[a], strides[b] = strides[b], strides[a]
        return self.with_dims(shape, strides)

    def move_last(self, dim: int) -> View:
        order = [i for i in range(self.ndim) if i != dim % self.ndim] + [dim % self.ndim]
        return self.with_dims([self.shape[i] for i in order], [self.strides[i] for i in order])

    def unsqueeze(self, dim: int) -> View:
        shape, strides = list(self.shape), list(self.strides)
        dim = dim % (self.ndim + 1)
        shape.insert(dim, 1)
        strides.insert(dim, 0)
        return self.with_dims(shape, strides)

    def expand(self, shape: Sequence[int]) -> View:
        """As `torch.Tensor.expand`: strides become 0 where a size of 1 is repeated or a dimension is added."""
        lead = len(shape) - self.ndim
        strides = [0] * lead
        for have, want, stride in zip(self.shape, shape[lead:], self.strides, strict=True):
            if have != want and have != 1:
                raise ValueError(f"cannot expand {self.shape} to {tuple(shape)}")
            strides.append(stride if have == want and have != 1 else 0)
        return self.with_dims(shape, strides)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This view of `tensor`, the tensor that `source` names."""
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset())


def contiguous_strides(shape: Sequence[Any]) -> tuple[Any, ...]:
    """Row-major strides; sizes may be symbolic."""
    strides: list[Any] = []
    step: Any = 1
    for size in reversed(shape):
        strides.append(step)
        step = step * (size if not isinstance(size, int) else max(size, 1))
    return tuple(reversed(strides))


def flatten_group(view: View, start: int, length: int) -> View | None:
    """`view` with `length` dimensions from `start` as one, or None where no single stride can do it."""
    if length == 1:
        return view
    shape, strides = view.shape[start : start + length], view.strides[start : start + length]
    total = math.prod(shape)
    kept = [(n, s) for n, s in zip(shape, strides, strict=True) if n != 1]
    for (_, outer), (inner_size, inner) in itertools.pairwise(kept):
        if total and outer != inner_size * inner:
            return None
    stride = kept[-1][1] if kept else 1
    return view.with_dims(
        (*view.shape[:start], total, *view.shape[start + length :]),
        (*view.strides[:start], stride, *view.strides[start + length :]),
    )


def coalesce_loops(views: list[View | None], loop_rank: list[int]) -> list[View | None]:
    """Merge adjacent loop dimensions wherever every view can, and drop those of size 1.

    Args:
        views: canonical views; those with a loop all have the same loop sizes.
        loop_rank: how many leading dimensions of each view are loop dimensions (0 for none).
    """
    rank = max(loop_rank, default=0)
    if rank == 0:
        return views
    active = [(i, v) for i, v in enumerate(views) if v is not None and loop_rank[i] == rank]
    sizes = list(active[0][1].shape[:rank])
    keep: list[list[int]] = []
    for d in range(rank):
        if sizes[d] == 1:
            continue
        if keep:
            last = keep[-1][-1]
            if all(v.strides[last] == v.strides[d] * sizes[d] for _, v in active):
                keep[-1].append(d)
                continue
        keep.append([d])
    out = list(views)
    for i, v in active:
        shape = [math.prod(sizes[d] for d in group) for group in keep]
        strides = [v.strides[group[-1]] for group in keep]
        out[i] = v.with_dims((*shape, *v.shape[rank:]), (*strides, *v.strides[rank:]))
    return out
