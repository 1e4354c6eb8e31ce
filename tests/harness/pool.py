"""Jobs: a set of processes under a launcher, started, watched, and ended without leaving anything behind."""

from __future__ import annotations

import contextlib
import os
import pickle
import secrets
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from harness import processes
from harness.errors import ClusterError
from harness.launchers import CYCLE_TIMES, LAUNCHERS, environment

START = Path(__file__).with_name("start.py")
# How long the ranks that are still running get once one has failed.
GRACE = 5.0
# How long a pool may take to start.
STARTUP = 120.0
# How long a message may stop in the middle: a rank can be stopped or killed while it sends or receives.
STALL = 30.0
TAIL = 40


@dataclass(frozen=True)
class Spec:
    """A spec says how a pool is started; pools of equal specs are interchangeable."""

    launcher: str
    ranks: int
    env: tuple[tuple[str, str], ...] = ()
    word: str = ""

    def __str__(self) -> str:
        parts = [self.launcher, str(self.ranks), self.word, *(f"{name}={value}" for name, value in self.env)]
        return "-".join(filter(None, parts))


def start_of_ranks(spec: Spec, folder: Path, templates: Sequence[str] = ()) -> list[str]:
    """What stands before a script: its output is kept, and it is forked from these templates if there are some."""
    variable = LAUNCHERS[spec.launcher].rank_variable
    if templates:
        return [sys.executable, "-m", "harness.forked", variable, str(folder), *templates]
    return [sys.executable, str(START), "rank", variable, str(folder), sys.executable]


class Job:
    """A launcher and everything it starts."""

    # Carried by every process this test session starts, whatever job it belongs to.
    SESSION = f"HARNESS_SESSION={secrets.token_hex(8)}"

    def __init__(
        self,
        spec: Spec,
        folder: Path,
        command: Sequence[str],
        env: Mapping[str, str] | None = None,
        templates: Sequence[str] = (),
    ) -> None:
        launcher = LAUNCHERS[spec.launcher]
        launch = launcher.command(spec.ranks)
        if launcher.forked and templates:
            launch = [sys.executable, "-m", "harness.launch", templates[0], *launch]
        self.spec = spec
        self.folder = folder
        self.marker = f"HARNESS_JOB={secrets.token_hex(8)}"
        marks = dict(mark.split("=") for mark in (self.SESSION, self.marker))
        cycle_time = {"HOROVOD_CYCLE_TIME": CYCLE_TIMES[spec.word]} if spec.word in CYCLE_TIMES else {}
        start = [sys.executable, str(START), "launcher", str(os.getpid())]
        with (folder / "launcher.log").open("wb") as log:
            self.process = subprocess.Popen(
                [*start, *launch, *command],
                env=environment(launcher, folder, {**cycle_time, **dict(spec.env), **(env or {}), **marks}),
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The terminal's Ctrl-C is for the test process, which then ends the job.
                start_new_session=True,
            )

    def end(self) -> None:
        """End every process of the job now."""
        processes.end(self.process, self.marker)

    def log(self) -> str:
        """Return the launcher's own output."""
        return (self.folder / "launcher.log").read_text(errors="replace")


@dataclass
class Rank:
    """The test process's view of one rank: two processes, the worker and the one that watches it."""

    number: int
    pid: int
    worker: Connection
    watcher: Connection
    # Of the function it was last asked to run; all None while it runs.
    value: bytes | None = None
    failure: str | None = None
    traceback: str | None = None
    # When it failed, in seconds since the function began.
    seconds: float = 0.0
    # What it handed to gather(), until every rank has.
    offered: bytes | None = None

    @property
    def running(self) -> bool:
        return self.value is None and self.failure is None

    def fail(self, sentence: str, seconds: float, traceback: str | None = None) -> None:
        """Note how and when it failed."""
        self.failure, self.seconds, self.traceback = sentence.partition("\n")[0], seconds, traceback


class Pool(Job):
    """Ranks that run one function after the other."""

    def __init__(self, spec: Spec, folder: Path, templates: Sequence[str] = ()) -> None:
        self.ranks: list[Rank] = []
        # Where each output file ended before the current function.
        self.before: dict[Path, int] = {}
        # A short-lived folder of its own: a socket's path must be short, and only this user may connect.
        with tempfile.TemporaryDirectory(prefix="harness-") as private, socket.socket(socket.AF_UNIX) as listener:
            address = str(Path(private) / "socket")
            listener.bind(address)
            listener.listen(2 * spec.ranks)
            variable = LAUNCHERS[spec.launcher].rank_variable
            arguments = [address, variable, str(spec.ranks), spec.launcher, str(folder), *templates]
            super().__init__(spec, folder, [sys.executable, "-m", "harness.worker", *arguments], templates=templates)
            try:
                self.ranks = self._meet(listener)
            except BaseException:
                self.end()
                raise

    def _meet(self, listener: socket.socket) -> list[Rank]:
        found: dict[tuple[str, int], tuple[Connection, int]] = {}
        limit = time.monotonic() + STARTUP
        listener.settimeout(0.1)
        while len(found) < 2 * self.spec.ranks:
            if self.process.poll() is not None:
                raise ClusterError(self._report(f"{self.spec}: the launcher ended before all ranks were up"))
            if time.monotonic() > limit:
                raise ClusterError(self._report(f"{self.spec}: not all ranks were up after {STARTUP:.0f} s"))
            try:
                accepted, _ = listener.accept()
            except TimeoutError:
                continue
            accepted.setblocking(True)
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
                accepted.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(STALL), 0))
            connection = Connection(accepted.detach())
            with contextlib.suppress(EOFError, OSError):  # It died at once; the launcher will end too, and say why.
                role, rank, pid = connection.recv()
                found[role, rank] = (connection, pid)
        ranks = []
        for number in range(self.spec.ranks):
            worker, pid = found["worker", number]
            ranks.append(Rank(number, pid, worker, found["watcher", number][0]))
        return ranks

    def run(self, name: str, folders: Sequence[str], call: bytes, timeout: float) -> list[Any]:
        """Every rank's return value. On any failure all processes are ended first, then ClusterError is raised."""
        __tracebackhide__ = True
        try:
            self._run(folders, call, timeout)
            if not any(rank.running or rank.failure for rank in self.ranks):
                return [pickle.loads(rank.value) for rank in self.ranks if rank.value is not None]
            raise self._failure(name, timeout)
        except BaseException:
            self.end()
            raise

    def _run(self, folders: Sequence[str], call: bytes, timeout: float) -> None:
        started = time.monotonic()
        limit = started + timeout
        self.before = {file: file.stat().st_size for file in self._output_files()}
        for rank in self.ranks:
            rank.value = rank.failure = rank.traceback = rank.offered = None
            with contextlib.suppress(OSError):  # It is dead, then; its watcher says how it died.
                rank.worker.send((folders, call))
        failed = False
        while any(rank.running for rank in self.ranks) and time.monotonic() < limit:
            channels = [end for rank in self.ranks for end in (rank.worker, rank.watcher) if not end.closed]
            ready = wait(channels, limit - time.monotonic())
            for rank in self.ranks:
                if rank.worker in ready:
                    self._hear(rank, time.monotonic() - started)
                if rank.watcher in ready:
                    self._bury(rank, time.monotonic() - started)
            if not failed and any(rank.failure for rank in self.ranks):
                failed = True
                limit = min(limit, time.monotonic() + GRACE)

    def _hear(self, rank: Rank, seconds: float) -> None:
        """Take one message from a rank's worker."""
        try:
            kind, *rest = rank.worker.recv()
        except (EOFError, OSError):
            rank.worker.close()  # Its watcher says how it died.
            return
        if kind == "returned":
            (rank.value,) = rest
        elif kind == "raised":
            sentence, trace = rest
            rank.fail(sentence, seconds, trace)
        else:
            (rank.offered,) = rest
            offers = [each.offered for each in self.ranks]
            if None not in offers:
                for each in self.ranks:
                    each.offered = None
                    with contextlib.suppress(OSError):
                        each.worker.send(offers)

    def _bury(self, rank: Rank, seconds: float) -> None:
        """Note how a rank's worker ended: its watcher has said so, or is itself gone."""
        # What the worker managed to say before it ended comes first.
        while not rank.worker.closed and rank.worker.poll():
            self._hear(rank, seconds)
        try:
            code = rank.watcher.recv()
            how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        except (EOFError, OSError):
            how = "was killed"
        rank.watcher.close()
        if rank.failure is None:
            rank.fail(how, seconds)

    def _stacks(self) -> dict[int, str]:
        """Where the ranks are that still run."""
        running = [rank for rank in self.ranks if rank.running]
        processes.signal_all({rank.pid for rank in running}, signal.SIGUSR1)
        files = {rank.number: self.folder / f"rank{rank.number}.stack" for rank in running}
        processes.wait_until(lambda: all(file.stat().st_size for file in files.values()), 1)
        return {number: file.read_text() for number, file in files.items()}

    def _failure(self, name: str, timeout: float) -> ClusterError:
        stacks = self._stacks()
        # A dying process takes a moment to be gone, and its neighbours may notice and complain first.
        failed = sorted(
            (rank for rank in self.ranks if rank.failure),
            key=lambda rank: rank.seconds if rank.traceback else rank.seconds - 1.0,
        )
        ranks: dict[int, str] = {}
        for rank in self.ranks:
            if rank.failure:
                ranks[rank.number] = f"{rank.failure} after {rank.seconds:.1f} s"
            elif rank.running:
                waited = f"{GRACE:.0f} s after that" if failed else f"after {timeout:g} s"
                ranks[rank.number] = f"was still running {waited}"
            else:
                ranks[rank.number] = "returned"
        where = f"{name} on {self.spec.ranks} ranks under {self.spec.launcher}"
        what = f"rank {failed[0].number} {failed[0].failure}" if failed else f"no end after {timeout:g} s"
        # Ranks often fail alike; the same traceback once is enough.
        tracebacks: dict[str, list[int]] = {}
        for rank in failed:
            if rank.traceback:
                tracebacks.setdefault(rank.traceback, []).append(rank.number)
        sections = [
            "\n".join(f"  rank {number} {sentence}" for number, sentence in ranks.items()),
            *(section(f"rank {', '.join(map(str, sorted(who)))}: traceback", text) for text, who in tracebacks.items()),
            *(section(f"rank {number}: where it was", text) for number, text in stacks.items()),
        ]
        return ClusterError(self._report(f"{where}: {what}", *sections), ranks)

    def _output_files(self) -> list[Path]:
        return [self.folder / f"rank{rank}.{kind}" for rank in range(self.spec.ranks) for kind in ("out", "err")]

    def _report(self, *parts: str) -> str:
        """The parts, then what the ranks printed during this function and what the launcher printed."""
        names = {"out": "stdout", "err": "stderr"}
        printed = []
        for file in self._output_files():
            if file.exists():
                text = file.read_bytes()[self.before.get(file, 0) :].decode(errors="replace")
                printed.append(section(f"{file.stem}: {names[file.suffix[1:]]}".replace("rank", "rank "), text))
        return "\n".join(filter(None, [*parts, *printed, section(f"{self.spec.launcher} launcher", self.log())]))

    def close(self) -> None:
        """End the pool the orderly way, so that Horovod and MPI shut down as in a real job; then make sure."""
        for rank in self.ranks:
            with contextlib.suppress(OSError):
                rank.worker.send(None)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE)
        self.end()

    def end(self) -> None:
        """End every process of the pool now."""
        super().end()
        for rank in self.ranks:
            rank.worker.close()
            rank.watcher.close()


def section(title: str, text: str) -> str:
    """The end of a text under a title; nothing if there is no text."""
    lines = text.rstrip().splitlines()
    left_out = [f"... ({len(lines) - TAIL} lines above)"] if len(lines) > TAIL else []
    return "\n".join([f"--- {title}", *left_out, *lines[-TAIL:]]) if lines else ""
