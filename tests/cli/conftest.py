"""The command in the process of the tests, which spares the imports of a framework."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from adacons_hvd.cli import main


@pytest.fixture
def here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """A function that does what ``command.adacons`` does, without a process of its own."""
    monkeypatch.setattr(sys, "path", [*sys.path])

    def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(folder)
        code = main([*map(str, arguments)])
        return subprocess.CompletedProcess([], code, *capsys.readouterr())

    return run
