"""Finding and ending every process of a job.

Launchers put ranks into other sessions and process groups, and orphans move to another parent, so neither says who
belongs to a job. What every process started by a job keeps is its environment, which the kernel shows in /proc:
each job carries a variable with a value of its own. Children of the launcher count too, marked or not.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROC = Path("/proc")


def marked(marker: str) -> set[int]:
    """Live processes started with `marker` ("NAME=value") in their environment. Zombies have none left."""
    wanted = marker.encode()
    found = set()
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            # Gone meanwhile, or another user's: not ours.
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.add(int(entry.name))
    return found


def descendants(root: int) -> set[int]:
    """Live processes below `root`, itself not among them."""
    children: dict[int, list[int]] = {}
    for entry in PROC.iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # "pid (name) state ppid ...", where the name may hold spaces and parentheses.
                state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
                if state not in "ZX":
                    children.setdefault(int(parent), []).append(int(entry.name))
    found: set[int] = set()
    todo = [root]
    while todo:
        below = children.get(todo.pop(), [])
        found.update(below)
        todo.extend(below)
    return found


def describe(pids: set[int]) -> str:
    """One line per process: its number and command."""
    lines = []
    for pid in sorted(pids):
        with contextlib.suppress(OSError):
            command = (PROC / str(pid) / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            lines.append(f"{pid}: {command[:200]}")
    return "\n".join(lines)


def wait_until(done: Callable[[], bool], seconds: float) -> bool:
    """Whether `done()` became true in that time."""
    limit = time.monotonic() + seconds
    while not done():
        if time.monotonic() > limit:
            return False
        time.sleep(0.02)
    return True


def signal_all(pids: set[int], number: signal.Signals) -> None:
    """Send a signal to each of them that still exists."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def end(launcher: subprocess.Popen[Any], marker: str) -> None:
    """End a whole job and wait until nothing of it is left; RuntimeError if something survives."""

    def alive() -> set[int]:
        # Reaping the launcher, so that it does not look alive as our own zombie.
        running = {launcher.pid} if launcher.poll() is None else set()
        return running | descendants(launcher.pid) | marked(marker)

    # The launcher first and alone: it ends its ranks and also removes its temporary files and shared memory.
    if launcher.poll() is None:
        launcher.terminate()
        wait_until(lambda: launcher.poll() is not None, 5)
    for number, patience in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 10.0)):
        signal_all(alive(), number)
        if wait_until(lambda: not alive(), patience):
            return
    raise RuntimeError(f"these processes survived SIGKILL:\n{describe(alive())}")
