"""Two streams of tests on one machine: while the tests of one wait, for processes to start or to end, the other's run.

    python -m pytest --streams 2

Once tests are collected, pytest forks. Both processes take groups of tests, which are those of one file on one pool,
from one list: the first from its end and the second from its beginning, until they meet. The second one reports to the
first, so there is one output, and one end.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import secrets
import signal
import sys
import traceback
from collections.abc import Callable, Hashable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from harness.pool import Job
from harness.start import die_with_parent


class Groups:
    """Groups of tests, of which either stream takes the next one from its own end of the list."""

    def __init__(self, items: Sequence[pytest.Item], group_of: Callable[[pytest.Item], Hashable]) -> None:
        self._groups = [list(some) for _, some in itertools.groupby(items, group_of)]
        self._left: Any = multiprocessing.Array("i", [0, len(self._groups)])

    def taken(self, from_the_end: bool) -> Iterator[pytest.Item]:
        """The tests of the groups that this stream takes."""
        while True:
            with self._left.get_lock():
                first, stop = self._left
                if first >= stop:
                    return
                self._left[from_the_end] += -1 if from_the_end else 1
            yield from self._groups[stop - 1 if from_the_end else first]

    def give_up(self) -> None:
        """Leave the rest."""
        with self._left.get_lock():
            self._left[1] = self._left[0]


def run(session: pytest.Session, group_of: Callable[[pytest.Item], Hashable]) -> None:
    """Run the session's tests in two processes."""
    groups = Groups(session.items, group_of)
    theirs, mine = multiprocessing.Pipe(duplex=False)
    # So that nothing is written twice.
    sys.stdout.flush()
    sys.stderr.flush()
    child = os.fork()
    if not child:
        theirs.close()
        _second(session, groups, mine)
    mine.close()
    reports = Reports(session, theirs)
    try:
        for item, after in _with_next(groups.taken(from_the_end=True)):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            reports.pass_on()
            _stop_if_told(session)
        reports.pass_on(until_the_end=True)
        _stop_if_told(session)
    finally:
        groups.give_up()
        # If it is still running tests, it ends when it has something to tell.
        theirs.close()
        os.waitpid(child, 0)


def _stop_if_told(session: pytest.Session) -> None:
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)


def _with_next(items: Iterator[pytest.Item]) -> Iterator[tuple[pytest.Item, pytest.Item | None]]:
    """Each with the one that comes after it, by which pytest knows which fixtures end."""
    item = next(items, None)
    while item is not None:
        after = next(items, None)
        yield item, after
        item = after


class Reports:
    """The first stream's end: what the second one tells."""

    def __init__(self, session: pytest.Session, connection: Connection) -> None:
        self._session = session
        self._connection = connection
        self._running = ""
        self._ended = False

    def pass_on(self, until_the_end: bool = False) -> None:
        """Let pytest know what has happened; with ``until_the_end`` wait for all that will."""
        hook = self._session.config.hook
        while not self._ended and (until_the_end or self._connection.poll()):
            try:
                kind, value = self._connection.recv()
            except (EOFError, OSError):
                raise RuntimeError(f"the second stream of tests came to an end in {self._running}") from None
            if kind == "test":
                self._running, location = value
                hook.pytest_runtest_logstart(nodeid=self._running, location=location)
            elif kind == "report":
                report = hook.pytest_report_from_serializable(config=self._session.config, data=value)
                hook.pytest_runtest_logreport(report=report)
            elif kind == "error":
                raise RuntimeError(f"the second stream of tests failed in {self._running}:\n{value}")
            else:
                self._ended = True
            if self._session.shouldfail:
                return


class Reporter:
    """The second stream's end, a plugin in the place of the terminal."""

    def __init__(self, config: pytest.Config, connection: Connection) -> None:
        self._config = config
        self._connection = connection

    def pytest_runtest_logstart(self, nodeid: str, location: tuple[str, int | None, str]) -> None:
        self._connection.send(("test", (nodeid, location)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        data = self._config.hook.pytest_report_to_serializable(config=self._config, report=report)
        self._connection.send(("report", data))


def _second(session: pytest.Session, groups: Groups, connection: Connection) -> None:
    """The second stream, which is all that this process does."""
    config = session.config
    code = 1
    die_with_parent(signal.SIGKILL)
    try:
        # What was forked with this process is the first stream's: captured output, the terminal, the mark of a session.
        capturing: Any = config.pluginmanager.getplugin("capturemanager")
        capturing.stop_global_capturing()
        capturing.start_global_capturing()
        terminal: Any = config.pluginmanager.getplugin("terminalreporter")
        if terminal is not None:
            terminal._tw._file = Path(os.devnull).open("w")  # noqa: SIM115
        Job.SESSION = f"HARNESS_SESSION={secrets.token_hex(8)}"
        config.pluginmanager.register(Reporter(config, connection))
        for item, after in _with_next(groups.taken(from_the_end=False)):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if session.shouldfail or session.shouldstop:
                break
        connection.send(("end", None))
        code = 0
    except BaseException:
        with contextlib.suppress(OSError):  # the first stream is gone
            connection.send(("error", traceback.format_exc()))
    finally:
        os._exit(code)
