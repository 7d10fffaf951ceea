"""The launcher that replays the launch records of Triton kernels.

A kernel file's `prepare` describes its work once per signature as `Launch`es (kernels/triton/_launch.py) whose
arguments are `View`s (operands) and `Scratch` (temporary memory) where the kernel takes pointers. `Replay` binds such a
list to positions in the operator's tensor list; what remains per call is: allocate scratch, take the pointers, check
their alignment, and call the compiled kernel's own launcher. Triton's `kernel[grid](...)` instead binds and specialises
every argument each time, which costs more host time than PyTorch's whole operator.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

# Contracting a * b + c to one rounding is Triton's default up to 3.9 and not after it; results must not shift.
_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True, eq=False)
class View:
    """What `prepare` may know of a tensor. Any object with these attributes serves."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor):
        return None if tensor is None else cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device)

    def numel(self) -> int:
        total = 1
        for size in self.shape:
            total *= size
        return total


def _role(arg):
    """ "scratch" or "descriptor" for those records of kernels/triton/_launch.py, else None."""
    return getattr(type(arg), "role", None)


def run_plain(launches, tensors):
    """Runs launches the ordinary way, `tensors` mapping `id(view)` to its tensor. For the interpreter and as truth."""
    memory = {}

    def resolve(arg):
        if id(arg) in tensors:
            return tensors[id(arg)]
        if _role(arg) == "scratch":
            if id(arg) not in memory:
                memory[id(arg)] = torch.empty(arg.shape, dtype=arg.dtype, device=_device(tensors))
            return memory[id(arg)]
        if _role(arg) == "descriptor":
            return _host_descriptor(arg, resolve(arg.base))
        return arg

    for launch in launches:
        launch.kernel[launch.grid](*[resolve(arg) for arg in launch.args], **_OPTIONS, **launch.meta)


def _device(tensors):
    return next(iter(tensors.values())).device


def _host_descriptor(descriptor, base):
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(base, list(descriptor.shape), list(descriptor.strides), list(descriptor.block))


class Replay:
    """A list of launches bound to an operator's tensors, to be run many times.

    `views` are the objects that `prepare` saw. `run` gets `count` tensors, that of the i-th view at `positions[i]`;
    without these, one for each view in order (absent ones None).
    """

    def __init__(self, launches, views, device, positions=None, count=None):
        self.device = torch.device(device)
        self.index = self.device.index if self.device.type == "cuda" else None
        places = range(len(views)) if positions is None else positions
        count = len(views) if count is None else count
        index = {id(view): i for view, i in zip(views, places, strict=True) if view is not None}
        self.scratch: list[tuple[tuple[int, ...], torch.dtype]] = []

        def slot(arg):
            if _role(arg) == "scratch" and id(arg) not in index:
                index[id(arg)] = count + len(self.scratch)
                self.scratch.append((tuple(arg.shape), arg.dtype))
            return index.get(id(arg))

        self.steps = [_Step(launch, slot) for launch in launches]
        self.launches = launches  # views and scratch are known by identity: keep them alive
        self.stream: Callable[[int], int] | None = None
        self.ordinal = 0

    def run(self, tensors):
        """Runs on the device's current stream."""
        if self.index is not None and _current_device() != self.index:
            with torch.cuda.device(self.index):
                return self.run(tensors)
        if self.scratch:
            tensors = [*tensors, *[torch.empty(s, dtype=d, device=self.device) for s, d in self.scratch]]
        if self.stream is None:
            from triton.runtime import driver

            self.stream = driver.active.get_current_stream
            self.ordinal = driver.active.get_current_device() if self.index is None else self.index
        stream = self.stream(self.ordinal)
        for step in self.steps:
            step.run(tensors, stream)
        return None


#: What torch.cuda.current_device() asks after making sure that CUDA is initialised, which a CUDA tensor proves.
_current_device = getattr(torch._C, "_cuda_getDevice", torch.cuda.current_device)


class _Step:
    """One launch. Compiled kernels are kept by pointer alignment, since Triton specialises on it."""

    __slots__ = ("compiled", "descriptors", "fallback", "grid", "launch", "pointers", "template")

    def __init__(self, launch, slot):
        self.launch = launch
        self.grid = (*launch.grid, 1, 1)[:3]
        self.template = list(launch.args)
        self.pointers, self.descriptors, self.compiled = [], [], {}
        for position, arg in enumerate(launch.args):
            if _role(arg) == "descriptor":
                self.descriptors.append((position, slot(arg.base), _DescriptorMaker(arg)))
            elif (i := slot(arg)) is not None:
                self.pointers.append((position, i))
        self.fallback = [_Step(other, slot) for other in launch.fallback]

    def run(self, tensors, stream):
        args = self.template.copy()
        aligned = 0
        for position, i in self.pointers:
            pointer = tensors[i].data_ptr()
            aligned = aligned + aligned + (pointer & 15 == 0)
            args[position] = pointer
        for position, i, make in self.descriptors:
            if tensors[i].data_ptr() & 15:
                for other in self.fallback:
                    other.run(tensors, stream)
                return
            args[position] = make(tensors[i])
        call = self.compiled.get(aligned)
        if call is None:
            # the first launch goes through Triton's own path, which compiles; its kernel is then called directly
            kernel = self.plain(tensors)
            self.compiled[aligned] = _slow if fast_launch_refusal() else fast_launcher(kernel, self.launch)
        elif call is _slow or _hooks_wanted():
            self.plain(tensors)
        else:
            call(self.grid, stream, args)

    def plain(self, tensors):
        args = self.template.copy()
        for position, i in self.pointers:
            args[position] = tensors[i]
        for position, i, make in self.descriptors:
            args[position] = make(tensors[i])
        return self.launch.kernel[self.launch.grid](*args, **_OPTIONS, **self.launch.meta)


class _DescriptorMaker:
    """Makes a launch's host descriptor over a tensor. What Triton checks of its shape is checked the first time."""

    __slots__ = ("descriptor", "fields", "type")

    def __init__(self, descriptor):
        self.descriptor = descriptor
        self.type: Any = None
        self.fields: dict[str, Any] | None = None

    def __call__(self, base):
        if self.fields is None:
            made = _host_descriptor(self.descriptor, base)
            self.type, self.fields = type(made), {k: v for k, v in vars(made).items() if k != "base"}
            return made
        made = object.__new__(self.type)
        made.__dict__.update(self.fields, base=base)
        return made


def _slow(grid, stream, args):
    raise AssertionError("the slow path has no launcher of its own")


_refusal: list = []


def fast_launch_refusal() -> str | None:
    """Why compiled kernels cannot be launched directly here, or None. Decided once per process."""
    if not _refusal:
        import triton

        version = tuple(int(part) for part in triton.__version__.split(".")[:2])
        if triton.knobs.runtime.interpret:
            _refusal.append("Triton's interpreter has no compiled kernels")
        elif not (3, 6) <= version <= (3, 9):
            _refusal.append(f"triton {triton.__version__} is outside the tested range 3.6 to 3.9")
        else:
            _refusal.append(None)
    return _refusal[0]


_runtime: list = []


def _hooks_wanted():
    """Profilers set launch hooks; then Triton's own path, which calls them, must run."""
    if not _runtime:
        from triton import knobs

        _runtime.append(knobs.runtime)
    hook = _runtime[0].launch_enter_hook
    return hook is not None and bool(getattr(hook, "calls", True))  # an empty chain of hooks is nobody asking


def fast_launcher(compiled, launch):
    """A function (grid, stream, args) that launches `compiled`, pointers given as integers.

    Triton's launcher takes every parameter of the kernel in declaration order, constants included (it skips them).
    """
    names = launch.kernel.arg_names
    if any(name in launch.meta for name in names[: len(launch.args)]):
        raise TypeError(f"{launch.kernel.__name__}: a positional parameter is given again by name")
    constants = [_constant(launch, name) for name in names[len(launch.args) :]]
    run, function, packed = compiled.run, compiled.function, compiled.packed_metadata

    def call(grid, stream, args):
        run(grid[0], grid[1], grid[2], stream, function, packed, None, None, None, *args, *constants)

    return call


def _constant(launch, name):
    if name in launch.meta:
        return launch.meta[name]
    parameter = launch.kernel.signature.parameters[name]
    if parameter.default is parameter.empty:
        raise TypeError(f"{launch.kernel.__name__}: no value for {name}")
    return parameter.default


class OfflineDriver:
    """Stands in for a GPU so that kernels can be compiled, and only compiled, on a machine without one.

    `triton.runtime.driver.set_active(OfflineDriver("cuda", 90))`, then `kernel.warmup(dtype, ..., grid=(1,))`: the
    ordinary specialisation path runs, which `triton.compile(ASTSource(...))` skips.
    """

    def __init__(self, kind: str, arch):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget(kind, arch, 64 if kind == "hip" and str(arch).startswith("gfx9") else 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def set_current_device(self, device):
        if device != 0:
            raise ValueError("the offline driver has one device, 0")

    def get_current_stream(self, device=None):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def map_python_to_cpp_type(self, type_name):
        return type_name


def compile_launch(launch):
    """Compiles one launch under the active driver, as if every pointer were 16-byte aligned. Returns the kernel."""

    class _Typed:
        """Enough of a tensor for specialisation: Triton asks for dtype and data_ptr."""

        def __init__(self, dtype):
            self.dtype = dtype

        def data_ptr(self):
            return 0

        @staticmethod
        def ptr_range():
            return 0

    def stand_in(arg):
        if _role(arg) == "descriptor":
            from triton.tools.tensor_descriptor import TensorDescriptor

            meta = torch.empty(1, dtype=arg.base.dtype, device="meta")
            return TensorDescriptor(meta, list(arg.shape), list(arg.strides), list(arg.block))
        if hasattr(arg, "strides") and hasattr(arg, "dtype"):
            return _Typed(arg.dtype)
        return arg

    return launch.kernel.warmup(*[stand_in(arg) for arg in launch.args], grid=launch.grid, **_OPTIONS, **launch.meta)
