"""A Neuron device made up of CPU memory: PrivateUse1 renamed to `neuron`, every ATen operator through a fallback.

Run as a script (renaming a device lasts for the process), it checks isotile on such tensors and prints what it saw as
JSON. The kernels run in the emulator, which stands in for the SDK's compiler and the chip.
"""

from __future__ import annotations

import ctypes
import json
import warnings

import torch
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("neuron")
LIBRARY = torch.library.Library("_", "IMPL")


CPU, EXTENSION = 1, 12  # DLPack's device types; PyTorch reads kDLExtDev as PrivateUse1
ctypes.pythonapi.PyCapsule_GetPointer.restype = ctypes.c_void_p
ctypes.pythonapi.PyCapsule_GetPointer.argtypes = [ctypes.py_object, ctypes.c_char_p]


def relabel(tensor: torch.Tensor, device_type: int) -> torch.Tensor:
    """The same memory on another device, by writing the device type into a DLPack capsule."""
    capsule = torch.utils.dlpack.to_dlpack(tensor.detach())
    pointer = ctypes.pythonapi.PyCapsule_GetPointer(capsule, b"dltensor")
    ctypes.c_int32.from_address(pointer + ctypes.sizeof(ctypes.c_void_p)).value = device_type
    return torch.utils.dlpack.from_dlpack(capsule)


def on_device(memory: torch.Tensor) -> torch.Tensor:
    return relabel(memory, EXTENSION)


def on_cpu(value):
    if isinstance(value, torch.Tensor) and value.device.type == "neuron":
        return relabel(value, CPU)
    if isinstance(value, torch.device) and value.type == "neuron":
        return torch.device("cpu")
    return value


def run_on_cpu(operator, *args, **kwargs):
    if operator is torch.ops.aten._copy_from.default:  # a device's half of copy_
        source, target = args[:2]
        on_cpu(target).copy_(on_cpu(source))
        return target
    written = {}
    out = kwargs.get("out")

    def move(value):
        moved = on_cpu(value)
        if value is out and not out.numel():
            moved = torch.empty(0, dtype=out.dtype)  # memory that can be resized
        if moved is not value and isinstance(value, torch.Tensor):
            written[id(moved)] = value
        return moved

    result = operator(*tree_map(move, args), **tree_map(move, kwargs))
    target = kwargs.get("device")
    if target is not None and torch.device(target).type == "cpu":
        return result

    def back(value):
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in written:
            return on_device(value)
        if written[id(value)].shape != value.shape:
            out.data = on_device(value)
        return written[id(value)]

    return tree_map(back, result)


def main():
    LIBRARY.fallback(run_on_cpu, "PrivateUse1")
    import isotile
    from isotile import nki_emulator
    from isotile.backends import nki as backend
    from isotile.nki_emulator import kernel

    seen = {}
    x = on_device(torch.randn(5, 64))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", isotile.FallbackWarning)
        isotile.softmax(x)
    seen["without_sdk"] = [str(w.message) for w in caught]

    # From here on the emulator is the SDK: it takes this device's tensors.
    nki_emulator.install()
    take = kernel._Arguments.array
    kernel._Arguments.array = lambda self, value: take(self, on_cpu(value))
    backend._modules = lambda: (nki_emulator, nki_emulator, None)
    for name in isotile.registry.specs():
        isotile.library.operator(name).plans.clear()
    seen["info"] = next(b for b in isotile.backends() if b["name"] == "nki")
    seen["runs"] = isotile.explain("softmax", x).backend

    def model(x, weight):
        y = isotile.rms_norm(x, (64,), weight, 1e-6)
        q = y.reshape(1, 1, 5, 64)
        return isotile.attention(q, q, q, is_causal=True)

    def gradients(function, device):
        torch.manual_seed(0)
        leaves = [device(torch.randn(s)).requires_grad_() for s in ((5, 64), (64,))]
        with warnings.catch_warnings():
            warnings.simplefilter("error", isotile.FallbackWarning)
            result = function(*leaves)
            result.sum().backward()
        return [on_cpu(t).detach() for t in (result, *(leaf.grad for leaf in leaves))]

    truth = gradients(model, lambda t: t)
    for how, function in (
        ("eager", model),
        ("compiled", torch.compile(model, backend="aot_eager", fullgraph=True)),
    ):
        got = gradients(function, on_device)
        seen[how] = max(float((a - b).abs().max()) for a, b in zip(got, truth, strict=True))

    wide = on_device(torch.randn(1, 1, 3, 600))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", isotile.FallbackWarning)
        got = isotile.attention(wide, wide, wide)
    seen["fallback"] = [str(w.message) for w in caught]
    want = torch.nn.functional.scaled_dot_product_attention(on_cpu(wide), on_cpu(wide), on_cpu(wide))
    seen["fallback_device"] = got.device.type
    seen["fallback_error"] = float((on_cpu(got) - want).abs().max())
    print(json.dumps(seen, default=str))


if __name__ == "__main__":
    main()
