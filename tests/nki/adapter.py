"""How the NKI tests choose a target and a number of cores for the backend."""

from __future__ import annotations

from isotile import library, nki_emulator, registry
from isotile.backends import BACKENDS
from isotile.backends.nki import NkiBackend

nki_emulator.install()
DEFAULT = BACKENDS["nki"]


def kernel_names():
    return registry.kernel_names("nki")


def use(target="gen3", cores=1):
    """Let calls on the backend run on this target."""
    restore(NkiBackend(target, cores))


def restore(backend=DEFAULT):
    BACKENDS["nki"] = backend
    for name in registry.specs():
        library.operator(name).plans.clear()  # plans of another target
