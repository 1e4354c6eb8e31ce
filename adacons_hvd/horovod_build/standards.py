"""Which C++ standard each framework's headers need, asked of the headers themselves.

Nothing is gained by more than a framework needs: headers written for C++17 need not compile as C++20.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import util
from pathlib import Path

from .errors import BuildError
from .frameworks import FRAMEWORKS, framework_version
from .recipe import compiler

STANDARDS = (17, 20, 23)


@dataclass(frozen=True)
class _Headers:
    """Where to ask: a header that states the standard in a condition, and a small one that must compile."""

    stating: str
    compiled: str
    newest_tried: tuple[int, int]


_HEADERS = {
    "torch": _Headers("ATen/ATen.h", "c10/util/intrusive_ptr.h", (2, 14)),
    "tensorflow": _Headers("absl/base/policy_checks.h", "absl/status/status.h", (2, 21)),
}
_CONDITION = re.compile(r"__cplusplus\s*<\s*(\d{6})L")
# The year and month by which a compiler tells its standard; compilers that are still learning one tell an earlier.
_TOLD = {17: 201703, 20: 202002, 23: 202101}


def cxx_standard(framework: str, include: Path | None = None) -> int:
    """The oldest C++ standard, from 17 on, that the framework's headers accept; a `BuildError` if none is."""
    include = include or include_folder(framework)
    least = stated(framework, include)
    if include is None:
        return least
    source = f"#include <{_HEADERS[framework].compiled}>\n"
    said = ""
    for standard in (standard for standard in STANDARDS if standard >= least):
        said = complaint(compiler(), source, standard, include)
        if not said:
            return standard
    raise BuildError(
        f"{compiler()!r} cannot compile the headers of {framework} {framework_version(framework)} as C++{least} or "
        f"later: install a newer compiler (g++ has C++20 from 11 on) or name one in CXX. It said:\n{said}"
    )


def stated(framework: str, include: Path | None = None) -> int:
    """The standard below which the framework's headers stop the compiler by their own words; the oldest if none."""
    include = include or include_folder(framework)
    if include is None:
        return STANDARDS[0]
    try:
        text = (include / _HEADERS[framework].stating).read_text(errors="replace")
    except OSError:
        return STANDARDS[0]
    years = [int(year) for year in _CONDITION.findall(text)]
    return next((standard for standard in reversed(STANDARDS) if any(year >= _TOLD[standard] for year in years)), 17)


def supports(program: str, standard: int) -> bool:
    """Whether a compiler compiles, and as that standard or what it has of it so far."""
    asserted = f"static_assert(__cplusplus > {_TOLD[standard - 3]}L);" if standard > STANDARDS[0] else ""
    return not complaint(program, f"#include <filesystem>\n{asserted}\n", standard)


def complaint(program: str, source: str, standard: int, *include: Path) -> str:
    """The compiler's first error for a few lines as C++`standard`; empty if they compile."""
    folders = [f"-I{folder}" for folder in include]
    with tempfile.TemporaryDirectory() as scratch:
        command = [program, f"-std=c++{standard}", *folders, "-w", "-x", "c++", "-c", "-o", f"{scratch}/probe.o", "-"]
        try:
            done = subprocess.run(command, input=source, capture_output=True, text=True, timeout=300, check=False)
        except (OSError, subprocess.TimeoutExpired) as error:
            return str(error)
    if done.returncode == 0:
        return ""
    lines = done.stderr.strip().splitlines()
    return next((line for line in lines if "error" in line), lines[-1] if lines else f"exit status {done.returncode}")


def include_folder(framework: str) -> Path | None:
    """The folder of an installed framework's headers; the framework is not imported to find it."""
    spec = util.find_spec(framework)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((path for folder in folders if (path := Path(folder) / "include").is_dir()), None)


def untried(frameworks: tuple[str, ...]) -> list[str]:
    """A sentence for each framework that is newer than any this build has been tried with."""
    sentences = []
    for name in (name for name in FRAMEWORKS if name in frameworks):
        version, newest = framework_version(name), _HEADERS[name].newest_tried
        found = re.match(r"(\d+)\.(\d+)", version)
        if found and (int(found[1]), int(found[2])) > newest:
            tried = ".".join(map(str, newest))
            sentences.append(
                f"{name} {version} is newer than any that this build has been tried with ({tried}); trying."
            )
    return sentences
