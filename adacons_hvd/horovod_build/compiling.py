"""The long part: turns the patched source into a wheel, showing how far it has come."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from pathlib import Path

from . import cuda, standards
from .errors import BuildError, disk_full
from .processes import run
from .recipe import Recipe

# A build that takes longer than this hangs; the slowest measured machine took five minutes.
_TIME_LIMIT = 2 * 3600
_PERCENT = re.compile(r"^\s*\[ *(\d+)%\]")
# g++ and clang; nvcc; its parts; CMake; the linker. A file's name, error.cc say, is none of these.
_ERROR = re.compile(
    r"^[^\s].*?: (?:fatal )?error: |^\S+\(\d+\): (?:catastrophic )?error\b"
    r"|^(?:nvcc|ptxas|cc1plus)\b.*\b(?:fatal|error)\b|^CMake Error"
    r"|: undefined reference to |: cannot find -l|^collect2: error"
)


def default_jobs() -> int:
    """One compiler per processor this process may use, but no more than memory holds at 1.5 GB each."""
    processors = len(os.sched_getaffinity(0))
    try:
        pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return processors
    # Free memory leaves out what the kernel would give back from its file cache; count at least two compilers.
    return max(1, min(processors, max(2, int(pages / 1.5e9))))


def build_wheel(recipe: Recipe, tree: Path, workspace: Path, log: Path, jobs: int) -> Path:
    """Builds the wheel of the source in `tree` and returns its path, below `workspace`."""
    found = {f"HOROVOD_{name.upper()}_CXX_STANDARD": str(standards.cxx_standard(name)) for name in recipe.frameworks}
    found |= cuda.settings(recipe.frameworks, workspace / "cuda", recipe.nccl)
    wheels, scratch = workspace / "wheel", workspace / "tmp"
    wheels.mkdir()
    scratch.mkdir()
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--disable-pip-version-check"]
    command += ["--no-build-isolation", "--no-deps", "--no-index", "--wheel-dir", str(wheels), str(tree)]
    progress = Progress()
    with log.open("w", buffering=1) as record:

        def on_line(line: str) -> None:
            record.write(line + "\n")
            progress.show(line)

        finished = run(command, recipe.environment(jobs, scratch, found), _TIME_LIMIT, on_line)
    progress.end()
    built = list(wheels.glob("horovod-*.whl"))
    if finished.returncode != 0 or len(built) != 1:
        raise explain(finished.output, finished.returncode, workspace.parents[1], log)
    shutil.rmtree(scratch)
    return built[0]


def explain(output: str, returncode: int | None, cache: Path, log: Path) -> BuildError:
    """The error for a build that failed, from what it printed: the known causes by name, else the log's end."""
    if "No space left on device" in output or "Disk quota exceeded" in output:
        return disk_full(cache)
    if returncode is None:
        return BuildError(f"The build was stopped after {_TIME_LIMIT // 3600} hours; its log is {log}.")
    if re.search(r"Killed signal|fatal error: Killed|out of memory|cannot allocate memory", output, re.IGNORECASE):
        return BuildError(f"The compiler ran out of memory: run again with --jobs 1. The log is {log}.")
    # pip indents what its subprocesses print by two spaces.
    output = "\n".join(line.removeprefix("  ") for line in output.splitlines())
    shown = first_error(output) or output.splitlines()[-25:]
    parts = ["The build failed. The first error:", "", *shown, ""]
    if command := failed_command(output):
        parts += ["The command that failed:", "", command, ""]
    return BuildError("\n".join([*parts, f"The whole log: {log}"]))


def first_error(output: str) -> list[str]:
    """The compiler's, linker's or CMake's first error with the lines that belong to it; empty if there is none.

    >>> first_error("g++ -c error.cc\\na.h:7:1: error: 'b' does not name a type\\n    7 | b\\n      | ^\\nmake: stop")
    ["a.h:7:1: error: 'b' does not name a type", '    7 | b', '      | ^']
    """
    lines = output.splitlines()
    first = next((index for index, line in enumerate(lines) if _ERROR.search(line)), None)
    if first is None:
        return []
    # Where the header was included from stands above a compiler's error; the source and CMake's words below it.
    start = first
    while start > 0 and first - start < 6 and re.match(r"In file included from |\s+from ", lines[start - 1]):
        start -= 1
    end = first + 1
    while end < len(lines) and end - first < 12 and (not lines[end].strip() or lines[end].startswith(" ")):
        end += 1
    return [line.rstrip() for line in lines[start:end] if line.strip()]


def failed_command(output: str) -> str | None:
    """The command whose end make reports first, found by the file that it should have made."""
    failed = re.search(r"^make.*\*\*\* \[(?:[^\]]*:\d+: )?(\S+)\] Error", output, re.MULTILINE)
    if not failed:
        return None
    # make names the file from the top, the command from the folder where it runs.
    target = failed[1]
    names = [target[index:] for index in (0, *(found.end() for found in re.finditer("/", target)))]
    commands = [line.strip() for line in output.splitlines() if " -o " in line]
    for name in names:
        if found := next((line for line in commands if f" -o {name} " in f"{line} "), None):
            return found
    return None


class Progress:
    """Phase, percentage and time: one line redrawn on a terminal, a line every tenth of the way elsewhere."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.live = sys.stdout.isatty()
        self.percent = 0
        self._phase = "configuring"
        self._shown = -1
        self._last = 0.0

    def show(self, line: str) -> None:
        """Takes one line of the build's output."""
        if match := _PERCENT.match(line):
            self._phase = "compiling"
            # The libraries are built side by side and pip's percentages wander; never step back.
            self.percent = max(self.percent, int(match[1]))
        elif self._phase == "compiling" and self.percent == 100 and "creating" in line and ".whl" in line:
            self._phase = "packing"
        now = time.monotonic()
        if self.live and now - self._last > 0.2:
            self._last = now
            width = 30
            bar = ("#" * (self.percent * width // 100)).ljust(width, ".")
            print(f"\r  {self._phase:<11} [{bar}] {self.percent:3d}%  {self.elapsed()} ", end="", flush=True)
        elif not self.live and self.percent // 10 > self._shown:
            self._shown = self.percent // 10
            print(f"  {self._phase:<11} {self.percent:3d}%  {self.elapsed()}", flush=True)

    def elapsed(self) -> str:
        """Minutes and seconds since the start."""
        minutes, seconds = divmod(int(time.monotonic() - self.start), 60)
        return f"{minutes}m{seconds:02d}s"

    def end(self) -> None:
        """Leaves the cursor on a fresh line."""
        if self.live:
            print()
