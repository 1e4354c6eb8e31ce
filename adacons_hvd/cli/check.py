"""The doctor's live check: start two processes, and tell how they fared."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..horovod_build import proof
from ..horovod_build.processes import Finished, run
from . import live

__all__ = ["LAUNCHERS", "RANKS", "check", "path_of", "what_to_check"]

#: The launchers that can start a live check, and the program of each.
LAUNCHERS = {"mpi": "mpirun", "gloo": "horovodrun", "torchrun": "torchrun"}

#: How many processes a live check has.
RANKS = 2
_TIME_LIMIT = 120

Line = dict[str, Any]


def what_to_check(frameworks: list[str] | None, launchers: list[str] | None) -> list[tuple[str, str]]:
    """Pairs of a framework and a launcher: those asked for, by default all that are here."""
    frameworks = frameworks or [name for name in ("torch", "tensorflow") if find_spec(name)]
    launchers = launchers or [name for name, program in LAUNCHERS.items() if path_of(program)]
    return [(f, name) for name in launchers for f in frameworks if name != "torchrun" or f == "torch"]


def path_of(program: str) -> str | None:
    """Where a launcher is; those of Python packages are started by this Python, so beside it first."""
    return shutil.which(program, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))


def check(framework: str, launcher: str) -> dict[str, Any]:
    """Whether each thing worked, and if not, why."""
    error = _missing(framework, launcher)
    lines: list[Line] = []
    if error is None:
        # A launcher passes on where this program found the package, installed or not.
        environment = proof.rank_environment(Path(__file__).parents[2]) | {"PYTHONWARNINGS": "ignore"}
        finished = run(
            [*_launch(launcher), sys.executable, live.__file__, framework, launcher], environment, _TIME_LIMIT
        )
        lines = list(_said(finished.output))
        error = _why_it_failed(finished, lines)
    operations, schedules = _outcomes("operation", lines), _outcomes("schedule", lines)
    return {
        "framework": framework,
        "launcher": launcher,
        "works": error is None and not any([*operations.values(), *schedules.values()]),
        "error": error,
        "nccl": any(line["nccl"] for line in _of_kind("started", lines)),
        "operations": operations,
        "schedules": schedules,
        "choices": _choices(launcher, lines),
    }


def _missing(framework: str, launcher: str) -> str | None:
    if find_spec(framework) is None:
        return f"{framework} is not installed"
    if launcher != "torchrun" and find_spec("horovod") is None:
        return "Horovod is not installed"
    if path_of(LAUNCHERS[launcher]) is None:
        return f"{LAUNCHERS[launcher]} is not installed"
    return None


def _launch(launcher: str) -> list[str]:
    if launcher == "torchrun":
        options = ["--standalone", "--local-addr", "localhost", "--nproc-per-node", str(RANKS), "--no-python"]
        return [sys.executable, "-m", "torch.distributed.run", *options]
    return proof.launcher(launcher)


def _said(output: str) -> Iterator[Line]:
    """The messages of the ranks; launchers can put those of two on one line, or cut one off."""
    decoder = json.JSONDecoder()
    for match in re.finditer(re.escape(live.MARK), output):
        with contextlib.suppress(json.JSONDecodeError):
            yield decoder.raw_decode(output, match.end())[0]


def _of_kind(kind: str, lines: list[Line]) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def _outcomes(kind: str, lines: list[Line]) -> dict[str, str | None]:
    """By name: what went wrong on the first rank where something did, or None."""
    found: dict[str, str | None] = {}
    for line in _of_kind(kind, lines):
        found[line["name"]] = found.get(line["name"]) or line["error"]
    return found


def _choices(launcher: str, lines: list[Line]) -> list[dict[str, Any]]:
    where = f"here, {RANKS} processes under {launcher}"
    # All ranks say the same.
    by_size = {line["bytes"]: line for line in _of_kind("choice", lines)}
    return [
        {"where": where, **{k: line[k] for k in ("bytes", "schedule", "reason", "curvature")}}
        for line in by_size.values()
    ]


def _why_it_failed(finished: Finished, lines: list[Line]) -> str | None:
    if len(_of_kind("ended", lines)) == RANKS:
        return None
    how = "took too long" if finished.returncode is None else f"ended with exit code {finished.returncode}"
    reasons = [line["error"] for line in _of_kind("failed", lines)]
    return f"it {how}: {(reasons or [_last_words(finished.output)])[0]}"


def _last_words(output: str) -> str:
    """The last line of what a launcher printed, without what says which rank it is from."""
    lines = [re.sub(r"^\[\d+,\d+\]<std\w+>:", "", line).strip() for line in output.splitlines()]
    return next((line for line in reversed(lines) if line and live.MARK not in line), "it printed nothing")
