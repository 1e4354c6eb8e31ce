"""Runs a command that starts processes of its own, and leaves none of them behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_MARK = "ADACONS_RUN"


@dataclass(frozen=True)
class Finished:
    """How a command ended. `returncode` is None where it had to be stopped."""

    returncode: int | None
    output: str


def run(
    command: list[str],
    environment: dict[str, str],
    timeout: float,
    on_line: Callable[[str], None] | None = None,
    cwd: Path | None = None,
) -> Finished:
    """Runs `command`, hands each line of its output to `on_line`, and stops it after `timeout` seconds.

    Launchers put their ranks into sessions of their own, so neither a process group nor a walk over children finds
    them all. Every descendant inherits the environment, though, and a mark in it is how they are found.
    """
    mark = uuid.uuid4().hex
    deadline = time.monotonic() + timeout
    lines: list[str] = []
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment | {_MARK: mark},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    os.set_blocking(process.stdout.fileno(), False)
    pending = b""
    try:
        while True:
            ended = process.poll() is not None
            with contextlib.suppress(BlockingIOError):
                pending += process.stdout.read() or b""
            *complete, pending = pending.split(b"\n")
            if ended and pending:
                complete.append(pending)
            for line in complete:
                lines.append(line.decode(errors="replace").rstrip())
                if on_line:
                    on_line(lines[-1])
            if ended:
                return Finished(process.returncode, "\n".join(lines))
            if time.monotonic() > deadline:
                return Finished(None, "\n".join(lines))
            time.sleep(0.05)
    finally:
        _stop_all(mark)
        process.stdout.close()
        process.wait()


def _stop_all(mark: str) -> None:
    # Killing one can let another be born, so look until nobody is left.
    deadline = time.monotonic() + 10
    while (alive := _marked(mark)) and time.monotonic() < deadline:
        for pid in alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def _marked(mark: str) -> list[int]:
    wanted = f"{_MARK}={mark}".encode()
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            # Others' processes refuse to be read, and any process can end meanwhile. A zombie's is empty.
            with contextlib.suppress(OSError):
                if wanted in (folder / "environ").read_bytes().split(b"\0"):
                    found.append(int(folder.name))
    return found
