"""How the NKI tests run one instruction or one kernel in the emulator."""

from __future__ import annotations

import numpy as np
import pytest

from isotile import nki_emulator
from isotile.nki_emulator import isa as nisa
from isotile.nki_emulator import language as nl


def emulate(kernel, *arrays, target="gen3", cores=0, **kwargs):
    """Run `kernel` on `arrays`; returns its outputs."""
    with nki_emulator.session(target):
        wrapped = nki_emulator.jit(kernel)
        return nki_emulator.simulate(wrapped[cores] if cores else wrapped)(*arrays, **kwargs)


def instruct(body, shape, dtype, *arrays, target="gen3", buffer=None):
    """Load `arrays` to SBUF, let `body(dst, *tiles)` write a tile of `shape` and `dtype`, and return it."""

    def kernel(*tensors):
        tiles = []
        for tensor in tensors:
            tile = nl.ndarray(tensor.shape, tensor.dtype, buffer=nl.sbuf)
            nisa.dma_copy(dst=tile, src=tensor)
            tiles.append(tile)
        dst = nl.ndarray(shape, dtype, buffer=buffer or nl.sbuf)
        body(dst, *tiles)
        if buffer is nl.psum:
            staged = nl.ndarray(shape, dtype, buffer=nl.sbuf)
            nisa.tensor_copy(dst=staged, src=dst)
            dst = staged
        out = nl.ndarray(shape, dtype, buffer=nl.shared_hbm)
        nisa.dma_copy(dst=out, src=dst)
        return out

    return emulate(kernel, *arrays, target=target)


@pytest.fixture(name="emulate")
def _emulate():
    return emulate


@pytest.fixture(name="instruct")
def _instruct():
    return instruct


@pytest.fixture
def normal():
    """Seeded float32 normals of a shape."""
    generator = np.random.default_rng(20240229)
    return lambda *shape: generator.standard_normal(shape).astype(np.float32)
