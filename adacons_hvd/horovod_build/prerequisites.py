"""Is everything here that the build needs? All that is missing is reported at once, before anything is downloaded."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from . import cuda, standards
from .errors import BuildError
from .frameworks import framework_version, installed_frameworks
from .recipe import Recipe, compiler

# Measured: a build for both frameworks takes 0.4 GB at its largest; the rest is room to breathe.
DISK_NEEDED = 800_000_000
_PYTHON_PACKAGES = ("wheel", "packaging", "cffi", "cloudpickle", "psutil", "PyYAML")


@dataclass(frozen=True)
class Missing:
    """One thing that is not there: the sentence about it, and what would bring it."""

    sentence: str
    apt: tuple[str, ...] = ()
    pip: tuple[str, ...] = ()


def check(recipe: Recipe, cache: Path) -> None:
    """Raises a `BuildError` that names everything missing for `recipe`, with the lines that install it."""
    missing = list(find_missing(recipe, cache))
    if missing:
        raise BuildError(describe(missing))


def describe(missing: list[Missing]) -> str:
    """The sentences, then one apt line and one pip line for all of them."""
    lines = [item.sentence for item in missing]
    if apt := sorted({package for item in missing for package in item.apt}):
        sudo = "" if os.geteuid() == 0 else "sudo "
        lines.append(f"On Debian or Ubuntu:  {sudo}apt-get install --no-install-recommends {' '.join(apt)}")
    if pip := sorted({package for item in missing for package in item.pip}):
        quoted = " ".join(f"'{package}'" for package in pip)
        lines.append(f"In this environment:  {sys.executable} -m pip install {quoted}")
    lines.append("Then run the same command again.")
    return "\n".join(lines)


def find_missing(recipe: Recipe, cache: Path) -> Iterator[Missing]:
    """Everything the build of `recipe` needs and does not find, most basic first."""
    yield from _platform()
    yield from _python(recipe)
    yield from _tools()
    compiles = standards.supports(compiler(), standards.STANDARDS[0])
    if not compiles:
        yield Missing(f"No C++17 compiler: {compiler()!r} is not there or cannot compile.", apt=("g++",))
    if compiles:
        yield from _standards(recipe)
    if recipe.mpi:
        yield from _mpi(compiles)
    if recipe.nccl:
        yield from (Missing(problem.sentence, pip=problem.pip) for problem in cuda.problems(recipe.frameworks))
    yield from _disk(cache)


def _platform() -> Iterator[Missing]:
    if platform.system() != "Linux":
        yield Missing(f"This build is for Linux, not {platform.system()}: use the Docker image.")


def _python(recipe: Recipe) -> Iterator[Missing]:
    if not recipe.frameworks:
        yield Missing("Neither PyTorch nor TensorFlow is installed for Horovod to be built against.", pip=("torch",))
    for name in sorted(set(recipe.frameworks) - set(installed_frameworks())):
        yield Missing(f"A build for {name} was asked for, and {name} is not installed here.", pip=(name,))
    setuptools = _version("setuptools")
    if not setuptools or int(setuptools.split(".")[0]) >= 80:
        found = f"setuptools {setuptools}" if setuptools else "no setuptools"
        yield Missing(f"Horovod's setup.py needs setuptools below 80; here is {found}.", pip=("setuptools<80",))
    absent = tuple(package for package in _PYTHON_PACKAGES if not _version(package))
    if absent:
        yield Missing(f"Python packages that Horovod needs are missing: {', '.join(absent)}.", pip=absent)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        yield Missing(f"Python's C headers are missing ({header}).", apt=(f"python{version}-dev",))


def _tools() -> Iterator[Missing]:
    for tool in ("make", "patch"):
        if not shutil.which(tool):
            yield Missing(f"The program {tool!r} is missing.", apt=(tool,))
    cmake = os.environ.get("HOROVOD_CMAKE", "cmake")
    try:
        answer = subprocess.run([cmake, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    found = re.search(r"version (\d+)\.(\d+)", answer)
    if not found:
        yield Missing("CMake is missing.", apt=("cmake",))
    elif (int(found[1]), int(found[2])) < (3, 13):
        yield Missing(f"CMake {found[1]}.{found[2]} is too old: Horovod needs 3.13 or newer.", apt=("cmake",))


def _mpi(compiler_works: bool) -> Iterator[Missing]:
    advice = "Install MPI, or build without it: --gloo-only."
    if not shutil.which("mpicxx"):
        yield Missing(f"MPI's compiler wrapper 'mpicxx' is missing. {advice}", apt=("libopenmpi-dev",))
    elif compiler_works and not _compiles("mpicxx", "#include <mpi.h>"):
        yield Missing(f"'mpicxx' cannot compile against mpi.h. {advice}", apt=("libopenmpi-dev",))
    if not shutil.which("mpirun"):
        yield Missing(f"MPI's launcher 'mpirun' is missing. {advice}", apt=("openmpi-bin",))
    elif not (shutil.which("ssh") or shutil.which("rsh")):
        yield Missing("Open MPI starts nothing, not even on this machine, without ssh.", apt=("openssh-client",))


def _standards(recipe: Recipe) -> Iterator[Missing]:
    for name in recipe.frameworks:
        least = standards.stated(name)
        if least > standards.STANDARDS[0] and not standards.supports(compiler(), least):
            yield Missing(
                f"The headers of {name} {framework_version(name)} need C++{least}, and {compiler()!r} does not know "
                "it: install a newer compiler (g++ has C++20 from 11 on) or name one in CXX.",
                apt=("g++",),
            )


def _disk(cache: Path) -> Iterator[Missing]:
    free = shutil.disk_usage(cache).free
    if free < DISK_NEEDED:
        yield Missing(
            f"The build needs {DISK_NEEDED / 1e9:.1f} GB of disk and {cache} has {free / 1e9:.1f} GB free: free some, "
            "or point ADACONS_CACHE at a folder on another disk."
        )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _compiles(program: str, source: str) -> bool:
    """Whether a compiler turns a line into an object file: a wrapper on PATH need not have a compiler behind it."""
    return not standards.complaint(program, source, standards.STANDARDS[0])
