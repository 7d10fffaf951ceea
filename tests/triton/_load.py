"""Loads the kernel folder and the launch module without the rest of the package, for tests of the kernels alone."""

import importlib
import importlib.util
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def _package(name, folder):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return name


def kernel(op):
    """The module kernels/triton/<op>.py."""
    return importlib.import_module(f"{_package('isotile_triton_kernels', ROOT / 'kernels' / 'triton')}.{op}")


def backend(name):
    """The module python/isotile/backends/<name>.py, which must not need its siblings."""
    full = f"isotile_alone_{name}"
    if full not in sys.modules:
        spec = importlib.util.spec_from_file_location(full, ROOT / "python" / "isotile" / "backends" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[full] = module
        spec.loader.exec_module(module)
    return sys.modules[full]
