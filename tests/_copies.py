"""Copies of the package that differ from the installed one: another build of the extension, or other sources."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
#: What the package is built and tested from.
PARTS = ("csrc", "kernels", "python", "tests", "CMakeLists.txt", "pyproject.toml")


def tool(name: str) -> str:
    """A build tool of this environment, else the machine's."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if found is None:
        raise SystemExit(f"{name} is missing: python -m pip install -r requirements-test.txt")
    return found


def configure(source: Path, build: Path, **options: str) -> None:
    """Run CMake's configuration of the extension for this Python."""
    pybind11 = subprocess.run(
        [sys.executable, "-m", "pybind11", "--cmakedir"], check=True, capture_output=True, text=True
    ).stdout.strip()
    given = {
        "CMAKE_MAKE_PROGRAM": tool("ninja"),
        "CMAKE_EXPORT_COMPILE_COMMANDS": "ON",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11,
        **options,
    }
    command = [tool("cmake"), "-G", "Ninja", "-S", str(source), "-B", str(build)]
    done = subprocess.run(
        [*command, *[f"-D{k}={v}" for k, v in given.items()]], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"cmake failed:\n{done.stdout}{done.stderr}")


def copy_sources(to: Path) -> None:
    """The sources under `to`, as they are now."""
    for part in PARTS:
        source, skip = ROOT / part, shutil.ignore_patterns("__pycache__", "*.so", ".hypothesis")
        if source.is_dir():
            shutil.copytree(source, to / part, ignore=skip)
        else:
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, to / part)


def installed_extension() -> Path:
    """The extension of the installed package."""
    code = "import torch, isotile._C as c; print(c.__file__)"
    return Path(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip())


def instruction_sets() -> list[str]:
    """The instruction sets of the installed extension that this CPU runs."""
    code = "import torch, isotile._C as c; print(*[name for name, runs in c.instruction_sets() if runs])"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()


def lay_out(site: Path, sources: Path, extension: Path) -> None:
    """A folder that imports as the package: links to the sources and to the extension."""
    package = site / "isotile"
    if package.exists():
        shutil.rmtree(package)
    package.mkdir(parents=True)
    for entry in (sources / "python" / "isotile").iterdir():
        if entry.name != "__pycache__" and entry.suffix != ".so":
            (package / entry.name).symlink_to(entry)
    (package / "kernels").symlink_to(sources / "kernels")
    (package / f"_C{SUFFIX}").symlink_to(extension)
    # An editable install is found by a hook on sys.meta_path, which comes before every folder.
    (site / "sitecustomize.py").write_text(
        "import sys\n"
        "sys.meta_path[:] = [f for f in sys.meta_path if type(f).__name__ != 'ScikitBuildRedirectingFinder']\n"
    )


def environment(site: Path, **more: str) -> dict[str, str]:
    """The environment of a process that imports the package laid out in `site`."""
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH")])),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
        **more,
    }


def check_import(site: Path, env: dict[str, str]) -> None:
    """Stops unless the package and its extension are those of `site`."""
    code = "import torch, isotile, isotile._C as c; print(isotile.__file__); print(c.__file__)"
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    if done.returncode or [Path(p).parent for p in done.stdout.split()] != [site / "isotile"] * 2:
        raise SystemExit(f"the copy does not import:\n{done.stdout}{done.stderr[-4000:]}")
