"""The long part: turns the patched source into a wheel, showing how far it has come."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from pathlib import Path

from .errors import BuildError, disk_full
from .processes import run
from .recipe import Recipe

# A build that takes longer than this hangs; the slowest measured machine took five minutes.
_TIME_LIMIT = 2 * 3600
_PERCENT = re.compile(r"^\s*\[ *(\d+)%\]")


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

        finished = run(command, recipe.environment(jobs, scratch), _TIME_LIMIT, on_line)
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
    lines = output.splitlines()
    first = next((index for index, line in enumerate(lines) if re.search(r"\berror\b:?", line, re.IGNORECASE)), None)
    shown = lines[-25:] if first is None else lines[max(0, first - 2) : first + 12]
    return BuildError("\n".join(["The build failed. Where it first says so:", "", *shown, "", f"The whole log: {log}"]))


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
