"""The `adacons` command as a user runs it: in a process of its own. Tests that need none take `here` of conftest.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMMAND = [sys.executable, "-m", "adacons_hvd.cli"]


def adacons(*arguments: object, folder: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run it in a folder."""
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3", **(env or {})},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )


def answer(*arguments: object, run: Callable[..., subprocess.CompletedProcess[str]] = adacons, **options: Any) -> Any:
    """Run the command with --json, check that all went well, and return what it says."""
    done = run(*arguments, "--json", **options)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def assert_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """The command failed, and said why in one line on standard error."""
    assert done.returncode == 1, done.stdout + done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("adacons: ")
    for word in words:
        assert word in line
